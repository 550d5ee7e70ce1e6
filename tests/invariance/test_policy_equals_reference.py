"""At step 0 the policy is the reference, so DPO's loss is log 2, in bfloat16 too: both must then round alike to the last bit.

The programs are compiled as a run compiles them; the column comes from `run.prepare_columns`, through the folder that it keeps.
"""

import itertools
import math

import jax
import numpy as np
import optax
import pytest

from aligner import algorithms, convert, metrics, run, sharding
from aligner.data import layout, loader
from tests.invariance.step import build, one_device
from tests.models import tiny

CUBE = dict(data=2, fsdp=2, tensor=2)


def dataset(f: tiny.Family, shared: bool) -> loader.Dataset:
    """The family's pairs as the loader would present them, among rows that were dropped."""
    rows = tiny.make_batch(f, shared=shared, columns=False)
    ids = rows["example_id"][:, 0].tolist()
    shape = (rows["tokens"].shape[1], rows["score_token"].shape[1], rows["image_mask"].shape[1] if f.model.media else 0)

    def row(number):
        return {name: array[number] for name, array in rows.items()} if number >= 0 else layout.empty_row(*shape, f.model.media)

    return loader.Dataset(
        name="data.train", size=len(ids), row_ids=np.asarray(ids), rows_total=40, dropped={}, report=(), fingerprint=f"shared {shared}",
        shape=shape, examples=1, answers=2, fill=1.0, row=row, workers=1,
    )  # fmt: skip


def loss_at_step_0(name, kind, shared, folder, monkeypatch, mesh=None, **changes):
    f, mesh = tiny.family(name), sharding.make_mesh(mesh) if mesh else one_device()
    freeze = ("vision_tower/.*",) if f.model.media else ()
    changes = dict(model__dtype="bfloat16", reference__kind=kind, optim__freeze=freeze, data__shared_prompt=shared) | changes
    config = tiny.config(**changes)
    monkeypatch.setattr(convert, "fingerprint", lambda disk: "these weights")
    with jax.set_mesh(mesh):
        step, state, fixed = build(f, config, optax.sgd(0.1), mesh, max_grad_norm=1.0)
        reference = run.load_reference(config, f.model, state.trainable, fixed["base"], None, None, mesh)
        trained = sharding.tree_paths(state.trainable)
        assert all(leaf.dtype == "bfloat16" for path, leaf in sharding.tree_paths(reference).items() if path in trained)
        rows, algorithm = dataset(f, shared), algorithms.make(config, f.model)
        columns = run.prepare_columns(config, folder, algorithm, reference, rows, None, mesh, lambda: None)
        assert columns.keys() == (set() if kind == "copy" else {"reference_logps"})
        batch = next(loader.batches(rows, config.data.batch_size, seed=0, shuffle=True))
        _, found = step(state, fixed, run.put(batch, columns, mesh))
    found.pop("example_ids")
    values = metrics.values(found)
    assert values["grad_norm"] > 0.01  # the gradient is there though the rewards are zero
    return values


def assert_log_2(values):
    assert abs(values["loss"] - math.log(2)) <= 1e-6
    assert values["rewards/margins"] == pytest.approx(0, abs=1e-6) and values["rewards/accuracies"] == 0


EVERYDAY = [("llama", "precomputed", True)]
OTHERS = [case for case in itertools.product(("llama", "llava"), ("precomputed", "copy"), (True, False)) if case not in EVERYDAY]
CASES = EVERYDAY + [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize("name,kind,shared", CASES)
def test_loss_is_log_2(name, kind, shared, tmp_path, monkeypatch):
    assert_log_2(loss_at_step_0(name, kind, shared, tmp_path, monkeypatch))


OTHERWISE = [dict(mesh=CUBE), dict(train__accumulate=4), dict(train__remat="full"), dict(train__remat="dots")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["precomputed", "copy"])
@pytest.mark.parametrize("changes", OTHERWISE, ids=str)
def test_also_laid_out_otherwise(kind, changes, tmp_path, monkeypatch):
    assert_log_2(loss_at_step_0("llava", kind, True, tmp_path, monkeypatch, **changes))
