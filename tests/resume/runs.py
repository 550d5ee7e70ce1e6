"""Runs of the public command line on very small models, for tests that start, stop and kill them."""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts.make_tiny_checkpoint import make_llama, make_llava, make_pictures
from scripts.online_demo import make_sums, make_words

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds of one run; the machine may be busy

# Saves and evaluations fall on the same steps, the reference columns of training come in two parts, the last step is no fifth one.
SETTINGS = {
    "setup": "",
    "data.batch_size": 4,
    "train.steps": 22,
    "train.eval_every": 5,
    "checkpoint.every": 5,
    "checkpoint.export": False,
}

# Four updates a rollout, of which every one may be the last before a save.
ONLINE = {
    "algorithm.reward_funcs": ("tests.resume.runs:length",),
    "algorithm.reward_weights": (),
    "algorithm.beta": 0.1,
    "algorithm.kl_target": 0.5,  # the coefficient and the running moments are moved on by every rollout
    "algorithm.standardize_rewards": True,
    "data.max_length": 24,
    "generation.max_new_tokens": 4,
    "generation.batch_size": 16,
    "checkpoint.every": 3,
    "log.every": 1,
    "log.completions": 0,
}

# As `python -m aligner.main`, on a machine without PyTorch: transformers then starts seconds sooner.
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('aligner.main', run_name='__main__')"


@functools.cache
def demo() -> Path:
    """A folder with `model` and `data` (160 training rows, 8 held-out ones), made once for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="aligner-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_llava(folder / "model", vocab_size=384, hidden_size=32, layers=1, heads=2, kv_heads=2,
               vision_hidden_size=16, vision_layers=2, vision_heads=2)  # fmt: skip
    make_pictures(folder / "data", n_train=160, n_heldout=8)
    return folder


@functools.cache
def sums() -> Path:
    """A folder with `model`, a Llama of thirty-odd words, and `data` (100 sums)."""
    folder = Path(tempfile.mkdtemp(prefix="aligner-sums-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_llama(folder / "model", tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1)
    make_sums(folder / "data", scored=3)
    return folder


def length(prompts: list, completions: list[str], **columns: list) -> list[float]:
    """A reward that differs among answers and prompts."""
    return [float(len(text)) - 0.1 * len(prompt[0]["content"]) for prompt, text in zip(prompts, completions)]


def dpo() -> tuple[str, dict[str, object]]:
    """(--config, settings) of a run on pairs about pictures."""
    folder = demo()
    data = {f"data.{split}.path": folder / "data" / f"{file}.jsonl" for split, file in (("train", "train"), ("eval", "heldout"))}
    return "configs/dpo_llava.py:tiny", SETTINGS | {"model.path": folder / "model"} | data


def ppo() -> tuple[str, dict[str, object]]:
    """The same of an online run: PPO on sums."""
    folder = sums()
    data = {f"data.{split}.path": folder / "data" / "train.jsonl" for split in ("train", "eval")}
    return "configs/ppo_llama3.py:tiny", SETTINGS | ONLINE | {"model.path": folder / "model"} | data


def arguments(workdir: Path, settings: Mapping[str, object] | None = None, recipe: Callable = dpo) -> list[str]:
    """The command line for a run; `settings` are keys of the config without "config."."""
    config, given = recipe()
    changes = given | dict(settings or {})
    return [f"--config={config}", f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changes.items())]


def start(
    workdir: Path, settings: Mapping[str, object] | None = None, devices: int = 1, recipe: Callable = dpo, **environment: str
) -> subprocess.Popen:
    """Start a run; what it tells goes to WORKDIR.log, newest run last."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "COVERAGE"))},
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **environment,
    }
    with log_of(workdir).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments(workdir, settings, recipe)],
            cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def start_two(workdir: Path, settings: Mapping[str, object] | None = None) -> list[subprocess.Popen]:
    """Start a run in two processes of four devices each, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    world = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(workdir, settings, 4, **world, JAX_PROCESS_ID=str(rank)) for rank in (0, 1)]


def log_of(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".log")


def complete(workdir: Path, settings: Mapping[str, object] | None = None, devices: int = 1, recipe: Callable = dpo) -> str:
    """Run to the end; what this run told."""
    before = log_of(workdir).stat().st_size if log_of(workdir).exists() else 0
    code = start(workdir, settings, devices, recipe).wait(TIMEOUT)
    told = log_of(workdir).read_text()[before:]
    assert code == 0, told
    assert "Traceback" not in told, told
    return told


def stop(
    workdir: Path,
    moment: Callable[[Path], bool],
    number: signal.Signals,
    delay: float = 0.0,
    settings: Mapping[str, object] | None = None,
    devices: int = 1,
    recipe: Callable = dpo,
) -> int:
    """Start a run and send it a signal `delay` seconds after `moment(workdir)` has come; its exit status, negative for a signal."""
    return meddle(workdir, moment, lambda process: process.send_signal(number), delay, settings, devices, recipe)


def meddle(
    workdir: Path,
    moment: Callable[[Path], bool],
    act: Callable[[subprocess.Popen], None],
    delay: float = 0.0,
    settings: Mapping[str, object] | None = None,
    devices: int = 1,
    recipe: Callable = dpo,
) -> int:
    """Start a run and do something to it `delay` seconds after `moment(workdir)` has come; its exit status, negative for a signal."""
    process = start(workdir, settings, devices, recipe)
    try:
        until = time.monotonic() + TIMEOUT
        while not moment(workdir):
            assert process.poll() is None, "the run ended before the moment came:\n" + log_of(workdir).read_text()
            assert time.monotonic() < until, "the moment never came:\n" + log_of(workdir).read_text()
            time.sleep(0.001)
        time.sleep(delay)
        act(process)
        return process.wait(TIMEOUT)
    finally:
        if process.poll() is None:
            process.kill()


# ---- moments


def preparing(workdir: Path) -> bool:
    """The reference columns are being computed, and no part of them is there."""
    return (workdir / "reference").exists()


def prepared_in_part(workdir: Path) -> bool:
    return any((workdir / "reference").glob("*/part-*.npz"))


def step(number: int) -> Callable[[Path], bool]:
    """The step has been logged."""

    def moment(workdir: Path) -> bool:
        path = workdir / "metrics.jsonl"
        return path.exists() and f'{{"step": {number}, "split": "train"' in path.read_text()

    return moment


def wrote(rollout: int) -> Callable[[Path], bool]:
    """The answers of an online run's rollout are there, and nothing has been learnt from them yet, or little."""
    return lambda workdir: (workdir / "completions" / f"{rollout:06d}.parquet").exists()


