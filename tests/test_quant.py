"""Quantised kernels: error bounds, gradients, memory of a 7B step, and a sharded, scanned model on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from aligner import algorithms, lora, optim, quant, sharding, state
from aligner.likelihood import make_likelihood
from aligner.train_step import jit, make_train_step
from aligner.trees import flatten, unflatten
from tests.everyday import everyday
from tests.invariance.step import one_device, put
from tests.models import tiny


@pytest.fixture(scope="module")
def kernel():
    return jax.random.normal(jax.random.key(0), (3, 128, 48), jnp.float32)


# relative error of a product with normal weights: what rounding to the 16 values, or to 255, of a tile of 64 must give
@pytest.mark.parametrize("kind,low,high", [("nf4", 0.05, 0.11), ("int8", 0.002, 0.01)])
def test_error_of_a_product(kernel, kind, low, high):
    q = quant.quantise(kernel, kind)
    assert q.qvalue.shape == kernel.shape and q.qvalue.dtype == (jnp.uint4 if kind == "nf4" else jnp.int8) and q.scale.shape == (3, 2, 48)
    np.testing.assert_array_equal(quant.dequantise(q, "float32"), qwix.dequantize(q))
    x = jax.random.normal(jax.random.key(1), (7, 128))
    exact = x @ kernel[0]
    error = jnp.linalg.norm(quant.matmul(x, q[0]) - exact) / jnp.linalg.norm(exact)
    assert low < error < high
    worst = jnp.abs(quant.dequantise(q, "float32") - kernel).reshape(3, 2, 64, 48).max(axis=2)
    widest = (0.31 / 2 if kind == "nf4" else 0.5 / 127) * jnp.abs(kernel).reshape(3, 2, 64, 48).max(axis=2)
    assert bool((worst <= widest * 1.01).all()), "no value is further from its weight than half of the widest gap"


def test_widths_that_no_tile_divides():
    assert quant.quantise(jnp.ones((24, 5)), "nf4").scale.shape == (3, 5)  # tiles of 8
    np.testing.assert_allclose(quant.dequantise(quant.quantise(jnp.full((7, 5), 3.0), "int8"), "float32"), 3.0, rtol=0.01)


@pytest.mark.parametrize("kind", quant.KINDS)
@pytest.mark.parametrize("dtype", everyday(["float32", "bfloat16"], "float32"))
def test_gradients_reach_the_input_and_the_adapter_and_not_the_kernel(kernel, kind, dtype):
    q = quant.quantise(kernel[0].astype(dtype), kind)
    weight = quant.dequantise(q, dtype)
    a, b = (0.1 * jax.random.normal(jax.random.key(i), s, dtype) for i, s in ((2, (128, 4)), (3, (4, 48))))
    x, g = jax.random.normal(jax.random.key(4), (5, 128), dtype), jax.random.normal(jax.random.key(5), (5, 48), dtype)

    def loss(x, a, b, kernel, magnitude):
        read = {"lora_a": a, "lora_b": b, "lora_scale": jnp.float32(2), "magnitude": magnitude}.get
        return jnp.sum((lora.adapt(quant.matmul(x, kernel), x, kernel, read, None) * g).astype(jnp.float32))

    for magnitude in (None, jnp.full(48, 9.0, dtype)):
        arguments = (x, a, b), magnitude
        found = jax.grad(lambda t, m: loss(*t, q, m))(*arguments)
        expected = jax.grad(lambda t, m: loss(*t, weight, m))(*arguments)
        for ours, theirs in zip(found, expected):
            np.testing.assert_array_equal(ours, theirs)
    by_kernel = jax.grad(lambda k: loss(x, a, b, k, None), allow_int=True)(q)
    assert not np.asarray(by_kernel.scale, np.float32).any()


def test_the_backward_pass_keeps_the_few_bits_not_the_array(kernel):
    """A scan over layers would otherwise hold every layer's weights at once."""
    q = quant.quantise(kernel[0], "int8")
    _, residuals = quant._forward(jnp.ones((2, 128)), q)
    assert max(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(residuals)) == kernel[0].size


def qlora(**changes):
    return tiny.config(lora__rank=2, lora__alpha=4.0, reference__kind="base", quant__base="nf4", **changes)


