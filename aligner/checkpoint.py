"""Saving and restoring with Orbax (v1): the only file that imports it.

WORKDIR/checkpoints/<step>/ holds the training state; what belongs to it but is no array (position in the data, counters) is its JSON
metadata. A save is written beside and renamed when complete, so a kill leaves the previous one.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from aligner import seal
from aligner.processes import anywhere
from aligner.state import TrainState
from aligner.types import Params, SaveError, UserError

FOLDER = "checkpoints"
REST = [field.name for field in dataclasses.fields(TrainState) if field.name != "trainable"]
log = logging.getLogger(__name__)
# What goes wrong in a thread of Orbax is raised again where the save is waited for: its tracebacks would be hundreds of lines before that.
absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname or not (record.exc_info or record.exc_text))


class Checkpoints(NamedTuple):
    """The open checkpoints of a workdir, the thread that notes their checksums, and the last save as it sees it (on the first process)."""

    orbax: ocp.training.Checkpointer
    sealer: ThreadPoolExecutor
    last: list[Future]

    def folder(self, step: int) -> Path:
        return Path(str(self.orbax.directory)) / str(step)


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of a workdir, the newest `keep` of which are kept. Leaving waits for a save under way."""
    policy = ocp.training.preservation_policies.LatestN(keep)
    folder = Path(workdir).absolute() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    orbax = ocp.training.Checkpointer(folder, preservation_policy=policy, cleanup_tmp_directories=True)
    with contextlib.closing(orbax), ThreadPoolExecutor(1) as sealer:
        yield Checkpoints(orbax, sealer, [])


def save(checkpoints: Checkpoints, state: TrainState, metadata: dict[str, Any]) -> None:
    """Save in the background. Waits for the save before it, and raises SaveError if that went wrong. `metadata` is JSON."""
    if jax.default_backend() == "cpu":  # host arrays are written from where they lie, and the next step would overwrite them
        state = _copy(state)
    step = int(state.step)
    with _told(checkpoints):
        seal.remove(checkpoints.folder(step))
        saving = checkpoints.orbax.save_checkpointables_async(step, _parts(state), custom_metadata=metadata, force=True)
    if jax.process_index() == 0:
        checkpoints.last[:] = [checkpoints.sealer.submit(lambda: saving.result() and seal.write(checkpoints.folder(step)))]


@jax.jit
def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def check(checkpoints: Checkpoints) -> None:
    """Raises SaveError if the last save has gone wrong by now; until the next one a run would work for nothing."""
    if any(saving.done() and saving.exception() for saving in checkpoints.last):
        wait(checkpoints)


def wait(checkpoints: Checkpoints) -> None:
    """Until the save under way is complete; raises SaveError if it went wrong."""
    with _told(checkpoints):
        checkpoints.orbax.wait()


@contextlib.contextmanager
def _told(checkpoints: Checkpoints) -> Iterator[None]:
    """What goes wrong in a save, such as a full disk, as one sentence."""
    try:
        yield
    except Exception as error:  # Orbax raises what the file system or tensorstore raise
        folder = checkpoints.folder(0).parent
        whole = steps(folder.parent)
        left = f"The newest whole one is that of step {whole[-1]}" if whole else "There is no earlier one"
        number = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's; its first line is mostly the file's name
        reason = os.strerror(int(number[1])) if number else first_line(error)
        mend = "make room or mend what is wrong there, then give the same command to go on"
        raise SaveError(f"a checkpoint could not be written to {folder}: {reason}. {left}; {mend}") from error


def _parts(state: TrainState) -> dict[str, Any]:
    """The parameters stand alone, so that they can be read without the rest."""
    return {"trainable": state.trainable, "rest": {f: getattr(state, f) for f in REST}}


