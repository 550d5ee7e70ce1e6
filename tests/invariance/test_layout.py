"""How a batch is laid out, split and computed changes neither loss nor gradients."""

import functools
import re

import jax
import numpy as np
import pytest

from aligner import ahead, logprobs, sharding
from aligner.models import from_hf
from aligner.types import UserError
from tests.everyday import everyday
from tests.invariance.step import ZERO_GRADIENT, Result, loss_and_gradients, one_device
from tests.models import tiny

BAR = 1e-5  # max|a - b| / max|b| per tensor, in float32
CUBE = dict(data=2, fsdp=2, tensor=2)

# name -> (options of the batch, options of the config, mesh, positions in a chunk of the head)
VARIANTS = {
    "accumulation": ({}, dict(train__accumulate=4), None, None),
    "padding": (dict(more=(7, 5, 1), empty_rows=4), {}, None, None),
    "duplicated prompt": (dict(shared=False), {}, None, None),
    "packing": (dict(per_row=2), {}, None, None),
    "chunks": ({}, {}, None, 3),
    "remat full": ({}, dict(train__remat="full"), None, None),
    "remat dots": ({}, dict(train__remat="dots"), None, None),
    "remat context": ({}, dict(train__remat="context"), None, None),
    "8 devices": ({}, {}, CUBE, None),
    "all at once": (
        dict(shared=False, per_row=2, more=(3, 1, 0), empty_rows=4), dict(train__accumulate=2, train__remat="full"), CUBE, 5,
    ),
}  # fmt: skip


def compute(name: str, batch=(), config=(), mesh=None, freeze=()) -> Result:
    f = tiny.family(name)
    changes = dict(algorithm__label_smoothing=0.1, optim__freeze=freeze, **dict(config))
    devices = sharding.make_mesh(mesh) if mesh else one_device()
    return loss_and_gradients(f, tiny.make_batch(f, **dict(batch)), tiny.config(**changes), devices)


baseline = functools.cache(compute)


def assert_same(found: Result, expected: Result, layout_metrics=("num_tokens",), bar=BAR) -> None:
    assert found.gradients.keys() == expected.gradients.keys()
    for name in expected.metrics.keys() - set(layout_metrics):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=bar), name
    for path, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        if re.search(ZERO_GRADIENT, path):
            scale = np.abs(expected.gradients[path.replace("k_proj", "q_proj")]).max()
        assert np.abs(found.gradients[path] - gradient).max() <= bar * scale, path


# What differs one by one, where all at once does.
CASES = everyday([(name, variant) for name in ("llama", "llava") for variant in VARIANTS], ("llama", "all at once"), ("llava", "8 devices"))


@pytest.mark.parametrize("name,variant", CASES)
def test_same_loss_and_gradients(name, variant, monkeypatch):
    batch, config, mesh, chunk = VARIANTS[variant]
    expected = baseline(name)
    if chunk:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * tiny.TEXT["vocab_size"] * (2 if mesh else 8))
    found = compute(name, batch, config, mesh)
    assert_same(found, expected)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, sequence=2), dict(data=2, sequence=2, tensor=2)], ids=str)
@pytest.mark.parametrize("name", ["llama", pytest.param("llava", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shared,changes,chunk", [(True, {}, None), pytest.param(False, dict(train__remat="full"), 4, marks=pytest.mark.slow)])
def test_rows_cut_over_devices(name, shared, changes, chunk, mesh, monkeypatch):
    """Columns over the axis `sequence`, whole rows for each of its parts of the heads within attention, the two of keys twice over four."""
    options = dict(shared=shared, per_row=2)
    made = tiny.make_batch(tiny.family(name), **options)
    options["more"] = (made["tokens"].shape[1] % 2, made["score_from"].shape[1] % 2, 0)  # what is odd would stay whole
    expected = baseline(name)
    if chunk:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk * tiny.TEXT["vocab_size"])
    assert_same(compute(name, options, changes, mesh), expected)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [4, 2])
def test_rows_cut_over_devices_take_less_memory_and_work_of_each(keys):
    """Also where two devices share a head of keys; and heads over `tensor` then, where all would else be every device's."""
    sizes = dict(num_attention_heads=8, num_key_value_heads=keys, head_dim=16, hidden_size=64, intermediate_size=256)
    model = from_hf(tiny.llama_config(**sizes))

    def measured(**mesh):
        # with layers as a loop: one CPU's program without one is another than that of several
        axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        config = tiny.config(mesh__data=1, data__batch_size=2, train__remat="dots", **axes)
        step = ahead.make_step(config, model, jax.devices()[: max(mesh.values(), default=1)], ahead.Row(tokens=1024, scored=512))
        program = ahead.compile_step(step)
        sent = ahead.collectives(program.as_text())
        return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["flops"], sent

    (whole, work, _), (part, less, sent) = measured(), measured(sequence=4)
    assert sent["all-to-all"]["times"]
    assert part < 0.4 * whole and less < 0.4 * work, (part / whole, less / work)
    rows = 4 * 2 * 1024 * sizes["num_attention_heads"] * sizes["head_dim"]  # of a layer's queries
    assert measured(tensor=4)[2].get("all-gather", {"bytes": 0})["bytes"] < 3 * rows, "queries are not gathered"


def test_a_mesh_that_cannot_cut_rows_is_refused():
    with pytest.raises(UserError, match=r"tensor x sequence = 8 .* the model has 4, and 2 heads of keys"):
        compute("llama", mesh=dict(data=1, sequence=8))


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_the_baseline_is_no_trivial_one(name):
    """Every leaf that the pairs depend on has a gradient; those that nothing passes through have exactly none."""
    found = baseline(name)
    assert 0.1 < found.metrics["loss"] < 5 and found.metrics["nonfinite"] == 0
    assert 0 < found.metrics["rewards/accuracies"] < 1
    unreached = {path for path, gradient in found.gradients.items() if not gradient.any()}
    assert unreached == ({f"vision_tower/vision_model/post_layernorm/{leaf}" for leaf in ("scale", "bias")} if name == "llava" else set())
    for path, gradient in found.gradients.items():
        if path not in unreached and "vision_tower/vision_model/encoder" in path:
            assert gradient[:2].any() and not gradient[2].any(), path  # the last layer is not run: feature layer -2


def test_a_frozen_part_does_not_change_the_other_gradients():
    whole, part = baseline("llava"), compute("llava", freeze=("vision_tower/.*", "language_model/lm_head/.*"))
    frozen = {path for path in whole.gradients if re.match("vision_tower/|language_model/lm_head", path)}
    assert part.gradients.keys() == whole.gradients.keys() - frozen
    for path, gradient in part.gradients.items():
        np.testing.assert_allclose(gradient, whole.gradients[path], atol=BAR * np.abs(whole.gradients[path]).max(), rtol=0)


def test_the_bar_is_tight():
    found = baseline("llama")
    with pytest.raises(AssertionError):
        assert_same(found._replace(gradients={path: g * (1 + 2e-5) for path, g in found.gradients.items()}), found)
