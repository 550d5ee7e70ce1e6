"""Checkpoints: what is saved comes back, and what was harmed since is known and not used."""

import concurrent.futures
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import checkpoint, seal
from aligner.state import TrainState, abstract
from aligner.types import SaveError, UserError


def tree(step: int) -> TrainState:
    leaf = jnp.arange(4096.0) + step
    return TrainState(jnp.int32(step), {"kernel": leaf}, {"mu": -leaf}, jax.random.key(7), {}, jnp.int32(0))


def state(step: int) -> TrainState:
    return jax.device_put(tree(step), jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.fixture
def saved(tmp_path):
    """A workdir with the checkpoints of steps 1 and 2."""
    with checkpoint.open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (0, 1, 2):
            checkpoint.save(checkpoints, state(step), {"seen": step})
    return tmp_path


def restored(workdir):
    with checkpoint.open_checkpoints(workdir, keep=2) as checkpoints:
        found, metadata = checkpoint.restore(checkpoints, abstract(state(0)))
    return int(found.step), float(found.trainable["kernel"][0]), metadata["seen"]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_what_the_newest_says_of_itself(saved, tmp_path):
    assert checkpoint.newest(saved) == (2, {"seen": 2})
    (saved / checkpoint.FOLDER / "2" / "_CHECKPOINT_METADATA").write_text('{"custom_')
    assert checkpoint.newest(saved) is None and checkpoint.newest(tmp_path / "none") is None


def test_the_newest_comes_back(saved):
    assert restored(saved) == (2, 2.0, 2)
    assert sorted(path.stem for path in (saved / seal.FOLDER).glob("*.json")) == ["1", "2"]


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_harmed_checkpoint_is_set_aside(saved, caplog, harm):
    path = largest(saved / "checkpoints" / "2")
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    if harm == "lose":
        path.unlink()
    assert restored(saved) == (1, 1.0, 1)
    assert (saved / "torn-checkpoint-2").exists()
    what = {"flip": "has changed since it was written", "cut": f"bytes instead of {len(content)}", "lose": "is missing"}[harm]
    assert f"({path.relative_to(saved / 'checkpoints' / '2')} {'has ' * (harm == 'cut')}" in caplog.text and what in caplog.text


def test_none_left(saved):
    for step in "12":
        largest(saved / "checkpoints" / step).unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
        restored(saved)


def test_a_whole_one_that_cannot_be_read_stays(saved, caplog, monkeypatch):
    """Where memory is too small, say: to set all checkpoints aside would lose the run."""
    def read(*_):
        raise OSError("Cannot allocate memory")

    told = pytest.raises(UserError, match=r"/2 is whole, but cannot be read \(Cannot allocate memory\)")
    with monkeypatch.context() as patch, checkpoint.open_checkpoints(saved, keep=2) as checkpoints, told:
        patch.setattr(checkpoint, "_read", read)
        checkpoint.restore(checkpoints, abstract(state(0)))
    assert not caplog.text and restored(saved) == (2, 2.0, 2)


def test_written_again_after_it_was_torn(saved):
    largest(saved / "checkpoints" / "2").unlink()
    restored(saved)
    with checkpoint.open_checkpoints(saved, keep=2) as checkpoints:
        checkpoint.save(checkpoints, state(2), {"seen": 22})
    assert restored(saved) == (2, 2.0, 22)


def test_a_full_disk(saved, caplog):
    """A save that cannot be written is one sentence, leaves the checkpoints before it good, and the next one goes on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = pytest.raises(UserError, match=r"could not be written to .*: File too large\. The newest whole one .* step 2; make room")
    with said, checkpoint.open_checkpoints(saved, keep=2) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # no file can grow beyond this: to a writer, as a full disk
        try:
            checkpoint.save(checkpoints, state(3), {"seen": 3})
            checkpoint.wait(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in caplog.text
    assert checkpoint.steps(saved) == [1, 2]
    assert restored(saved) == (2, 2.0, 2)
    assert not list((saved / "checkpoints").glob("3*")), "half a checkpoint keeps the room that is missing"
    with checkpoint.open_checkpoints(saved, keep=2) as checkpoints:
        checkpoint.save(checkpoints, state(3), {"seen": 3})
    assert restored(saved) == (3, 3.0, 3)


def test_a_full_disk_is_told_before_the_next_save(saved):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SaveError, match="File too large"), checkpoint.open_checkpoints(saved, keep=2) as checkpoints:
        checkpoint.check(checkpoints)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            checkpoint.save(checkpoints, state(3), {"seen": 3})
            concurrent.futures.wait(checkpoints.last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoint.check(checkpoints)
        raise AssertionError("a save that failed was not told")


def test_without_checksums(saved):
    """A kill between a save and its checksums leaves a good checkpoint."""
    (saved / seal.FOLDER / "2.json").unlink()
    assert restored(saved) == (2, 2.0, 2)
    np.testing.assert_equal(checkpoint.steps(saved), [1, 2])


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(("step", "other"), [(1, 2), (2, 1)])
def test_a_damaged_one_is_not_exported(saved, step, other, sealed):
    """With checksums or, killed before they were noted, without."""
    whole, _ = checkpoint.restore_trainable(saved, step)
    assert whole["kernel"][0] == step
    path = largest(saved / "checkpoints" / str(step) / "trainable")
    path.write_bytes(path.read_bytes()[:100])
    if not sealed:
        (saved / seal.FOLDER / f"{step}.json").unlink()
    what = "has 100 bytes instead of" if sealed else "OUT_OF_RANGE: Error reading"
    with pytest.raises(UserError, match=rf"/checkpoints/{step} is damaged: .*{what}.*; other steps: {other}$"):
        checkpoint.restore_trainable(saved, step)


READER = """
import pathlib, sys
import jax
address, rank, workdir, harm = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from aligner import checkpoint, seal
from aligner.state import abstract
from tests.test_checkpoint import largest, tree

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
lay = lambda leaf: NamedSharding(mesh, PartitionSpec(*["data"] * (leaf.shape == (4096,))))
place = lambda step: jax.jit(lambda: tree(step), out_shardings=jax.tree.map(lay, jax.eval_shape(tree, step)))()
with checkpoint.open_checkpoints(workdir, keep=3) as checkpoints:
    for step in (0, 1, 2):
        checkpoint.save(checkpoints, place(step), {"seen": step})
if rank == "0":
    torn = pathlib.Path(workdir) / "checkpoints" / "2"
    file = largest(torn)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if harm == "unsealed":
        seal.remove(torn)
multihost_utils.sync_global_devices("torn")
with checkpoint.open_checkpoints(workdir, keep=3) as checkpoints:
    found, metadata = checkpoint.restore(checkpoints, abstract(place(0)))
print(int(found.step), float(found.trainable["kernel"].addressable_shards[0].data[0]), metadata["seen"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["sealed", "unsealed"])
def test_two_processes_set_a_torn_checkpoint_aside_once(tmp_path, harm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    said = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=environment)
    arguments = lambda rank: [sys.executable, "-c", READER, address, str(rank), str(tmp_path / "run"), harm]
    processes = [subprocess.Popen(arguments(rank), **said) for rank in (0, 1)]
    try:
        told = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.strip().splitlines()[-1] for out, _ in told] == ["1 1.0 1", "1 2049.0 1"], told
    assert [error.count("cannot be read") for _, error in told] == [1, 0], told
    assert (tmp_path / "run" / "torn-checkpoint-2").exists()
