"""Every recipe in launch/ is parsed, and the command in it is run as its launcher would: two processes on this machine that find each other.

Stand-ins for the launchers (`srun`, `mpirun`, `gcloud`) give the processes what the real ones say in the environment.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aligner.processes import world
from tests.resume import runs

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOBSETS = ("jobset_gpu", "jobset_tpu", "xpk")
RECIPES = ("local", "slurm", "mpi", "tpu_pod", *JOBSETS, "skypilot")
CHIPS = ("a100", "h100", "h200", "b200", "v4", "v5e", "v5p", "v6e", "cpu")

REQUEUE = ["--config.checkpoint.requeue_code=75"]

# What an imitation of a launcher does: two processes, each with the variables of its rank, and all must end well.
TWO = """#!/bin/bash
{shift}
for rank in 0 1; do
    {variables} "$@" & pids+=($!)
done
code=0; for pid in "${{pids[@]}}"; do wait "$pid" || code=$?; done; exit $code
"""
IMITATIONS = {
    "srun": TWO.format(
        shift="shift",  # --kill-on-bad-exit
        variables="SLURM_JOB_ID=$PORT SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_NODES=1",
    ),
    "mpirun": TWO.format(
        shift='while [ "${1:0:1}" = - ]; do shift 2; done',
        variables="OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank",
    ),
    # the workers' metadata server is not here: what it would say is said by hand
    "gcloud": TWO.format(
        shift='while [ "$1" != --command ]; do shift; done; shift; command="$1"; set -- bash -c "$command"',
        variables="JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=$rank",
    ),
}
# Says how it was called, and ends.
STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
"""


def container(name):
    """(pod template's spec, its one container, the job's spec, replicas) of a JobSet."""
    jobset = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    assert jobset["kind"] == "JobSet" and jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [one] = pod["containers"]
    return jobset, replicated, job, pod, one


def program(name):
    """(bash program, variables) of a YAML recipe, the two ranks' own left out."""
    if name == "skypilot":
        recipe = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
        return recipe["run"], recipe["envs"]
    one = container(name)[-1]
    assert one["command"] == ["bash", "-c"]
    [text] = one["args"]
    return text, {entry["name"]: entry["value"] for entry in one["env"] if "value" in entry}


