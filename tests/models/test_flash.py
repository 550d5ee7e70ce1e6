"""The kernels against the reference: values and gradients, in Pallas' interpreter, and that compilers take them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import sharding
from aligner.data.templates import Encoded
from aligner.likelihood import cast, make_likelihood
from aligner.models import from_hf
from aligner.models.attention import BACKEND, Spec, attention, chosen, dense, fused
from aligner.models.layers import REMAT
from aligner.types import UserError
from tests.everyday import everyday
from tests.invariance import step
from tests.models import tiny

HEADS, GROUPS, WIDTH = 4, 2, 16


def rows(length):
    """Two rows: packed prompts with two answers each and padding on the right; one with padding on the left."""
    arrays = {name: np.zeros((2, length), np.int32) for name in ("segment_ids", "role", "positions")}

    def put(row, start, prompt, answers, segment):
        for role, count in enumerate((prompt, *answers)):
            here = slice(start, start + count)
            arrays["segment_ids"][row, here], arrays["role"][row, here] = segment, role
            arrays["positions"][row, here] = np.arange(count) + (prompt if role else 0)
            start += count
        return start

    end = put(0, 0, length // 6, (length // 5, length // 8), 1)
    put(0, end, length // 4, (length // 20, length // 10), 2)
    put(1, length // 16, length // 3, (length // 3, length // 4), 1)
    return Spec(**{name: jnp.asarray(array) for name, array in arrays.items()})


def compare(length, window, softcap, dtype="float32", bar=1e-5, spec=None):
    spec = rows(length) if spec is None else spec
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, length, heads, WIDTH)), dtype)
    q, k, v, weight = draw(HEADS), draw(GROUPS), draw(GROUPS), draw(HEADS)
    real = (spec.segment_ids > 0)[..., None, None]

    def total(q, k, v):
        out = jnp.where(real, attention(q, k, v, dense(spec, window), scale=0.3, softcap=softcap), 0)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    found = {}
    for backend in ("reference", "pallas"):
        with BACKEND(backend):
            found[backend] = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    for expected, got in zip(*map(jax.tree.leaves, found.values())):
        expected, got = (np.asarray(x, np.float32) for x in (expected, got))
        np.testing.assert_allclose(got, expected, atol=bar * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("window,softcap", [(None, None), (17, 3.0)])
def test_one_block(window, softcap):
    compare(100, window, softcap)


@pytest.mark.slow
@pytest.mark.parametrize("length", [200, 640])
@pytest.mark.parametrize("window,softcap", [(None, None), (None, 3.0), (50, None), (150, 3.0)])
def test_many_blocks(length, window, softcap):
    compare(length, window, softcap)


@pytest.mark.slow
def test_bfloat16():
    compare(640, None, None, "bfloat16", bar=2e-2)


@pytest.mark.parametrize("window,softcap", everyday([(None, None), (300, 3.0)], (None, None)))
def test_blocks_that_are_seen_whole(monkeypatch, window, softcap):
    """Their tokens are not compared; the result is the same."""
    from aligner.models import flash

    monkeypatch.setattr(flash, "SIZES", (128,))
    asked, logits = [], flash._logits
    monkeypatch.setattr(flash, "_logits", lambda static, whole, *rest: asked.append(whole) or logits(static, whole, *rest))
    length = 384
    ones, count = jnp.ones((2, length), jnp.int32), jnp.broadcast_to(jnp.arange(length), (2, length))
    compare(length, window, softcap, spec=Spec(ones, role=(count >= 140).astype(jnp.int32), positions=count))
    assert set(asked) == {True, False}


def test_blocks_of_which_nothing_is_seen_are_passed_over():
    """The answers of a long prompt: a third of the causal half is neither one's. Only what is not seen whole has its tokens compared."""
    from aligner.models.flash import _tokens

    length, block = 1536, 128
    role = np.repeat([0, 1, 2], 512)[None]
    positions = np.concatenate([np.arange(1024), np.arange(512, 1024)])[None]
    blocks = lambda segment, window=None: np.asarray(_tokens(*map(jnp.asarray, (segment, role, positions)), window, block).live)[0]
    live, whole = (lambda *spec: blocks(*spec) > 0), (lambda *spec: blocks(*spec) == 2)
    own, answers = 4 * 5 // 2, 4 * 4
    assert live(np.ones((1, length), int)).sum() == 3 * own + 2 * answers
    assert live(np.repeat([1, 2, 3], 512)[None]).sum() == 3 * own
    assert live(np.repeat([1, 1, 0], 512)[None]).sum() == 2 * own + answers
    assert whole(np.ones((1, length), int)).sum() == 3 * (own - 4) + 2 * answers
    assert whole(np.repeat([1, 2, 3], 512)[None]).sum() == 3 * (own - 4)
    padded = np.where(np.arange(length) % 512 == 0, 0, 1)[None]  # the first block of each part is not full
    assert whole(padded).sum() == 3 * 3 + 2 * 3 * 3
    assert whole(np.ones((1, length), int), 384).sum() == 3 * 5 + 2 * 3, "up to two blocks back"
    assert live(np.ones((1, length), int), 1).sum() < live(np.ones((1, length), int), 600).sum() < 3 * own + 2 * answers


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "sequence": 2}], ids=str)
def test_a_step_of_dpo(llama, mesh):
    """Prompts shared by their answers, one device and eight, also where the heads' number is not divided by the mesh's."""
    batch, config = tiny.make_batch(llama), tiny.config()
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    expected = step.loss_and_gradients(llama, batch, config, step.one_device())
    with BACKEND("pallas"):
        found = step.loss_and_gradients(llama, batch, config, sharding.make_mesh(mesh, devices))
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    for path, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[path], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=path)