def restore(checkpoints: Checkpoints, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """(state, metadata) of the newest checkpoint that can be read, laid out as `abstract` says; None without any.

    A torn checkpoint is reported, set aside, and the one before is used. Of several processes the first compares the checksums and
    moves the folder, and a checkpoint that one of them cannot read is torn for all.

    Raises:
        UserError: none can be read, or one cannot although its checksums are right: it is what lies around it that must be mended.
    """
    found, first = sorted((c.step for c in checkpoints.orbax.checkpoints), reverse=True), jax.process_index() == 0
    for step in found:
        folder, harm, read, sealed = checkpoints.folder(step), None, None, False
        try:
            if first:
                sealed = seal.check(folder)
                older = any(seal.exists(checkpoints.folder(other)) for other in found if other < step)
                if jax.process_count() > 1 and not seal.exists(folder) and older:
                    raise ValueError("its checksums are missing")  # torn or not: where one process fails, the others wait for minutes
        except Exception as error:
            harm = error
        if not anywhere(harm is not None):
            try:
                read = _read(checkpoints, step, abstract)
            except Exception as error:  # Orbax raises what the file system, tensorstore or JSON raise
                harm = error
            if not anywhere(harm is not None):
                return read
        what = first_line(harm) if harm else "by another process"
        if anywhere(sealed):  # by too little memory, a file system that is away, another aligner: older ones would fare no better
            raise UserError(f"the checkpoint {folder} is whole, but cannot be read ({what}); mend that and give the same command again")
        if first:
            log.warning("checkpoint %s cannot be read (%s); it is set aside as %s", folder, what, seal.set_aside(folder))
        anywhere(False)  # wait for that
        checkpoints.orbax.reload()
    if found:
        raise UserError(f"none of the checkpoints {found} in {checkpoints.orbax.directory} can be read; remove the folder to start anew")
    return None


def _read(checkpoints: Checkpoints, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    metadata = checkpoints.orbax.metadata(step).custom_metadata
    if not metadata:
        raise ValueError("its metadata is missing")
    parts = checkpoints.orbax.load_checkpointables(step, _parts(abstract))
    state = abstract.replace(**parts["rest"] | {"trainable": parts["trainable"]})
    # Orbax lays a typed key out by the rank of its data, which jit refuses on another mesh than it was saved on.
    return state.replace(rng=jax.device_put(state.rng, abstract.rng.sharding)), dict(metadata)


def newest(workdir: str | Path) -> tuple[int, dict[str, Any]] | None:
    """(step, metadata) of a workdir's newest checkpoint; None without one, or where it cannot be read: that is for `restore` to say."""
    try:
        step = steps(workdir)[-1]
        # Orbax itself would open the arrays as well
        metadata = json.loads((Path(workdir) / FOLDER / str(step) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None
    return (step, metadata) if metadata else None


def first_line(error: BaseException) -> str:
    """What went wrong at first: Orbax wraps it in pages of its own."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def steps(workdir: str | Path) -> list[int]:
    """Steps of the checkpoints that a workdir holds, oldest first."""
    folder = Path(workdir) / FOLDER
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def restore_trainable(workdir: str | Path, step: int | None = None) -> tuple[Params, int]:
    """The trainable parameters of a workdir's checkpoint (default: the newest) on this machine's first device, and its step."""
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} holds no checkpoint: {Path(workdir) / FOLDER} is missing or empty")
    step = found[-1] if step is None else step
    if step not in found:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    folder = (Path(workdir) / FOLDER / str(step)).absolute()
    try:
        seal.check(folder)
        leaves = ocp.checkpointables_metadata(folder).metadata["trainable"]
        only = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=only), leaves)
        return ocp.load_checkpointables(folder, {"trainable": abstract})["trainable"], step
    except Exception as error:  # without checksums, Orbax raises what the file system, tensorstore or JSON raise
        others = ", ".join(str(other) for other in found if other != step) or "none"
        raise UserError(f"the checkpoint {folder} is damaged: {first_line(error)}; other steps: {others}") from error


def save_params(path: str | Path, params: Params) -> None:
    """Write a parameter tree alone, as one Orbax checkpoint."""
    ocp.save(Path(path).absolute(), params, overwrite=True)


def load_params(path: str | Path, abstract: Params | None = None) -> Params:
    """Read what `save_params` wrote."""
    return ocp.load(Path(path).absolute(), abstract)
