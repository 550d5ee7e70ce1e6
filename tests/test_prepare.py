"""Columns computed once: complete, kept in parts, and taken up again where a kill left them."""

import jax.numpy as jnp
import numpy as np
import pytest

from aligner import prepare
from aligner.stopping import Stopped

ROWS = 23
KEPT = np.array([0, 2, 3, 5, 7, 8, 9, 11, 13, 17, 20, 22])  # the others were dropped
SIZE = 2  # examples of a batch; five batches and two empty rows


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(prepare, "BATCHES_PER_PART", 2)


class Source:
    """Batches of row ids, and how often each was asked for and computed."""

    def __init__(self, fail_at=None):
        self.ids = np.append(KEPT, [-1, -1]).reshape(-1, SIZE, 1).astype(np.int32)
        self.computed, self.fail_at = [], fail_at

    def batches(self):
        for ids in self.ids:
            yield {"example_id": jnp.asarray(ids)}

    def column(self, batch):
        self.computed.append(batch["example_id"][0, 0].item())
        if len(self.computed) == self.fail_at:
            raise KeyboardInterrupt
        ids = batch["example_id"].astype(jnp.float32)
        return {"example_id": batch["example_id"], "reference_logps": jnp.stack([-ids, ids + 0.5], axis=-1)}

    def run(self, folder, check_stop=lambda: None):
        return prepare.compute_columns(self.column, self.batches, len(self.ids), ROWS, folder, "reference", check_stop)["reference_logps"]


def check(column):
    assert column.shape == (ROWS, 2) and column.dtype == np.float32
    np.testing.assert_array_equal(column[KEPT], np.stack([-KEPT, KEPT + 0.5], axis=-1))
    assert np.isnan(np.delete(column, KEPT, axis=0)).all()


def test_every_kept_row_has_its_value(tmp_path):
    source = Source()
    check(source.run(tmp_path / "a"))
    assert len(source.computed) == 7 and len(list((tmp_path / "a").iterdir())) == 4


def test_a_second_run_computes_nothing(tmp_path):
    Source().run(tmp_path)
    again = Source()
    check(again.run(tmp_path))
    assert again.computed == []


@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_at_any_batch_it_goes_on_with_the_first_missing_part(tmp_path, moment):
    with pytest.raises(KeyboardInterrupt):
        Source(fail_at=moment).run(tmp_path)
    done = (moment - 1) // 2 * 2  # batches in whole parts
    (tmp_path / "part-000002-000004.tmp99").write_bytes(b"half a file")
    again = Source()
    check(again.run(tmp_path))
    assert len(again.computed) == 7 - done


def test_a_missing_part_in_the_middle(tmp_path):
    Source().run(tmp_path)
    sorted(tmp_path.glob("*.npz"))[1].unlink()
    again = Source()
    check(again.run(tmp_path))
    assert again.computed == [7, 9]


def test_stopping(tmp_path):
    calls = []

    def check_stop():
        calls.append(1)
        if len(calls) == 4:
            raise Stopped

    source = Source()
    with pytest.raises(Stopped):
        source.run(tmp_path, check_stop)
    assert len(source.computed) == 3 and len(list(tmp_path.glob("*.npz"))) == 1


def test_fingerprint():
    parts = dict(weights="w", rows="r", dtype="bfloat16", columns=("a",), shape=(1, 2, 3))
    first = prepare.fingerprint(**parts)
    assert first == prepare.fingerprint(**dict(reversed(parts.items()))) and len(first) == 16
    assert len({prepare.fingerprint(**{**parts, key: "other"}) for key in parts} | {first}) == len(parts) + 1


@pytest.mark.parametrize("harm", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: whole[:200] + bytes([whole[200] ^ 8]) + whole[201:]])
def test_a_damaged_part_is_computed_again(tmp_path, harm):
    Source().run(tmp_path)
    part = sorted(tmp_path.glob("*.npz"))[1]
    part.write_bytes(harm(part.read_bytes()))
    again = Source()
    check(again.run(tmp_path))
    assert again.computed == [7, 9]
