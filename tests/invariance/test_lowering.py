"""What the compiled DPO step holds: no logits beyond a chunk, and nothing of a frozen tower's backward pass."""

import re

import jax
import jax.numpy as jnp
import pytest

from aligner import likelihood, logprobs, sharding
from aligner.models import from_hf
from tests.invariance.step import build, keep_gradient, one_device, put
from tests.models import tiny

V = 118  # this number and its half, a device's part, are no other size in the program
ROWS, CHUNK = 8, 4


@pytest.fixture(scope="module")
def long_rows():
    """Rows much longer than a chunk."""
    f = tiny.family("llama")
    model = from_hf(tiny.llama_config(vocab_size=V))
    return f._replace(model=model, params=tiny.perturbed(model)), tiny.make_batch(f, more=(60, 53, 0))


def shapes_with_vocabulary(program: str) -> set[tuple[int, ...]]:
    found = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[(\d+(?:,\d+)*)\]", program)}
    return {shape for shape in found if {V, V // 2} & set(shape)}


def compiled_step(f, batch, mesh) -> str:
    with jax.set_mesh(mesh):
        step, state, fixed = build(f, tiny.config(), keep_gradient(), mesh)
        return step.lower(state, fixed, put(batch, mesh)).compile(compiler_options=tiny.QUICK).as_text()


def test_no_logits_beyond_a_chunk(long_rows, monkeypatch):
    """On 2x2x2 devices a part of the batch is two rows; of [B,T,V] and [B,S,V] nothing is left, on no device."""
    f, batch = long_rows
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", CHUNK * V * ROWS // 4)
    shapes = shapes_with_vocabulary(compiled_step(f, batch, mesh))
    logits = {shape for shape in shapes if shape[:-1] == (ROWS // 4, CHUNK)}
    assert logits == {(ROWS // 4, CHUNK, V // 2)}, "the vocabulary is split over the tensor axis"
    size = lambda shape: jnp.prod(jnp.array(shape)).item()
    rest = {shape for shape in shapes - logits if not {16, 8} & set(shape)}  # not the head or the embedding, [D, V] and its parts
    assert all(size(shape) <= ROWS // 4 * CHUNK * V for shape in rest), rest
    assert all(size(shape) <= 16 * V for shape in shapes - logits - rest)


def test_the_search_finds_dense_logits(long_rows, monkeypatch):
    f, batch = long_rows

    def dense(hidden, head, targets, names=()):
        log_p = jax.nn.log_softmax(logprobs.dense_logits(hidden, head))
        logp = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return dict.fromkeys(names, logp)

    monkeypatch.setattr(likelihood, "token_stats", dense)
    scored = batch["score_token"].shape[1]
    assert {(ROWS, scored, V), (ROWS * scored, V)} & shapes_with_vocabulary(compiled_step(f, batch, one_device()))


@pytest.mark.parametrize("freeze", [(), ("vision_tower/.*",)], ids=["trains", "frozen"])
def test_no_backward_pass_through_a_frozen_tower(llava, freeze):
    mesh = one_device()
    with jax.set_mesh(mesh):
        step, state, fixed = build(llava, tiny.config(optim__freeze=freeze), keep_gradient(), mesh)
        names = step.lower(state, fixed, put(tiny.make_batch(llava), mesh)).as_text(debug_info=True)
    assert re.search(r"vision_tower", names)
    assert bool(re.search(r"transpose\([^\"]*vision_tower", names)) == (not freeze)