@pytest.mark.slow
def test_a_quantised_base_over_a_mesh(llava):
    """The same scores as its dequantised twin on one device; every quantised leaf laid out like the kernel."""
    packed = lora.quantised_kernels(llava.model.conversion, llava.params)
    assert len(packed) == 7 and all(path.startswith("language_model/model/layers/") for path in packed)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    shardings = sharding.param_shardings(llava.params, llava.model.sharding_rules, mesh)
    dense = flatten(jax.device_put(tiny.as_arrays(llava.params), shardings))
    params = {path: quant.quantise_leaf(leaf, "nf4") if path in packed else leaf for path, leaf in dense.items()}
    up = params["language_model/model/layers/mlp/up_proj/kernel"]
    assert tuple(up.qvalue.sharding.spec) == (None, "fsdp", "tensor")
    assert tuple(up.scale.sharding.spec) == (None, None, "tensor"), "a single tile cannot be divided"
    wide = quant.quantise_leaf(jax.device_put(jnp.ones((3, 128, 4)), up.qvalue.sharding), "int8")
    assert tuple(wide.scale.sharding.spec) == (None, "fsdp", "tensor")
    batch = tiny.make_batch(llava, columns=False)
    likelihood = make_likelihood(llava.model, 2, remat="full")
    score = jax.jit(likelihood, compiler_options=tiny.QUICK)
    with jax.set_mesh(mesh):
        found = score(unflatten(params), put(batch, mesh)).logps
    twin = {path: jax.device_get(quant.dequantise(leaf, "float32")) for path, leaf in params.items()}
    expected = score(unflatten(twin), batch).logps
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(expected - score(llava.params, batch).logps).max() > 1e-2


LLAMA_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    head_dim=128, attention_bias=False, mlp_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def step_memory(kind):
    """`memory_analysis` of a compiled DPO step of a 7B Llama with LoRA of rank 16 on all layers, from shapes alone."""
    from aligner.models import from_hf

    model = from_hf(tiny.llama_config(**LLAMA_7B))
    config = tiny.config(lora__rank=16, reference__kind="base", quant__base=kind, model__dtype="bfloat16", train__remat="full")
    abstract = jax.eval_shape(lambda key: jax.tree.map(lambda x: x.astype("bfloat16"), model.init(key)), jax.random.key(0))
    adapters = lora.plan(config, model, abstract)
    packed = lora.quantised_kernels(model.conversion, abstract) if kind else ()

    def build(params):
        leaves = flatten(lora.attach(params, adapters, {}, key=jax.random.key(0), dtype="float32"))
        return unflatten({path: quant.quantise(leaf, kind) if path in packed else leaf for path, leaf in leaves.items()})

    trainable, base = lora.split(jax.eval_shape(build, abstract), adapters=adapters)
    algorithm = algorithms.make(config, model)
    optimizer = optim.make_optimizer(config.optim, optax.constant_schedule(1e-5))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    opt_state = jax.eval_shape(optimizer.init, trainable)
    train_state = state.TrainState(number, trainable, opt_state, key, algorithm.carry, number)
    rows = tiny.Family(model, {}, tiny.family("llama").pairs[:1], None)
    batch = jax.eval_shape(lambda: tiny.as_arrays(tiny.make_batch(rows, columns=False)))
    function = make_train_step(algorithm, optimizer, dtype="bfloat16")
    with jax.set_mesh(one_device()):
        lowered = jit(function, donate_argnums=0).lower(train_state, {"base": base}, batch)
        return lowered.compile().memory_analysis()


@pytest.mark.slow
def test_argument_bytes_of_a_7b_step():
    dense, nf4 = step_memory(""), step_memory("nf4")
    ratio = nf4.argument_size_in_bytes / dense.argument_size_in_bytes
    print(f"arguments {dense.argument_size_in_bytes:,} -> {nf4.argument_size_in_bytes:,} ({ratio:.3f}), "
          f"temporaries {dense.temp_size_in_bytes:,} -> {nf4.temp_size_in_bytes:,}")  # fmt: skip
    assert ratio <= 0.35
    assert nf4.temp_size_in_bytes < 0.6 * dense.argument_size_in_bytes, "the layers' weights are not all dequantised at once"