def test_what_it_cannot_do_is_refused_or_left_to_the_reference():
    spec, x = dense(rows(20)), jnp.ones((2, 20, 2, 4))
    run = lambda **options: jax.eval_shape(lambda: attention(x, x, x, spec.replace(**options), scale=1.0))
    with BACKEND("pallas"):
        with pytest.raises(UserError, match="see each other both ways"):
            run(blocks=jnp.ones((2, 20), jnp.int32))
        with pytest.raises(UserError, match="text and media read apart"):
            run(media=jnp.ones((2, 20), bool))
        with pytest.raises(UserError, match="ALiBi"):
            jax.eval_shape(lambda: attention(x, x, x, spec, scale=1.0, slopes=(0.5, 0.25)))
    with BACKEND("cudnn"), pytest.raises(UserError, match=r"cannot do capped logits, float32 \(but bfloat16\), heads 4 wide"):
        jax.eval_shape(lambda: attention(x, x, x, spec, scale=1.0, softcap=30.0))
    with BACKEND("cudnn"), pytest.raises(UserError, match=r"cannot do heads 4 wide \(but multiples of 8 up to 256\), as is needed"):
        jax.eval_shape(lambda: attention(*[x.astype(jnp.bfloat16)] * 3, spec, scale=1.0))
    with BACKEND("auto"):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda: attention(x, x, x, spec, scale=1.0, slopes=(0.5, 0.25)))())
        assert "pallas_call" in str(jax.make_jaxpr(lambda: attention(x, x, x, spec, scale=1.0))())
    mesh = step.one_device()
    assert chosen(mesh) == "reference"
    with pytest.raises(UserError, match="are for TPUs"):
        chosen(mesh, "pallas")
    with pytest.raises(UserError, match="are for GPUs"):
        chosen(mesh, "cudnn")
    with pytest.raises(UserError, match="must be one of auto, reference, pallas, cudnn"):
        chosen(mesh, "flash")


