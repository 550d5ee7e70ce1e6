"""Decoding against the full forward pass, refill, stops, and what an answer may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import sharding
from aligner.data.layout import pair_row
from aligner.data.templates import Encoded
from aligner.generation.engine import Prompt, bucket, check_growth, generate_all, make_engine
from aligner.generation.sampling import Sampling
from aligner.likelihood import make_likelihood
from aligner.models import from_hf
from aligner.models.pictures import Picture, fill, whole
from aligner.types import UserError
from tests.models import text_configs, tiny

KEY = jax.random.key(3)


def prompts_of(f: tiny.Family) -> list[Prompt]:
    return [Prompt(p.prompt, pictures_of(f, p)) for p in f.pairs]


def pictures_of(f: tiny.Family, pair: Encoded) -> list[Picture]:
    return whole({"pixel_values": [tiny.pixels(name, f.model).transpose(2, 0, 1) for _, name in pair.media]}, f.model.media.features) if pair.media else []


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "mmca"))])
def test_logps_are_those_of_the_full_forward_pass(name):
    """Also after a refill: 24 answers go through 8 rows; the three answers of a prompt share its columns in the full pass."""
    f = tiny.family(name)
    engine = make_engine(f.model, Sampling(max_new_tokens=7, temperature=1.0, stop_tokens=(2, 5, 11, 23, 40, 44)), rows=8)
    found = generate_all(engine, engine.prepare(f.params), prompts_of(f), KEY, n=3)
    assert len({len(answer.tokens) for answers in found for answer in answers}) > 2
    images = max(len(pair.media) for pair in f.pairs)
    rows = []
    for pair, answers in zip(f.pairs, found):
        encoded = Encoded(pair.prompt, tuple(answer.tokens for answer in answers), pair.media)
        rows.append(pair_row(encoded, 64, 21, images, f.model.media))
        if pair.media:
            fill(rows[-1], pictures_of(f, pair), f.model.media)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    scores = tiny.quick(make_likelihood(f.model, 3))(tiny.as_arrays(f.params), batch)
    for row, answers in zip(np.asarray(scores.tokens["logp"]), found):
        sampled = np.concatenate([answer.logps for answer in answers])
        np.testing.assert_allclose(row[: len(sampled)], sampled, atol=1e-4)


GOES_WELL = [pytest.param("longrope", (9, 12), 8, marks=pytest.mark.slow), pytest.param("dynamic", (2, 3), 16, marks=pytest.mark.slow)]
GROWING = [*GOES_WELL, ("longrope", (4, 9), 8), ("dynamic", (9, 5), 16)]


@pytest.mark.parametrize(("kind", "lengths", "limit"), GROWING)
def test_texts_that_grow_past_what_changes_their_rotation(kind, lengths, limit):
    """A prompt that is past a long rope's change-over from the start goes well; one that would cross it would be read with stale memory."""
    rope = {"longrope": text_configs.CASES["phi3"][0], "dynamic": dict(rope_parameters=text_configs.DYNAMIC, max_position_embeddings=16)}[kind]
    model = from_hf(text_configs.hf_config("phi3" if kind == "longrope" else "llama", **rope))
    params = tiny.perturbed(model)
    engine = make_engine(model, Sampling(max_new_tokens=8, temperature=0), rows=2)
    rng = np.random.default_rng(0)
    prompts = [Prompt(rng.integers(3, 60, length).astype(np.int32)) for length in lengths]
    if min(lengths) <= limit < max(lengths) + 8:
        with pytest.raises(UserError, match=f"beyond {limit} tokens .* 8 new ones"):
            generate_all(engine, engine.prepare(params), prompts, KEY)
        return
    found = generate_all(engine, engine.prepare(params), prompts, KEY)
    for prompt, (answer,) in zip(prompts, found):
        logits = model.logits(params, {"input_ids": np.concatenate([prompt.tokens, answer.tokens])[None]})[0, len(prompt.tokens) - 1 : -1]
        assert np.argmax(logits, -1).tolist() == answer.tokens.tolist()


