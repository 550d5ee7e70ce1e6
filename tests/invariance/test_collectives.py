"""What devices send each other in a compiled step: weights in the dtype of the computation, gradients, and nothing of the vocabulary's size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import MixtralConfig

from aligner import ahead, sharding
from aligner.logprobs import TopK, divergence, token_stats
from aligner.losses.partial_distillation import SUPPORTS, likeliest
from aligner.models import from_hf, layers, moe
from aligner.trees import flatten
from aligner.types import Head
from tests.everyday import everyday
from tests.models import tiny

V = 118  # this number and its parts are no other size in the program
ROW = ahead.Row(tokens=44, scored=44)  # per row; no part of V
ROWS = 2  # on each device
PARTS = {V, V // 2}


@pytest.fixture(scope="module")
def model():
    return from_hf(tiny.llama_config(vocab_size=V))


def compiled(model, devices: int, dtype: str = "float32", remat: str = "none", **mesh: int):
    """(step, its program) with as many rows on each device, however many there are."""
    axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    config = tiny.config(data__batch_size=ROWS * devices // mesh.get("tensor", 1), model__dtype=dtype, train__remat=remat, **axes)
    step = ahead.make_step(config, model, jax.devices()[:devices], ROW)
    with jax.set_mesh(step.mesh):
        program = step.program.lower(step.state, step.fixed, step.batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    return step, program


def elements(shape):
    total = 1
    for size in shape:
        total *= size
    return total


MESHES = [dict(data=2, fsdp=2, tensor=2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (dict(data=8), dict(data=1, fsdp=8)))]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.values())))
def test_nothing_of_the_vocabularys_size_is_sent(model, mesh):
    """But the head, the embedding and their gradients, which have the model's width."""
    step, program = compiled(model, 8, **mesh)
    found = ahead.find_collectives(program.as_text())
    width = {model.config.hidden_size // parts for parts in (1, 2, 4, 8)}
    sent = [one for one in found if PARTS & set(one.shape)]
    assert found and all(width & set(one.shape) for one in sent), sent
    positions = ROWS * ROW.scored
    largest = max(elements(leaf.shape) for leaf in jax.tree.leaves(step.params))
    assert all(elements(one.shape) <= max(largest, positions * model.config.hidden_size) for one in found)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_layer_makes_no_row_whole_that_is_cut(model, name):
    """Its columns change places with its heads for attention; all else is of each device's own columns, experts too."""
    sparse = dict(num_local_experts=3, num_experts_per_tok=2)
    family = model if name == "llama" else from_hf(MixtralConfig(**{**tiny.TEXT, **sparse, "vocab_size": V, "rope_parameters": None}))
    _, program = compiled(family, 8, remat="full", data=4, sequence=2)  # with which layers are a loop
    layers = [one for one in ahead.find_collectives(program.as_text()) if one.times > 1]
    assert any(one.kind == "all-to-all" for one in layers)
    assert not [one for one in layers if one.kind == "all-gather" and ROW.tokens in one.shape]


def on_a_mesh(run, sizes, *arguments):
    """(what a jitted function returns, what its devices send); each argument is an array and the mesh axes that it lies along."""
    mesh = sharding.make_mesh(sizes)
    lay = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    with jax.set_mesh(mesh):
        laid = [lay(*argument) for argument in arguments]
        return run(*laid), ahead.find_collectives(run.lower(*laid).compile().as_text())


OF = {
    "tokens": lambda x: likeliest(x, -x, 3, "both"),
    "experts": lambda x: moe.route(moe.ExpertsConfig(V, 3, 8, True), x)[1:],
}


@pytest.mark.parametrize("name", OF)
def test_each_device_finds_the_largest_of_its_own_rows(name):
    mesh = sharding.make_mesh(dict(data=2, fsdp=4))
    logits = jax.ShapeDtypeStruct((8, ROW.tokens, V), "float32", sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(OF[name]).lower(logits).compile()
    assert not ahead.find_collectives(program.as_text())


@pytest.mark.parametrize("of", everyday(SUPPORTS, "both"))
def test_few_tokens_of_a_vocabulary_that_is_cut(of):
    """Divergence and gradients are one device's, and of the vocabulary's size only the head's gradient is sent."""
    width, rng = 16, np.random.default_rng(0)
    hidden, told = (jnp.asarray(rng.normal(size=(8, ROW.tokens, width)), jnp.float32) for _ in range(2))
    weights = [jnp.asarray(rng.normal(size=(width, V)), jnp.float32) for _ in range(2)]

    def loss(hidden, told, ours, theirs):
        found = divergence(hidden, Head(ours), told, Head(theirs), beta=0.3, top_k=TopK(7, of, True))
        return jnp.sum(found["divergence"]) + jnp.sum(found["agreement"])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    expected = run(hidden, told, *weights)
    laid = (hidden, "data"), (told, "data"), *((weight, None, "tensor") for weight in weights)
    found, sent = on_a_mesh(run, dict(data=4, tensor=2), *laid)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    assert sent and all(width in one.shape for one in sent if PARTS & set(one.shape)), sent


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=2, sequence=2, tensor=2)], ids=lambda sizes: "x".join(sizes))
def test_the_head_is_sent_once_however_many_chunks(sizes, transposed):
    """Gathered for either pass, and its gradient added up: not in every turn of their loops. The numbers are one device's, and so are its
    rows or columns: no other has their states."""
    width, rng = 16, np.random.default_rng(0)
    hidden, targets = jnp.asarray(rng.normal(size=(8, ROW.tokens, width)), jnp.float32), jnp.asarray(rng.integers(V, size=(8, ROW.tokens)))
    weight, bias = jnp.asarray(rng.normal(size=(V, width) if transposed else (width, V)), jnp.float32), jnp.ones(V)

    def loss(hidden, weight, bias):
        logp = token_stats(hidden, Head(weight, transposed, bias), targets, chunk=11)["logp"]
        same = divergence(hidden, Head(weight, transposed, bias), -hidden, Head(weight, transposed), chunk=11)["divergence"]
        return jnp.sum(logp) + jnp.sum(same)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    expected = run(hidden, weight, bias)
    laid = (hidden, ("data", "fsdp"), "sequence"), (weight, *("tensor", ("fsdp", "sequence"))[:: 1 if transposed else -1]), (bias, "tensor")
    found, sent = on_a_mesh(run, sizes, *laid)
    heads = [one for one in sent if PARTS & set(one.shape)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    assert heads and not [one for one in heads if one.times > 1], [one for one in heads if one.times > 1]
    assert not [one for one in sent if one.kind == "all-gather" and one not in heads], sent


def test_of_a_table_that_is_cut_only_the_vocabularys_parts_are_sent():
    """Nor all that the batch looks up, however many rows it has. The numbers are one device's."""
    width, rows, rng = 16, 64, np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V + 2, width)), jnp.float32)
    ids, weights = jnp.asarray(rng.integers(V, size=(rows, ROW.tokens))), jnp.asarray(rng.normal(size=(rows, ROW.tokens, width)), jnp.float32)
    embed = layers.Embed(V + 2, width)
    run = jax.jit(jax.grad(lambda table, ids, weights: jnp.sum(jnp.square(embed.apply({"params": {"embedding": table}}, ids)) * weights)))
    expected = run(table, ids, weights)
    laid = (table, ("tensor", "fsdp")), (ids, ("data", "fsdp")), (weights, ("data", "fsdp"))
    found, sent = on_a_mesh(run, dict(data=2, fsdp=2, tensor=2), *laid)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    own = rows // 4 * ROW.tokens * width  # what is looked up in a device's part of the table is added up to this
    assert sent and all(one.shape != table.shape and elements(one.shape) <= own for one in sent), sent