def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(name, tmp_path, arguments, python):
    """The processes of a recipe, its `python` being this one and its own arguments replaced by `arguments`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, text in {**IMITATIONS, "python": python}.items():
        (tools / tool).write_text(text)
        (tools / tool).chmod(0o755)
    port = str(free_port())
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_COORD", "COVERAGE"))}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "CHIP": "cpu", "PORT": port, "CALLS": str(tmp_path / "calls"), "HF_HUB_OFFLINE": "1"}
    environment |= {"JAX_COORDINATOR_PORT": port}  # of SLURM, which derives it from the job's number else
    log = (tmp_path / "log").open("w")
    run = lambda command, **extra: subprocess.Popen(command, cwd=ROOT, env={**environment, **extra}, stdout=log, stderr=log)
    if name == "local":
        return [run([sys.executable, "launch/local.py", "--processes", "2", "--", *arguments])]
    if name == "slurm":
        return [run(["bash", "launch/slurm.sbatch", *arguments], SLURM_SUBMIT_DIR=str(ROOT))]
    if name == "mpi":
        return [run(["bash", "launch/mpi.sh", *arguments], HOSTS="127.0.0.1:2")]
    if name == "tpu_pod":
        return [run(["bash", "launch/tpu_pod.sh", *arguments], TPU="pod", ZONE="zone", DIRECTORY=str(ROOT))]
    text, variables = program(name)
    variables = {key: str(value) for key, value in variables.items()} | {"CHIP": "cpu"}
    text, count = re.subn(r"(python -m aligner\.main)(?:.*\\\n)*.*", lambda match: f"{match[1]} {shlex.join(arguments)}", text)
    assert count == 1
    ranks = []
    for rank in ("0", "1"):
        own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank}
        if name == "skypilot":
            own = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": rank}
            text = text.replace(":12321", f":{port}")
        elif name == "jobset_gpu":
            own.pop("JAX_NUM_PROCESSES")  # the recipe says it
            variables.pop("JAX_COORDINATOR_ADDRESS", None)
        else:
            variables = {key: value for key, value in variables.items() if not key.startswith("MEGASCALE")}
        ranks.append(run(["bash", "-c", text], **variables, **own))
    return ranks


def finish(processes, tmp_path, seconds):
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "local"])
def test_both_processes_are_called_and_find_each_other(name, tmp_path):
    """With a stand-in for Python: each process gets the arguments, and a rank of its own out of two."""
    finish(start(name, tmp_path, ["--config", "configs/a b.py", "--workdir=w"], STUB), tmp_path, 60)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 2
    for argv, environment in calls:
        assert argv == ["-m", "aligner.main", "--config", "configs/a b.py", "--workdir=w", *(REQUEUE if name == "slurm" else ())]
        assert environment["JAX_PLATFORMS"] == "cpu"  # settings.sh was read
    worlds = [world(environment) for _, environment in calls]
    if name == "slurm":
        assert worlds == [{}, {}]  # JAX reads the rest
        assert {environment["SLURM_PROCID"] for _, environment in calls} == {"0", "1"}
    else:
        assert {told["process_id"] for told in worlds} == {0, 1}
        assert {told["num_processes"] for told in worlds} == {2}
        assert len({told["coordinator_address"] for told in worlds}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train(name, tmp_path):
    """Two steps of a tiny run; process 0 alone writes."""
    workdir = tmp_path / "run"
    settings = {"train.steps": 2, "data.batch_size": 8, "checkpoint.every": 2, "train.eval_every": 0}
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    finish(start(name, tmp_path, runs.arguments(workdir, settings), python), tmp_path, runs.TIMEOUT)
    assert [record["step"] for record in runs.records(workdir, "train")] == [1, 2]
    assert "on 2 cpu devices" in (tmp_path / "log").read_text()
    assert (workdir / "checkpoints" / "2").is_dir()


def test_local_ends_when_a_process_fails(tmp_path):
    """What one of them says of a bad command line, and its exit status, are what is told of all."""
    command = [sys.executable, "launch/local.py", "--processes", "2", "--", "--config=configs/dpo_lava.py", f"--workdir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=runs.TIMEOUT)
    assert ended.returncode == 2 and "error: --config configs/dpo_lava.py does not exist" in ended.stderr


def of_stub(tmp_path, program, *options):
    """The command line of two local processes that run a program instead of training."""
    (tmp_path / "aligner").mkdir()
    (tmp_path / "aligner" / "__init__.py").touch()  # or one on PYTHONPATH comes first
    (tmp_path / "aligner" / "main.py").write_text(f"import os, signal, sys, time\nrank = os.environ['JAX_PROCESS_ID']\n{program}\n")
    return [sys.executable, LAUNCH / "local.py", "--processes", "2", *options, "--", "--config=none"]


@pytest.mark.parametrize("end,status", [("os.kill(os.getpid(), 9)", 137), ("sys.exit(75)", 75)])
def test_local_says_which_process_ended_first(tmp_path, end, status):
    """It may say nothing itself, and the others wait for it; its exit status counts, not theirs, who are killed."""
    command = of_stub(tmp_path, f"if rank == '1': {end}\ntime.sleep(600)")
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=runs.TIMEOUT)
    assert ended.returncode == status and ended.stderr == f"process 1 ended with status {status}, so the others are ended too\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_local_hands_on_what_asks_to_stop(tmp_path, name):
    """Nobody else would tell the processes, who are in sessions of their own."""
    command = of_stub(tmp_path, f"signal.signal(signal.{name}, lambda *_: sys.exit(0))\nos.write(1, b'up\\n')\ntime.sleep(600)\nsys.exit(1)")
    heed = f"import os, signal, sys\nsignal.signal(signal.{name}, signal.SIG_DFL)\nos.execv(sys.argv[1], sys.argv[1:])"  # whatever started the tests
    launcher = subprocess.Popen([sys.executable, "-c", heed, *command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert [launcher.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    launcher.send_signal(getattr(signal, name))
    assert launcher.wait(runs.TIMEOUT) == 0
    assert launcher.stdout.read() == ""  # which ends when the last of them has


def test_local_takes_the_gpus_that_it_may_see(tmp_path):
    command = of_stub(tmp_path, "os.write(1, f'{rank} {os.environ[\"CUDA_VISIBLE_DEVICES\"]}\\n'.encode())", "--gpus")
    run = lambda gpus: subprocess.run(command, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}, capture_output=True, text=True)
    assert sorted(run("5,7").stdout.splitlines()) == ["0 5", "1 7"]
    assert sorted(run("").stdout.splitlines()) == ["0 0", "1 1"]
    assert "CUDA_VISIBLE_DEVICES has only 1 GPUs, 5" in run("5").stderr


def test_skypilot_reads_arguments_as_a_command_line(tmp_path):
    """Values that are tuples have quotes, parentheses and stars in them."""
    asked = """--config c.py --config.optim.freeze="('vision_tower/.*', 'a b')" --workdir /shared/w"""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    told = {"CALLS": str(tmp_path / "calls"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "CHIP": "cpu", "ARGUMENTS": asked}
    subprocess.run(["bash", "-c", program("skypilot")[0]], cwd=ROOT, env={**os.environ, **told}, check=True)
    [argv, _] = json.loads((tmp_path / "calls").read_text())
    assert argv == ["-m", "aligner.main", *shlex.split(asked)]


def test_mpi_hands_the_environment_to_other_hosts(tmp_path):
    """A virtual environment's `python` is found there by the PATH of here."""
    (tmp_path / "mpirun").write_text(STUB)
    (tmp_path / "mpirun").chmod(0o755)
    told = {"CALLS": str(tmp_path / "calls"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "CHIP": "cpu", "HOSTS": "a:2,b:2", "HF_TOKEN": "t"}
    subprocess.run(["bash", "launch/mpi.sh"], cwd=ROOT, env={**os.environ, **told}, check=True)
    [argv, environment] = json.loads((tmp_path / "calls").read_text())
    passed = {argv[i + 1] for i, argument in enumerate(argv) if argument == "-x"}
    assert {"PATH", "HF_TOKEN", "JAX_COORDINATOR_ADDRESS", "JAX_PLATFORMS"} <= passed
    assert environment["JAX_COORDINATOR_ADDRESS"] == "a:12321"


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_agree_with_themselves(name):
    """As many pods as chips need, and a coordinator that is the name of the first pod."""
    jobset, replicated, job, pod, one = container(name)
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and pod["restartPolicy"] == "Never"
    environment = program(name)[1]
    assert REQUEUE[0] in one["args"][0] and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0  # stopped is not done
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    slices, hosts = replicated["replicas"], job["parallelism"]
    if name == "jobset_gpu":
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"{first}:12321" and environment["JAX_NUM_PROCESSES"] == str(hosts)
        per_host = one["resources"]["limits"]["nvidia.com/gpu"]
    else:
        per_host = one["resources"]["limits"]["google.com/tpu"]
        chips = 1
        for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips *= int(side)
        assert chips == per_host * hosts
        assert environment.get("MEGASCALE_NUM_SLICES", "1") == str(slices)
        assert slices == 1 or environment["MEGASCALE_COORDINATOR_ADDRESS"] == first
    mesh = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", one["args"][0]))
    assert int(mesh.get("data", 1)) * int(mesh["fsdp"]) == slices * hosts * per_host


@pytest.mark.parametrize("code,queued", [(75, True), (0, False), (1, False)])
def test_slurm_queues_what_was_stopped_again(tmp_path, code, queued):
    tools = {"srun": f"#!/bin/bash\nexit {code}\n", "scontrol": f'#!/bin/bash\necho "$@" > {tmp_path}/told\n'}
    for tool, text in tools.items():
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CHIP": "cpu", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, env=environment).returncode == code
    assert (tmp_path / "told").exists() == queued and (not queued or (tmp_path / "told").read_text() == "requeue 7\n")


def test_slurm_header():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH") and "=" in line)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one process for each GPU: JAX then gives each its own
    assert options["signal"].startswith("TERM@") and "#SBATCH --requeue" in lines
    assert not any(line.startswith("#SBATCH") for line in lines[lines.index("") :])  # sbatch reads them up to the first command


@pytest.mark.parametrize("chip", CHIPS)
def test_settings(chip):
    """What is set in the environment comes last, where it wins."""
    show = f'. launch/settings.sh {chip} && python3 -c "import json, os; print(json.dumps(dict(os.environ)))"'
    mine = {"XLA_FLAGS": "--mine=1", "LIBTPU_INIT_ARGS": "--mine=1", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    told = subprocess.run(["bash", "-euc", show], cwd=ROOT, env={**os.environ, **mine}, capture_output=True, text=True, check=True).stdout
    found = json.loads(told)
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        assert found[name].endswith("--mine=1") and all(flag.startswith("--xla_") for flag in found[name].split()[:-1])
    tpu = chip.startswith("v")
    assert (len(found["LIBTPU_INIT_ARGS"]) > 8) == tpu and (len(found["XLA_FLAGS"]) > 8) == (not tpu and chip != "cpu")


def test_an_unknown_chip_is_refused():
    ended = subprocess.run(["bash", "-c", ". launch/settings.sh h300 || exit 7"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 7 and "chip 'h300' is not known; known are " + ", ".join(CHIPS) in ended.stderr


def test_every_recipe_is_described():
    told = (LAUNCH / "README.md").read_text()
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([\w.]+)`", told, re.MULTILINE))
    assert {Path(file).stem for file in files} == {*RECIPES, "settings"}
