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


def run_two(program):
    """[(exit status, stdout, stderr)] of two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **world, "JAX_PROCESS_ID": str(rank)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = [start(rank) for rank in range(2)]
    told = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told)]


@pytest.mark.slow
def test_processes_that_do_not_have_the_same_files_are_told_so():
    """A picture that one process alone did not find left it with fewer rows in another order, and both trained on without a word."""
    for _, told, _ in run_two(TWO):
        assert "config.model.path is not the same in process 1 as in the first one" in told


ONE_FAILS = """
import os, sys, time, jax
from aligner import processes
from aligner.commandline import ended
from aligner.types import UserError
jax.distributed.initialize(**processes.world(os.environ))
processes.GRACE = 1.0
def run():
    with processes.failing_together():
        if os.environ["JAX_PROCESS_ID"] == "1":
            raise UserError("there is no picture")
        time.sleep(600)  # as in a collective
sys.exit(ended(run))
"""


def test_where_one_process_fails_the_others_end_and_say_so():
    """They waited for each other, for five minutes, and then JAX aborted both."""
    first, failed = run_two(ONE_FAILS)
    assert first[0] == 1 and "process 1 has failed (UserError: there is no picture); this one ends with it" in first[2]
    assert failed[0] == 2 and failed[2] == "error: there is no picture\n"


@pytest.mark.slow
def test_processes_that_end_well_end_so():
    assert run_two(ONE_FAILS.replace("raise UserError", "repr").replace("600", "2")) == [(0, "", "")] * 2