def weak(model, mesh_of):
    """[(devices, operations on one device, {kind: bytes}, step)] with as much work for each device."""
    made = []
    for devices in (1, 2, 4, 8):
        step, program = compiled(model, devices, **mesh_of(devices))
        sent = {kind: entry["bytes"] for kind, entry in ahead.collectives(program.as_text()).items()}
        made.append((devices, program.cost_analysis()["flops"], sent, step))
    return made


@pytest.mark.slow
def test_weak_scaling_with_whole_copies(model):
    """As many operations on each device from one to eight; each sends the gradients, once, and a few numbers."""
    alone, *more = weak(model, lambda devices: dict(data=devices))
    assert not alone[2]
    gradients = ahead.local_bytes(alone[3].state.trainable)
    for devices, flops, sent, step in more:
        assert abs(flops / alone[1] - 1) < 0.02, devices
        assert gradients <= sent.pop("all-reduce") < 1.05 * gradients + 4096, devices
        assert sum(sent.values()) < 4096, (devices, sent)  # the numbers of the examples
        assert ahead.flops(step) == devices * ahead.flops(alone[3])


@pytest.mark.slow
def test_weak_scaling_with_parameters_split(model):
    """Each device gathers every weight for the forward and for the backward pass, and its gradient is summed once, however many there are."""
    alone, *more = weak(model, lambda devices: dict(data=1, fsdp=devices))
    assert not alone[2]
    for devices, flops, sent, step in more:
        leaves = flatten(step.state.trainable)
        split = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values() if any(leaf.sharding.spec))
        assert abs(flops / alone[1] - 1) < 0.05, devices  # norms and the optimizer are split, or not
        gathered = sent.pop("all-gather")
        assert split <= gathered <= 2.2 * split, (devices, gathered / split)
        assert sum(sent.values()) < 1.5 * split, (devices, sent)


