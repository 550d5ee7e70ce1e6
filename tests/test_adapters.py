"""Adapters in the tree: which leaves train, what the step makes of them, and bad settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aligner import algorithms, convert, lora, metrics, sharding, state
from aligner.check import check_config
from aligner.convert import peft
from aligner.likelihood import cast, make_likelihood
from aligner.models import from_hf
from aligner.train_step import jit, make_train_step
from aligner.trees import flatten, unflatten
from aligner.types import UserError
from tests.invariance.step import keep_gradient, one_device, put
from tests.models import text_configs, tiny, vision_configs

BAR = 1e-5


def configure(**changes):
    return tiny.config(**{"lora__rank": 3, "lora__alpha": 6.0, "reference__kind": "base", **changes})


def start(f, config, mesh, disturb=0.0):
    """(adapters, trainable, base) as `aligner.run` makes them; `disturb` moves what trains away from its beginning."""
    params = jax.device_put(tiny.as_arrays(f.params, config.model.dtype), sharding.param_shardings(f.params, f.model.sharding_rules, mesh))
    adapters = lora.plan(config, f.model, params)
    params = lora.attach(params, adapters, {}, key=jax.random.key(0), dtype="float32", rules=f.model.sharding_rules, mesh=mesh)
    trainable, base = lora.split(params, adapters=adapters)
    rng = np.random.default_rng(5)
    noise = lambda leaf: disturb * rng.standard_normal(leaf.shape).astype(leaf.dtype)
    return adapters, jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + noise(leaf), leaf.sharding), trainable), base


def step(f, config, mesh=None, disturb=0.1):
    """(metrics, gradients by tree path) of one step."""
    mesh = sharding.make_mesh(mesh) if mesh else one_device()
    with jax.set_mesh(mesh):
        adapters, trainable, base = start(f, config, mesh, disturb)
        saved = {path: leaf for path, leaf in flatten(trainable).items() if path in adapters.saved}
        fixed = {"base": base, "initial": cast(unflatten(saved), config.model.dtype)}
        algorithm = algorithms.make(config, f.model)
        train_state = state.create(trainable, keep_gradient(), algorithm.carry, 0, mesh)
        function = make_train_step(
            algorithm, keep_gradient(), dtype=config.model.dtype, accumulate=config.train.accumulate, max_grad_norm=0.0
        )
        rows = put(tiny.make_batch(f, columns=False), mesh)
        after, found = jit(function).lower(train_state, fixed, rows).compile(compiler_options=tiny.QUICK)(train_state, fixed, rows)
    found.pop("example_ids")
    return metrics.values(found), {path: np.asarray(leaf) for path, leaf in flatten(after.opt_state).items()}


def test_only_adapters_train_and_have_optimizer_state(family):
    config = configure(lora__variant="dora")
    adapters, trainable, base = start(family, config, one_device())
    names = {path.rpartition("/")[2] for path in flatten(trainable)}
    assert names == {"lora_a", "lora_b", "magnitude"}
    assert all(re.match(lora.DECODER, path) for path in flatten(trainable)), "the tower has none unless asked for"
    assert len(adapters.rank) == 7
    moments = optax.adamw(1e-3).init(trainable)[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(trainable)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    whole = flatten(family.params)
    layers, ranks = tiny.TEXT["num_hidden_layers"], 3
    kernels = [whole[f"{module}/kernel"].shape for module in adapters.rank]
    assert count == sum(layers * (ranks * (rows + columns) + columns) for _, rows, columns in kernels)
    assert jax.tree.structure(lora.merge(lora.combine(trainable, base))) == jax.tree.structure(family.params)


@pytest.mark.slow
@pytest.mark.parametrize("variant,dtype", [("lora", "bfloat16"), ("rslora", "float32"), ("dora", "bfloat16")])
def test_the_base_is_the_reference_at_step_0(llama, dtype, variant):
    found, gradients = step(llama, configure(lora__variant=variant, model__dtype=dtype, lora__dropout=0.3), disturb=0.0)
    if (variant, dtype) == ("lora", "bfloat16"):
        assert found["loss"] == np.float32(np.log(2)) and found["rewards/margins"] == 0, "exactly"
    assert found["loss"] == pytest.approx(np.log(2), rel=1e-3 if variant == "dora" else 1e-6)
    assert all(gradient.any() == (not path.endswith("lora_a")) for path, gradient in gradients.items()), "lora_b is zero, lora_a is not"


def test_the_reference_has_no_adapters_and_the_leaves_that_train_whole_as_they_were(llava):
    config = configure(lora__modules_to_save=("multi_modal_projector/.*",))
    adapters, trainable, base = start(llava, config, one_device())
    assert set(adapters.saved) == {p for p in flatten(llava.params) if p.startswith("multi_modal_projector/")}
    initial = unflatten({path: leaf for path, leaf in flatten(trainable).items() if path in adapters.saved})
    rows = put(tiny.make_batch(llava, columns=False), one_device())
    likelihood = jax.jit(make_likelihood(llava.model, 2), compiler_options=tiny.QUICK)
    expected = likelihood(tiny.as_arrays(llava.params), rows).logps
    found = likelihood(lora.without_adapters({"base": base, "initial": initial}), rows).logps
    np.testing.assert_array_equal(found, expected)
    moved = start(llava, config, one_device(), disturb=0.3)[1]
    assert np.abs(likelihood(lora.combine(moved, base), rows).logps - expected).max() > 0.1


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.slow
def test_split_and_devices_change_nothing(llava, variant):
    family, changes = llava, dict(lora__variant=variant, lora__targets=("all-linear",), lora__modules_to_save=(".*/norm/.*",))
    expected, gradients = step(family, configure(**changes))
    assert abs(expected["loss"] - np.log(2)) > 0.005
    for other in (dict(train__accumulate=4), dict(train__remat="full", mesh=dict(data=2, fsdp=2, tensor=2))):
        mesh = other.pop("mesh", None)
        found, again = step(family, configure(**changes, **other), mesh)
        assert found["loss"] == pytest.approx(expected["loss"], rel=BAR)
        for path, gradient in gradients.items():
            assert np.abs(again[path] - gradient).max() <= BAR * max(np.abs(gradient).max(), 1e-3), path


def test_adapters_are_laid_out_like_their_kernels(llama):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    _, trainable, _ = start(llama, configure(lora__rank=2, lora__variant="dora"), mesh)
    layers = trainable["model"]["layers"]
    specs = lambda leaves: [tuple(leaves[name].sharding.spec) for name in lora.TRAINED]
    assert specs(layers["self_attn"]["q_proj"]) == [(None, "fsdp", None), (None, None, "tensor"), (None, "tensor")]
    assert specs(layers["mlp"]["down_proj"]) == [(None, "tensor", None), (None, None, "fsdp"), (None, "fsdp")]


@pytest.mark.slow
def test_dropout_is_a_function_of_the_key_and_off_without_one(llava):
    config = configure(lora__dropout=0.5, lora__targets=("all-linear",))
    adapters, trainable, base = start(llava, config, one_device(), disturb=0.3)
    plain = start(llava, configure(lora__targets=("all-linear",)), one_device(), disturb=0.3)
    assert plain[0].rank == adapters.rank
    rows = put(tiny.make_batch(llava, columns=False), one_device())
    likelihood = jax.jit(make_likelihood(llava.model, 2), compiler_options=tiny.QUICK)
    logps = lambda key, base=base: np.asarray(likelihood(lora.combine(trainable, base), rows, key).logps)
    keys = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(logps(keys[0]), logps(keys[0]))
    assert np.abs(logps(keys[0]) - logps(keys[1])).max() > 1e-2
    np.testing.assert_array_equal(logps(None), logps(None, plain[2]))
    np.testing.assert_array_equal(logps(keys[0], plain[2]), logps(None, plain[2]))


@pytest.mark.slow
def test_dropout_reaches_the_layers_that_look_at_pictures():
    """Llama 3.2 Vision's, which are applied apart from the decoder's own."""
    hf = vision_configs.hf_config("mllama", vision_configs.CASES["mllama"][1])
    model = from_hf(hf)
    params, batch = tiny.perturbed(model), model.inputs(vision_configs.batch("mllama", hf, [0, 2]))
    adapters = lora.plan(configure(lora__dropout=0.5, lora__targets=(".*cross_layers/.*",)), model, params)
    key = jax.random.key(0)
    params = lora.attach(tiny.as_arrays(params), adapters, {}, key=key, dtype=jnp.float32, init="kaiming", rules=model.sharding_rules)
    leaves = flatten(params)
    leaves |= {path: jnp.ones_like(leaf) for path, leaf in leaves.items() if path.endswith("lora_b")}
    hidden = lambda key: model.apply(unflatten(leaves), batch, features=model.encode(params, batch), key=key).hidden
    plain, one, other = map(hidden, (None, jax.random.key(1), jax.random.key(2)))
    assert np.abs(plain - one).max() > 1e-3 and np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, hidden(jax.random.key(1)))


def test_dropout_scales_what_it_keeps_and_differs_by_layer():
    """The mean over draws is what no dropout gives, and two layers of a stack draw apart."""
    import flax.linen as nn

    from aligner.models.layers import Linear, rngs, stack

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = Linear(64, name="up")(x)
            return x, y

    a = jnp.broadcast_to(jnp.eye(64), (2, 64, 64))
    up = {"kernel": 0 * a, "lora_a": a, "lora_b": a, "lora_scale": jnp.ones(2), "lora_dropout": jnp.full(2, 0.25)}
    _, y = stack(Layer, 2, "full", jnp.float32)().apply({"params": {"up": up}}, jnp.ones((100, 64)), rngs=rngs(jax.random.key(0)))
    assert set(np.unique(np.asarray(y).round(5))) == {0.0, np.float32(1.33333)}
    assert abs(float(y.mean()) - 1) < 0.02 and bool((y[0] != y[1]).any())


@pytest.mark.slow
def test_a_layer_without_an_adapter_stays_as_it_is(llama):
    config = configure(lora__layers_to_transform=(1,), lora__variant="dora")
    _, gradients = step(llama, config)
    for path, gradient in gradients.items():
        assert not gradient[0].any() and gradient[1].any(), path
    adapters, trainable, base = start(llama, config, one_device(), disturb=0.3)
    merged = flatten(lora.merge(lora.combine(trainable, base)))
    before = flatten(llama.params)
    for module in adapters.rank:
        np.testing.assert_array_equal(merged[f"{module}/kernel"][0], before[f"{module}/kernel"][0])
        assert np.abs(merged[f"{module}/kernel"][1] - before[f"{module}/kernel"][1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_merged_is_unmerged(llava, variant):
    family = llava
    config = configure(lora__variant=variant, lora__targets=("all-linear",))
    _, trainable, base = start(family, config, one_device(), disturb=0.3)
    params = lora.combine(trainable, base)
    rows = put(tiny.make_batch(family, columns=False), one_device())
    likelihood = jax.jit(make_likelihood(family.model, 2), compiler_options=tiny.QUICK)
    expected = np.asarray(likelihood(params, rows).logps)
    found = np.asarray(likelihood(lora.merge(params), rows).logps)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_frozen_part_gets_no_adapters(llava):
    config = configure(lora__targets=("all-linear",), optim__freeze=("vision_tower/.*",))
    found = lora.plan(config, llava.model, llava.params)
    assert not any(module.startswith("vision_tower") for module in found.rank)
    assert any(module.startswith("multi_modal_projector") for module in found.rank)


def test_a_router_gets_an_adapter_only_where_it_is_named():
    """PEFT could not load the adapter of a Qwen2-MoE: the router is no linear map there."""
    model = from_hf(text_configs.hf_config("qwen2_moe", **text_configs.CASES["qwen2_moe"][0]))
    params = convert.abstract_params(model)
    planned = lambda *targets: lora.plan(configure(lora__targets=targets), model, params).rank
    router = "model/layers/mlp/gate"
    assert router not in planned() and router not in planned("all-linear") and router in planned(".*/gate")
    assert "model/layers/mlp/shared_expert/gate_proj" in planned() and planned().keys() == planned("all-linear").keys()


BAD = [
    (dict(lora__rank=0, lora__targets=(".*q_proj",)), r"config\.lora\.targets .* but config\.lora\.rank is 0"),
    (dict(lora__rank=0, lora__adapter="somewhere"), r"config\.lora\.adapter .* but config\.lora\.rank is 0"),
    (dict(lora__rank=0, lora__variant="dora", reference__kind="copy"), r"config\.lora\.variant .* but config\.lora\.rank is 0"),
    (dict(lora__rank=-4), r"config\.lora\.rank is -4; it must be positive"),
    (dict(lora__variant="rs-lora"), r"config\.lora\.variant is 'rs-lora'.*nearest: 'rslora'"),
    (dict(lora__init="pissa"), r"config\.lora\.init is 'pissa'"),
    (dict(lora__alpha=0.0), r"config\.lora\.alpha is 0"),
    (dict(lora__dropout=1.0), r"config\.lora\.dropout is 1"),
    (dict(lora__targets=("(",)), r"no regular expression"),
    (dict(lora__rank=0), r'reference\.kind is "base".*config\.lora\.rank is 0'),
    (dict(reference__model="other"), r'reference\.kind is "base".*config\.reference\.model is set'),
    (dict(quant__base="nf5"), r"config\.quant\.base is 'nf5'.*nearest: 'nf4'"),
    (dict(lora__rank=0, reference__kind="copy", quant__base="nf4"), r"quantised kernels cannot train"),
]  # fmt: skip


@pytest.mark.parametrize("epochs", [float("inf"), float("nan"), 0.0])
def test_epochs_have_an_end(epochs):
    """Without steps they say how many there are: an infinite number of them was a traceback."""
    config = configure(model__path="x", train__steps=None, train__epochs=epochs)
    config.data.train.path = "y"
    with pytest.raises(UserError, match=r"config\.train\.epochs is .*; it must be above 0 and finite"):
        check_config(config, one_device())


@pytest.mark.parametrize("changes,words", BAD, ids=lambda value: str(value)[:40])
def test_bad_settings(changes, words):
    config = configure(model__path="x", **changes)
    config.data.train.path = "y"
    with pytest.raises(UserError, match=words):
        check_config(config, one_device())


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(lora__targets=("q_proj",)), r"'q_proj'.*'model/layers/self_attn/q_proj'.*'\.\*q_proj'.*down_proj, gate_proj"),
        (dict(lora__targets=("model/layers/self_atn/.*",)), r"there is, for example, 'model/layers/self_attn/"),
        (dict(lora__targets=("lm_head",)), r"heads train whole, by config\.lora\.modules_to_save"),
        (dict(lora__modules_to_save=("projector/.*",)), r"config\.lora\.modules_to_save has 'projector/\.\*', which matches no parameter"),
        (dict(lora__layers_to_transform=(5,)), r"layers_to_transform is \(5,\), but .* has 2 layers"),
        (dict(lora__layers_to_transform=(-1,)), r"layers_to_transform is \(-1,\); layers are counted from 0"),  # no layer had an adapter
        (dict(optim__freeze=("model/.*",)), r"covers every module"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_do_not_fit_the_model(llama, changes, words):
    with pytest.raises(UserError, match=words):
        peft.plan(configure(**changes), llama.model, convert.abstract_params(llama.model))
