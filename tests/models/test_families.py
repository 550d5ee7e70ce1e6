"""Models as functions: what they read from configs, how inputs become batches, what they refuse. PyTorch's numbers are in tests/golden."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.likelihood import make_likelihood
from aligner.models import SUPPORTED, decoder, from_hf, pictures, towers, vision
from aligner.models.layers import ACTIVATIONS, REMAT, LayerNorm, Linear, RMSNorm, recomputed
from aligner.sharding import tree_paths
from aligner.types import Media, UserError
from tests.invariance import step
from tests.models import tiny


def shapes(model):
    return {path: leaf.shape for path, leaf in tree_paths(jax.eval_shape(model.init, jax.random.key(0))).items()}


def test_the_tree_is_hugging_faces(family):
    found = shapes(family.model)
    prefix = "language_model/" if family.model.media else ""
    expected = {
        "model/embed_tokens/embedding": (62, 16), "model/layers/self_attn/q_proj/kernel": (2, 16, 24),
        "model/layers/self_attn/k_proj/bias": (2, 12), "model/layers/self_attn/o_proj/kernel": (2, 24, 16),
        "model/layers/mlp/down_proj/kernel": (2, 24, 16), "model/layers/input_layernorm/scale": (2, 16), "model/norm/scale": (16,),
        "lm_head/kernel": (16, 62),
    }  # fmt: skip
    assert {path: found.get(prefix + path) for path in expected} == expected
    if family.model.media:
        assert found["vision_tower/vision_model/embeddings/patch_embedding/kernel"] == (4, 4, 3, 12)
        assert found["vision_tower/vision_model/encoder/layers/layer_norm1/scale"] == (3, 12)
        assert found["multi_modal_projector/linear_1/kernel"] == (12, 16)


def test_tied_heads_read_the_embedding():
    model = from_hf(tiny.llama_config(tie_word_embeddings=True))
    assert not any("lm_head" in path for path in shapes(model))
    params = tiny.perturbed(model)
    head = model.head(params)
    assert head.transposed and head.weight is params["model"]["embed_tokens"]["embedding"]
    assert model.conversion.tied == (("lm_head.weight", "model.embed_tokens.weight"),)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda: tiny.llama_config(hidden_act="tanh"), "hidden_act 'tanh' of the llama config is not supported"),
        (lambda: tiny.llava_config(vision=dict(hidden_act="tanh")), "hidden_act 'tanh' of the vision config"),
        (lambda: unknown_rope(), "rope_type 'mystery' is not supported"),
        (lambda: other_family(), "model_type 'lama' is not supported; nearest: 'llama'"),
        (lambda: other_tower(), "llava checkpoint with a 'vit' part is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_hf(change())


def unknown_rope():
    config = tiny.llama_config()
    config.rope_parameters = {"rope_type": "mystery", "rope_theta": 1.0}
    return config


def other_family():
    config = tiny.llama_config()
    config.model_type = "lama"
    return config


def other_tower():
    from transformers import ViTConfig

    config = tiny.llava_config()
    config.vision_config = ViTConfig(**tiny.VISION)
    return config


def test_supported_names_are_those_that_are_made():
    assert {"llama", "llava"} <= {*SUPPORTED} and len({*SUPPORTED}) == len(SUPPORTED)
    assert {name: tiny.family(name).model.family for name in ("llama", "llava")} == {"llama": "llama", "llava": "llava"}


# ---- inputs


def test_text_inputs():
    ids = [[0, 5, 6], [7, 8, 9]]
    batch = decoder.text_batch({"input_ids": ids, "attention_mask": [[0, 1, 1], [1, 1, 1]]})
    np.testing.assert_array_equal(batch["segment_ids"], [[0, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2]] * 2)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(batch))
    given = decoder.text_batch({"input_ids": ids, "position_ids": [[0, 0, 1], [0, 1, 2]]})
    np.testing.assert_array_equal(given["positions"], [[0, 0, 1], [0, 1, 2]])
    np.testing.assert_array_equal(given["segment_ids"], 1)


def test_images_are_dealt_to_the_rows_that_hold_their_placeholders():
    P = 2
    tokens = np.array([[9, 9, 1, 9, 9], [1, 2, 3, 4, 5], [1, 9, 9, 2, 3]])
    pixels = np.arange(3.0)[:, None, None, None] * np.ones((3, 4, 4, 3))
    found = deal(tokens, pixels, P)
    np.testing.assert_array_equal(found["image_mask"], [[True, True], [False, False], [True, False]])
    np.testing.assert_array_equal(found["pixel_values"][:, :, 0, 0, 0], [[0, 1], [0, 0], [2, 0]])
    np.testing.assert_array_equal(found["media_index"], [[0, 1, -1, 2, 3], [-1] * 5, [-1, 0, 1, -1, -1]])


@pytest.mark.parametrize("tokens,images", [([[9, 9, 9]], 2), ([[9, 9, 1, 1]], 2), ([[9, 9, 9, 9]], 1), ([[9, 1, 9, 9]], 1)])
def test_images_that_do_not_fit_their_placeholders(tokens, images):
    with pytest.raises(UserError, match=rf"{images} images, which take \[2.*\] placeholders, do not fit placeholder counts"):
        deal(np.array(tokens), np.zeros((images, 4, 4, 3)), 2)


def deal(tokens, pixels, features):
    text = dict.fromkeys(("tokens", "segment_ids", "role"), tokens)
    return pictures.deal(text, {"pixel_values": pixels.transpose(0, 3, 1, 2)}, Media(9, features, 4, 4))


@pytest.mark.slow
def test_llava_inputs_take_channels_first(llava):
    ids = np.full((1, 6), 5)
    ids[0, 1:5] = tiny.IMAGE
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8))
    batch = llava.model.inputs({"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels})
    np.testing.assert_allclose(batch["pixel_values"][0, 0], pixels[0].transpose(1, 2, 0), rtol=1e-6)
    assert "pixel_values" not in llava.model.inputs({"input_ids": ids})
    logits = llava.model.logits(tiny.as_arrays(llava.params), {"input_ids": ids, "pixel_values": pixels})
    assert logits.shape == (1, 6, 62) and np.isfinite(logits).all()


# ---- media


def test_merge_puts_features_where_the_index_says():
    x, features = jnp.zeros((2, 4, 3)), jnp.arange(1.0, 13).reshape(2, 2, 3)
    index = jnp.array([[-1, 0, 1, -1], [1, -1, -1, 0]])
    expected = np.zeros((2, 4, 3))
    expected[0, 1], expected[0, 2], expected[1, 0], expected[1, 3] = features[0, 0], features[0, 1], features[1, 1], features[1, 0]
    np.testing.assert_array_equal(decoder.merge(x, features, index), expected)


def test_what_stands_in_an_empty_image_slot_does_not_matter(llava):
    batch = tiny.make_batch(llava, columns=False)
    noisy = dict(batch, pixel_values=np.where(batch["image_mask"][..., None, None, None], batch["pixel_values"], 7.0))
    assert (noisy["pixel_values"] != batch["pixel_values"]).any()

    def hidden(batch):
        model, params = llava.model, llava.params
        return model.apply(params, batch, features=model.encode(params, batch)).hidden

    run = tiny.quick(hidden)
    np.testing.assert_array_equal(run(tiny.as_arrays(batch)), run(tiny.as_arrays(noisy)))


def tower():
    config = towers.read(tiny.llava_config().vision_config)
    params = tiny.family("llava").params["vision_tower"]["vision_model"]
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    return config, params, pixels


@pytest.mark.parametrize("layers", [(-1,), (-2,), (0,), (1,), (-2, 1), (0, -1)], ids=str)
def test_tower_layers(layers):
    """Index 0 is the embeddings after their norm, i the output of layer i - 1, negative ones count from the end."""
    config, params, pixels = tower()
    whole = vision.VisionTransformer(config, collect=True)
    x, last, states = tiny.quick(lambda params, pixels: whole.apply({"params": params}, pixels))(params, pixels)
    every = [x, *states]
    np.testing.assert_array_equal(last, every[-1])
    asked = tiny.quick(lambda params, pixels: vision.hidden_states(config, params, pixels, layers))(params, pixels)
    for found, index in zip(asked, layers):
        np.testing.assert_allclose(found, every[index], atol=1e-5)


@pytest.mark.parametrize("layers", [-1, -2, 0, 1, [-2, 1]], ids=str)
def test_trained_layers_are_those_that_a_gradient_reaches(layers):
    model = from_hf(tiny.llava_config(vision_feature_layer=layers))
    params = tiny.perturbed(model)
    pixels = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 8, 8, 3)), jnp.float32)
    loss = lambda params: jnp.sum(model.encode(params, {"pixel_values": pixels}) ** 2)
    grads = tiny.quick(jax.grad(loss))(params)["vision_tower"]["vision_model"]
    reached = [bool(np.asarray(row).any()) for row in grads["encoder"]["layers"]["mlp"]["fc1"]["kernel"]]
    said = model.trained_layers["vision_tower/vision_model/encoder/layers"]
    assert reached == [i < said for i in range(3)]
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["post_layernorm"]))


def test_select_strategy():
    params, pixels = tiny.family("llava").params, {"pixel_values": tower()[2][:, None]}
    default, full = (from_hf(tiny.llava_config(vision_feature_select_strategy=how)) for how in ("default", "full"))
    assert (default.media.features, full.media.features) == (4, 5)
    ours, theirs = (tiny.quick(model.encode)(params, pixels) for model in (default, full))
    np.testing.assert_allclose(ours, theirs[:, 1:], atol=1e-6)


# ---- layers


def test_rms_norm_rounds_before_the_weight():
    """As Llama does: in float32, rounded to bfloat16, then multiplied."""
    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((5, 8), (8,)))
    wide = x.astype(jnp.float32)
    rounded = (wide / jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(RMSNorm(1e-5).apply({"params": {"scale": scale}}, x), rounded * scale)


def test_a_norms_weight_has_a_gradient_that_is_rounded_once():
    """In bfloat16 the parts of the sum over tokens were rounded each; they are added as they are."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.standard_normal((2, 512, 4)), jnp.bfloat16) for _ in range(2))
    norm = lambda scale: RMSNorm(1e-5).apply({"params": {"scale": scale}}, x)
    found = jax.vjp(norm, jnp.ones(4, jnp.bfloat16))[1](g)[0]
    parts = np.float64(norm(jnp.ones(4, jnp.bfloat16))) * np.float64(g)
    np.testing.assert_array_equal(found, jnp.asarray(parts.sum((0, 1)), jnp.bfloat16))