@pytest.mark.parametrize("name", everyday(("plain", "window", "blocks"), "plain"))
def test_what_cudnn_is_asked_for(monkeypatch, name):
    """On a CPU its kernels cannot run: the same call, made of XLA's products, gives the reference's values and gradients."""
    from aligner.models import attention as module

    spec = rows(40)
    if name == "blocks":  # prompts are read both ways
        spec = spec.replace(blocks=jnp.where(spec.role == 0, spec.segment_ids, 0))
    spec = dense(spec, 17 if name == "window" else None)
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 40, heads, WIDTH)), jnp.bfloat16)
    arrays = draw(HEADS), draw(GROUPS), draw(GROUPS)

    def total(q, k, v):
        out = jnp.where((spec.segment_ids > 0)[..., None, None], attention(q, k, v, spec, scale=0.3), 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    run = lambda: jax.tree.leaves(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays))
    expected = run()
    monkeypatch.setattr(module, "fused", lambda *arguments: fused(*arguments, implementation="xla"))
    with BACKEND("cudnn"):
        found = run()
    for a, b in zip(expected, found, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(b, a, atol=2e-2 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("alone", [False, True])
def test_cudnn_gets_both_passes(monkeypatch, alone):
    """Lowered for a GPU the program asks cuDNN, once forwards and once backwards, and makes no weights [T,T] of its own for any head.

    Rows of one text need no mask either, which would be computed with all its pairs, and with a gradient of its own.
    """
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91002)
    x, keys = (jnp.ones((2, 48, heads, 64), jnp.bfloat16) for heads in (HEADS, GROUPS))
    spec = dense(rows(48)).replace(alone=alone)
    total = lambda q, k, v: jnp.sum(attention(q, k, v, spec, scale=0.125).astype(jnp.float32))
    with BACKEND("cudnn"):
        both = jax.jit(jax.value_and_grad(jax.checkpoint(total, policy=REMAT["context"]), (0, 1, 2)))
        program = both.trace(x, keys, keys).lower(lowering_platforms=("cuda",)).as_text()
    asked = "__cudnn$fmhaSoftmax" if alone else "__cudnn$fmhaScaleBiasSoftmax"
    assert program.count(f"{asked}(") == program.count(f"{asked}Backward(") == 1
    assert "48x48xf32" not in program and f"{HEADS}x48x48" not in program
    assert ("48x48xbf16" in program) == (not alone)


@pytest.mark.parametrize("kind,masked", [("one", False), ("pairs", True), ("packed", True), ("window", True)])
def test_rows_of_one_text_have_no_mask(monkeypatch, llama, kind, masked):
    """With padding behind it a text's tokens see what they see under the mask. Pairs, packed rows and windows keep theirs."""
    from transformers import MistralConfig

    from aligner.models import attention as module

    answers = 2 if kind == "pairs" else 1
    f = llama._replace(pairs=[Encoded(pair.prompt, pair.answers[:answers]) for pair in llama.pairs])
    text = {name: value for name, value in tiny.TEXT.items() if "bias" not in name} | {"head_dim": 8}
    model = from_hf(MistralConfig(**text, sliding_window=9 if kind == "window" else None))
    f = f._replace(model=model, params=tiny.perturbed(model))
    batch = tiny.make_batch(f, per_row=2 if kind == "packed" else 1, columns=False)
    batch = {name: jnp.asarray(np.pad(x, ((0, 0), (0, x.shape[1] % 2))) if x.shape[1] > 2 else x) for name, x in batch.items()}
    params = cast(jax.tree.map(jnp.asarray, f.params), "bfloat16")
    masks = []

    def by_xla(*arrays):
        masks.extend(arrays[3:])
        return fused(*arrays, implementation="xla")

    monkeypatch.setattr(module, "fused", by_xla)
    likelihood = make_likelihood(f.model, answers)
    found = {}
    for backend in ("reference", "cudnn"):
        with BACKEND(backend):
            found[backend] = tiny.quick(jax.grad(lambda p, b: jnp.sum(likelihood(p, b).logps)))(params, batch)
    assert bool(masks) == masked
    for expected, got in zip(*map(jax.tree.leaves, found.values()), strict=True):
        expected, got = (np.asarray(x, np.float32) for x in (expected, got))
        np.testing.assert_allclose(got, expected, atol=5e-2 * max(1, np.abs(expected).max()))


TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from aligner.models.flash import flash
place = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
for dtype, (B, K, G, T, H) in ((jnp.bfloat16, (2, 2, 4, 4096, 128)), (jnp.bfloat16, (1, 2, 1, 1000, 80)), (jnp.float32, (1, 1, 2, 640, 64))):
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k, numbers = array((B, K, G, T, H), dtype), array((B, K, T, H), dtype), array((B, T), jnp.int32)
    total = lambda q, k, v, *rest: jnp.sum(flash(q, k, v, *rest, 512, 30.0).astype(jnp.float32))
    program = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(q, k, k, numbers, numbers, numbers).compile()
    assert program.as_text().count("tpu_custom_call") >= 3
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler, jax[tpu]")
def test_a_tpus_compiler_takes_them():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    told = subprocess.run([sys.executable, "-c", TPU], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and "compiled" in told.stdout, told.stderr[-3000:]
