"""How the processes of a run find each other: from what launchers say in the environment to `jax.distributed.initialize`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from aligner.stopping import Stopped, tell
from aligner.types import UserError

# Launchers say (how many processes there are, which one this is) under these names.
RANKS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),  # said by hand, and by the recipes in launch/
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI's mpirun
    ("PMI_SIZE", "PMI_RANK"),  # MPICH's mpiexec
)
GRACE = 3.0  # seconds in which what another process failed for may end this one too, in its own words
_FAILED = "aligner/failed"
EXAMPLE = "set JAX_COORDINATOR_ADDRESS (HOST:PORT of the first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each"


def anywhere(found: bool) -> bool:
    """Whether it is so in any process of the run; all must ask."""
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.bool_(found)).any())


def check_alike(what: Mapping[str, str]) -> None:
    """Whether all processes of the run have the same; all must ask, for the same things.

    Args:
        what: what people call a thing -> its fingerprint here.

    Raises:
        UserError: one has another than the first; in all of them.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in what.values()])
    everywhere = multihost_utils.process_allgather(digests)  # [processes, things, bytes]
    other = np.argwhere((everywhere != everywhere[0]).any(axis=-1))
    if len(other):
        process, thing = other[0]
        raise UserError(
            f"{[*what][thing]} is not the same in process {process} as in the first one: a file is missing or another there; "
            "give all processes the same files"
        )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """While this lasts, a process that fails says so, and the others of the run end within seconds, in a sentence.

    Else they would wait for it in a collective, and it for them at JAX's end, for minutes. One that is killed can say nothing.
    """
    import jax
    from jax._src.distributed import global_state  # where JAX keeps the store of texts that all processes see, as Orbax reads it

    store, left = global_state.client, threading.Event()
    if store is None:
        yield
        return

    def listen() -> None:
        while not left.wait(1.0):
            try:
                said = store.key_value_try_get(_FAILED)
            except jax.errors.JaxRuntimeError:  # nothing is said; or the store is gone, and JAX itself ends this process
                continue
            if not left.wait(GRACE):
                tell(f"{said}; this one ends with it, and the same command goes on from the newest checkpoint")
                jax.distributed.shutdown()  # for which that one waits
                os._exit(1)

    listener = threading.Thread(target=listen, name="other processes", daemon=True)
    listener.start()
    try:
        yield
    except Stopped:  # all are
        raise
    except BaseException as error:
        said = (str(error).splitlines() or [""])[0]
        number = global_state.process_id  # jax.process_index() may wait for the others
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # that one is gone which keeps the store
            store.key_value_set(_FAILED, f"process {number} has failed ({type(error).__name__}: {said})", allow_overwrite=True)
        raise
    finally:
        left.set()
        listener.join()


def world(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None where this process is alone.

    An explicit coordinator wins. JAX itself reads SLURM's steps, Open MPI 4, the hosts of a TPU slice and several slices (Megascale);
    ALIGNER_DISTRIBUTED=1 leaves all to it, where nothing in the environment tells of other processes: TPU machines whose metadata server
    alone knows, Kubernetes with `jax[k8s]`.

    Args:
        environment: os.environ.

    Raises:
        UserError: there are several processes, but nothing says where the first one is, or a number is missing or none.
    """
    ranks = {}
    for size, rank in RANKS:
        if size in environment or (rank in environment and rank == "JAX_PROCESS_ID"):
            ranks = {"num_processes": _number(environment, size), "process_id": _number(environment, rank)}
            if not 0 <= ranks["process_id"] < ranks["num_processes"]:
                raise UserError(f"{rank} is {ranks['process_id']}, but {size} is {ranks['num_processes']}; the first process is 0")
            break
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        return {"coordinator_address": address, **ranks}  # without ranks JAX asks SLURM or Kubernetes
    if environment.get("ALIGNER_DISTRIBUTED") == "1":
        return {}
    if "SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS", "1") > 1:
        return {}
    if "TPU_WORKER_HOSTNAMES" in environment or _number(environment, "MEGASCALE_NUM_SLICES", "1") > 1:
        return {}
    if ranks.get("num_processes", 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return {}
        raise UserError(f"there are {ranks['num_processes']} processes, but nothing says where the first one is; {EXAMPLE}")
    return None


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    if not value.isdigit():
        raise UserError(f"the environment variable {name} is {value!r}, no number; {EXAMPLE}")
    return int(value)