def test_of_what_is_recomputed_only_the_arguments_are_kept():
    """Also where no loop lies between the two passes: XLA would find the second computation equal to the first."""
    gated = lambda w, x: (x * jnp.tanh(x) * jnp.exp(-x * x)) @ w
    weights = [jnp.asarray(w, jnp.float32) for w in np.random.default_rng(0).standard_normal((8, 64, 64)) / 8]
    x = jnp.ones((512, 64)) / 3

    def program(gate):
        total = lambda weights: jnp.sum(functools.reduce(lambda x, w: gate(w, x), weights, x))
        return jax.jit(jax.grad(total), compiler_options=tiny.FULL).lower(weights).compile()

    plain, ours = program(gated), program(functools.partial(recomputed, gated))
    kept = lambda compiled: compiled.memory_analysis().temp_size_in_bytes / x.nbytes
    assert kept(plain) > 2 * len(weights) > kept(ours)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours(weights), plain(weights))


def test_rotation_is_computed_once_for_all_layers():
    """Not in every pass that reads it, for every head, as XLA puts a program without a loop together."""
    model = from_hf(tiny.llama_config())
    params, batch = tiny.perturbed(model), model.inputs({"input_ids": np.arange(6)[None]})
    with jax.set_mesh(step.one_device()):
        total = lambda params: jnp.sum(model.apply(params, batch).hidden)
        compiled = jax.jit(jax.grad(total), compiler_options=tiny.FULL).lower(params).compile()
    assert compiled.as_text().count(" cosine(") == 1