def saving(number: int) -> Callable[[Path], bool]:
    """A checkpoint of the step or a later one is being written and not complete."""

    def moment(workdir: Path) -> bool:
        try:
            names = [path.name for path in (workdir / "checkpoints").iterdir()]
        except FileNotFoundError:
            return False
        return any(not name.isdigit() and name.split(".")[0].isdigit() and int(name.split(".")[0]) >= number for name in names)

    return moment


def saved(number: int) -> Callable[[Path], bool]:
    """The checkpoint of the step is whole."""
    return lambda workdir: (workdir / "checkpoints" / str(number)).exists()


def evaluating(number: int) -> Callable[[Path], bool]:
    """The step has been logged and is being saved, its evaluation has not been logged."""

    def moment(workdir: Path) -> bool:
        path = workdir / "metrics.jsonl"
        return step(number)(workdir) and f'{{"step": {number}, "split": "eval"' not in path.read_text()

    return moment


# ---- what runs leave


def records(workdir: Path, split: str) -> list[dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["split"] == split]


def same_numbers(ours: Path, theirs: Path, tolerance: float) -> None:
    """Every step once, the same examples, and losses, log-probabilities and gradient norms within a relative tolerance."""
    for split in ("train", "eval"):
        found, wanted = records(ours, split), records(theirs, split)
        assert [r["step"] for r in found] == [r["step"] for r in wanted]
        for a, b in zip(found, wanted):
            assert a.get("example_ids_hash") == b.get("example_ids_hash")
            for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
                if name in b:
                    assert abs(a[name] - b[name]) <= tolerance * abs(b[name]), (split, b["step"], name, a[name], b[name])