@pytest.mark.parametrize(("family", "positions"), [("gpt2", dict(n_positions=16)), ("opt", dict(max_position_embeddings=16))])
def test_texts_that_grow_past_the_positions_that_were_learned(family, positions):
    """Beyond them lies NaN: what was drawn from it was the first token again and again, and nothing was said."""
    model = from_hf(text_configs.hf_config(family, **positions))
    check_growth(model, np.array([3, 8]), 8)
    with pytest.raises(UserError, match=r"learned 16 positions, and a prompt of 9 tokens and 8 new ones .* at most 16"):
        check_growth(model, np.array([3, 9]), 8)


@pytest.mark.slow
def test_an_answer_depends_neither_on_neighbours_nor_on_the_number_of_rows(llama):
    prompts = prompts_of(llama)
    sampling = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, repetition_penalty=1.2, stop_tokens=(2,))
    engines = [make_engine(llama.model, sampling, rows=rows) for rows in (3, 8)]
    params = engines[0].prepare(llama.params)
    found = [generate_all(engine, params, prompts, KEY, n=2) for engine in engines]
    alone = generate_all(engines[0], params, prompts[4:5], KEY, n=2, ids=[4])
    for place, answers in enumerate(found[0]):
        for sample, answer in enumerate(answers):
            assert answer.tokens.tolist() == found[1][place][sample].tokens.tolist()
    assert [a.tokens.tolist() for a in alone[0]] == [a.tokens.tolist() for a in found[0][4]]
    assert found[0][0][0].tokens.tolist() != found[0][0][1].tokens.tolist()


def test_programs_are_as_many_as_buckets_of_lengths(llama):
    engine = make_engine(llama.model, Sampling(max_new_tokens=4, temperature=0), rows=4)
    params = engine.prepare(llama.params)
    rng = np.random.default_rng(0)
    for length in (3, 5, 8, 12, 16, 7):
        generate_all(engine, params, [Prompt(rng.integers(3, 60, length).astype(np.int32))] * 4, KEY)
    assert engine.programs == 3  # start, fill, decode


def test_buckets_waste_at_most_half():
    for size in range(1, 400):
        assert size <= bucket(size) <= max(16, 1.5 * size)
        assert size <= bucket(size, 8) <= max(16, 9 / 8 * size)
    assert len({bucket(size, 8) for size in range(513, 1025)}) == 8


@pytest.mark.slow
def test_a_stop_string_ends_an_answer_and_belongs_to_it(llama):
    text = lambda tokens: "".join(f"<{token}>" for token in tokens)
    prompts = prompts_of(llama)[:3]
    plain = make_engine(llama.model, Sampling(max_new_tokens=40, temperature=0), rows=2)
    params = plain.prepare(llama.params)
    free = generate_all(plain, params, prompts, KEY)
    string = text(free[0][0].tokens[20:22])  # across two tokens, beyond the first look
    engine = make_engine(llama.model, Sampling(max_new_tokens=40, temperature=0, stop_strings=(string,)), rows=2, detokenize=text)
    for (wanted,), (found,) in zip(free, generate_all(engine, params, prompts, KEY)):
        end = next((n for n in range(41) if string in text(wanted.tokens[:n])), None)
        assert found.tokens.tolist() == wanted.tokens[:end].tolist() and found.stopped == (end is not None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh(llama, mesh):
    prompts = prompts_of(llama)
    engine = make_engine(llama.model, Sampling(max_new_tokens=5, temperature=0), rows=8)
    wanted = generate_all(engine, engine.prepare(llama.params), prompts, KEY)
    mesh = sharding.make_mesh(mesh)
    laid_out = jax.device_put(tiny.as_arrays(llama.params), sharding.param_shardings(llama.params, llama.model.sharding_rules, mesh))
    with jax.set_mesh(mesh):
        engine = make_engine(llama.model, Sampling(max_new_tokens=5, temperature=0), rows=8)
        found = generate_all(engine, engine.prepare(laid_out), prompts, KEY)
    assert [a.tokens.tolist() for (a,) in found] == [a.tokens.tolist() for (a,) in wanted]


def test_no_prompts_no_answers(llama):
    engine = make_engine(llama.model, Sampling(), rows=2)
    assert generate_all(engine, {}, [], jax.random.key(0)) == [] and jnp.zeros(1).shape