@pytest.mark.parametrize("dtype,remat,loops", [("bfloat16", "none", False), ("bfloat16", "full", True), ("float32", "none", False)])
def test_layers_are_a_loop_but_on_a_cpu_that_keeps_all(dtype, remat, loops):
    model = from_hf(tiny.llama_config())
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny.perturbed(model))
    batch = model.inputs({"input_ids": np.arange(6)[None]})
    loss = lambda params: jnp.sum(model.apply(params, batch, remat=remat).hidden.astype(jnp.float32))
    looped = jax.jit(jax.grad(loss)).lower(params)  # without a mesh nobody knows what the program is for
    with jax.set_mesh(step.one_device()):
        lowered = jax.jit(jax.grad(loss)).lower(params)
    assert "stablehlo.while" in looped.as_text()
    assert ("stablehlo.while" in lowered.as_text()) == loops
    if not loops:
        largest = lambda x: np.abs(np.float32(x)).max()
        exact = jax.jit(jax.grad(loss))(jax.tree.map(lambda leaf: leaf.astype("float32"), params))
        # a few roundings of bfloat16, 0.4 % each; or, of what all but cancels, no further from each other than from float32
        near = lambda x, y, exact: largest(x - y) <= max(0.02 * largest(y), largest(y - exact))
        alike = jax.tree.map(near, lowered.compile()(params), looped.compile()(params), exact)
        assert all(jax.tree.leaves(alike)), alike


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_layer_is_computed_for_what_is_read(layers):
    """Where layers are no loop; states and gradients are the same."""
    model = from_hf(tiny.llama_config(num_hidden_layers=layers, intermediate_size=512))
    params, rng = tiny.perturbed(model), np.random.default_rng(0)
    batch = model.inputs({"input_ids": rng.integers(3, 60, (2, 32))})
    columns = jnp.asarray([[30, 3, 3, 8], [0, 31, 17, 18]])
    asked = lambda params: model.apply(params, {**batch, "read": columns}).hidden
    taken = lambda params: jnp.take_along_axis(model.apply(params, batch).hidden, columns[..., None], axis=1)
    with jax.set_mesh(step.one_device()):
        gradient = lambda states: tiny.quick(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(states(params))))).lower(params)
        one, other = gradient(asked), gradient(taken)
        found, expected = (lowered.compile()(params) for lowered in (one, other))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    products = (3 * 512 + 4 * 6) * 16 * 2 * 3  # of a token behind the attention, forward and twice backward
    saved = (other.cost_analysis()["flops"] - one.cost_analysis()["flops"]) / (2 * 28)
    assert products < saved < 1.1 * products


