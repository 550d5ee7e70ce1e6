"""What launchers say in the environment, what JAX is told, and that all processes of a run have the same."""

import os
import socket
import subprocess
import sys

import pytest

from aligner.processes import world
from aligner.types import UserError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    "environment,arguments",
    [
        ({}, None),
        (SLURM, None),  # a batch script, not a step of it: it is alone
        ({**SLURM, "SLURM_STEP_NODELIST": "node[001-002]"}, {}),
        ({**SLURM, "SLURM_STEP_NODELIST": "node001", "SLURM_NTASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}, {}),
        ({"ALIGNER_DISTRIBUTED": "1"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {}),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "JAX_COORDINATOR_ADDRESS": "h:1"},
            {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3},
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "OMPI_COMM_WORLD_SIZE": "9"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
        ),
        ({**SLURM, "SLURM_STEP_NODELIST": "n1", "JAX_COORDINATOR_ADDRESS": "h:1"}, {"coordinator_address": "h:1"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_world(environment, arguments):
    assert world(environment) == arguments


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "x"}, "SLURM_NTASKS is 'x', no number"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "nothing says where the first one is; set JAX_COORDINATOR_ADDRESS"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "nothing says where the first one is"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"}, "JAX_NUM_PROCESSES is 'two', no number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is '', no number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is '', no number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "the first process is 0"),
    ],
)
def test_what_is_missing_is_named(environment, message):
    with pytest.raises(UserError, match=message):
        world(environment)


TWO = """
import os, jax
from aligner.processes import check_alike, world
from aligner.types import UserError
jax.distributed.initialize(**world(os.environ))
check_alike({"config.data.train": "rows", "config.model.path": "weights"})
try:
    check_alike({"config.data.train": "rows", "config.model.path": os.environ["JAX_PROCESS_ID"]})
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_processes_that_do_not_have_the_same_files_are_told_so():
    """A picture that one process alone did not find left it with fewer rows in another order, and both trained on without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", TWO], env={**os.environ, **world, "JAX_PROCESS_ID": str(rank)}, stdout=subprocess.PIPE, text=True
    )
    told = [process.communicate(timeout=120)[0] for process in [start(rank) for rank in range(2)]]
    for text in told:
        assert "config.model.path is not the same in process 1 as in the first one" in text