# ---- a TPU's own compiler, which unlike a CPU's sends bfloat16 as it is

TPU = """
import json, sys
from aligner import plan
slices = int(sys.argv[1])
devices, _, _ = plan.devices_of("v5e:4x4" if slices == 1 else "v5e:2x4", slices)
from aligner import ahead
from aligner.models import from_hf
from tests.models import tiny
model = from_hf(tiny.llama_config(vocab_size=1536, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
                                  num_key_value_heads=4, head_dim=64, attention_bias=False, mlp_bias=False))
config = tiny.config(mesh__data=slices, mesh__fsdp=-1, data__batch_size=32, model__dtype="bfloat16")
config.train.remat = "full"
step = ahead.make_step(config, model, devices, ahead.Row(tokens=384, scored=384))
found = ahead.find_collectives(ahead.compile_step(step).as_text())
print(json.dumps({"found": found, "split": sum(leaf.size for leaf in __import__("jax").tree.leaves(step.params) if any(leaf.sharding.spec))}))
"""


def needs_tpus_compiler(test):
    reason = "needs the TPU's compiler, jax[tpu]"
    return pytest.mark.slow(pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=reason)(test))


def on_tpus(slices: int):
    """(collectives of a step on sixteen chips, how many parameters are split over them)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XLA_FLAGS")} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TPU, str(slices)]
    told = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    told = json.loads(told.stdout.splitlines()[-1])
    return [ahead.Collective(*one) for one in told["found"]], told["split"]


@needs_tpus_compiler
def test_on_a_tpu_topology():
    """Sixteen chips: weights and nothing else are gathered, in bfloat16; no activation has the vocabulary's size; gradients are scattered.

    The compiler gathers a weight at once: it does not hand its sixteenths around while it multiplies by them (collective-permute).
    """
    found, split = on_tpus(slices=1)
    large = [one for one in found if elements(one.shape) > 4096]
    gathered = [one for one in large if one.kind == "all-gather"]
    assert {one.dtype for one in gathered} == {"bf16"}, gathered
    assert "collective-permute" not in {one.kind for one in large}
    for one in large:
        assert {512, 512 // 16} & set(one.shape), one  # a weight or its gradient, whole or a chip's part of it
        assert 384 not in one.shape, one  # no activation along its columns
    total = sum(one.bytes * one.times for one in gathered)
    assert 2 * split <= total <= 2 * 3.3 * split, total / split  # forward, recomputation, backward


@needs_tpus_compiler
def test_between_two_slices():
    """Over the slow network each chip sends its own part of the gradient, once, and a few numbers; weights are gathered within a slice."""
    found, split = on_tpus(slices=2)
    sent = sum(one.bytes * one.times for one in found if one.kind == "between-slices")
    own = 4 * split / 8  # of eight chips, in float32
    assert own <= sent <= 1.3 * own, sent / own
    gathered = sum(one.bytes * one.times for one in found if one.kind == "all-gather")
    assert 2 * split <= gathered <= 2 * 3.3 * split, gathered / split