def test_layer_norm():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.standard_normal((5, 8)), rng.standard_normal(8), rng.standard_normal(8)
    found = LayerNorm(1e-3).apply({"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}, jnp.float32(x))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_linear_reads_whatever_stands_in_the_tree():
    """Only `init` fixes shapes: a leaf of another one is not refused."""
    x = jnp.ones((2, 4), jnp.bfloat16)
    y = Linear(7, True).apply({"params": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 5.0)


def test_activations():
    from math import erf

    x = np.linspace(-3, 3, 13)
    gelu_tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = {
        "silu": x / (1 + np.exp(-x)), "swish": x / (1 + np.exp(-x)), "gelu": x * 0.5 * (1 + np.array([erf(v / 2**0.5) for v in x])),
        "gelu_pytorch_tanh": gelu_tanh, "gelu_new": gelu_tanh, "quick_gelu": x / (1 + np.exp(-1.702 * x)), "relu": np.maximum(x, 0),
    }  # fmt: skip
    assert ACTIVATIONS.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("part", ["tower", "decoder"])
def test_remat_keeps_less(llava, part):
    """What the backward pass is handed grows from full over context to dots to none."""
    model, batch = llava.model, tiny.as_arrays(tiny.make_batch(llava, columns=False))

    def kept(remat):
        encode = lambda params: model.encode(params, batch, remat=remat)
        decode = lambda params: model.apply(params, batch, remat=remat).hidden
        run = {"tower": encode, "decoder": decode}[part]
        residuals = jax.eval_shape(lambda params: jax.vjp(run, params)[1], llava.params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    sizes = [kept(remat) for remat in ("full", "context", "dots", "none")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4 and set(REMAT) == {"full", "context", "dots", "none"}


def test_the_likelihood_passes_remat_on_to_both_parts(llava):
    """Compiled scratch would tell at full size; here the rematerialised calls are counted in the program."""
    batch = tiny.as_arrays(tiny.make_batch(llava))

    def calls(remat):
        likelihood = make_likelihood(llava.model, answers=2, remat=remat)
        program = jax.make_jaxpr(jax.grad(lambda params: likelihood(params, batch).logps.sum()))(llava.params)
        return str(program).count("checkpoint[") + str(program).count("remat2[")

    assert calls("full") >= calls("none") + 2  # some cheap parts are always computed again


def test_configs_keep_only_what_changes_the_computation():
    config = tiny.family("llava").model.config
    assert config.features == 4 and dataclasses.is_dataclass(config.text_config)
    assert config.text_config.head_dim == 6 and config.vision_feature_layer == (-2,)
