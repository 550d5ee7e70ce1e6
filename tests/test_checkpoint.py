"""Checkpoints: what is saved comes back, and what was harmed since is known and not used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import checkpoint, seal
from aligner.state import TrainState, abstract
from aligner.types import UserError


def state(step: int) -> TrainState:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jnp.arange(4096.0) + step
    tree = TrainState(jnp.int32(step), {"kernel": leaf}, {"mu": -leaf}, jax.random.key(7), {}, jnp.int32(0))
    return jax.device_put(tree, place)


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


def test_written_again_after_it_was_torn(saved):
    largest(saved / "checkpoints" / "2").unlink()
    restored(saved)
    with checkpoint.open_checkpoints(saved, keep=2) as checkpoints:
        checkpoint.save(checkpoints, state(2), {"seen": 22})
    assert restored(saved) == (2, 2.0, 22)


def test_without_checksums(saved):
    """A kill between a save and its checksums leaves a good checkpoint."""
    (saved / seal.FOLDER / "2.json").unlink()
    assert restored(saved) == (2, 2.0, 2)
    np.testing.assert_equal(checkpoint.steps(saved), [1, 2])
