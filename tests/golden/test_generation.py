"""Greedy answers against `transformers.generate`: the same tokens, with left padding there, stop tokens, several answers, and pictures.

Every day one text family, LLaVA, and a family whose positions turn in rows and columns; the others are slow tests.
"""

import json

import jax
import numpy as np
import pytest

import aligner
from aligner.generation import engine
from aligner.generation.engine import Prompt, generate_all, make_engine
from aligner.generation.sampling import Sampling
from aligner.models.pictures import whole
from aligner.online import sampling_of
from tests.golden import test_vision_families as vision
from tests.golden.checkpoints import EOS, IMAGE, LLAVA, load_hf, save_llava, tokenizer
from tests.golden.test_text_families import load_torch, save_checkpoint
from tests.models import tiny
from tests.models.text_configs import FIRST
from tests.models.vision_configs import CASES, IMG, VID, VIDEOS, batch, hf_config
from tests.torch_required import torch

EVERY_DAY = ("gemma2",)  # grouped heads, windows, softcaps
FAMILIES = [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in FIRST]
LONG = {"gpt2": dict(n_positions=64), "opt": dict(max_position_embeddings=64)}
LENGTHS, NEW = (9, 14, 11), 12  # beyond the shortest window and the change-over of long ropes


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Programs that run once: what counts is the compiler's time."""
    monkeypatch.setattr(engine, "jit", tiny.quick)


def theirs(model, prompts, stop=None, **more) -> list[list[int]]:
    """`transformers`' greedy answers, the prompts padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0, use_cache=True)
    with torch.no_grad():
        out = model.generate(input_ids=tokens, attention_mask=mask, **options, **more)[:, width:].tolist()
    stops = stop if isinstance(stop, list) else [stop]
    ends = [next((n for n, token in enumerate(row, 1) if token in stops), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ends)]


def ours(model, params, prompts, stop=(), n=1, rows=4, suppress=()) -> list[list[list[int]]]:
    made = make_engine(model, Sampling(max_new_tokens=NEW, temperature=0, stop_tokens=stop, suppress_tokens=suppress), rows=rows)
    found = generate_all(made, made.prepare(params), prompts, jax.random.key(0), n)
    return [[answer.tokens.tolist() for answer in answers] for answers in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_text(family, tmp_path):
    folder = save_checkpoint(tmp_path / "model", family, **{**FIRST[family], **LONG.get(family, {})})
    hf = load_torch(folder, torch.float32)
    model, params = aligner.load(folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, length).tolist() for length in LENGTHS]
    free = theirs(hf, prompts)
    stop = free[1][NEW // 2]
    wanted = theirs(hf, prompts, stop)
    assert min(map(len, wanted)) < NEW
    found = ours(model, params, [Prompt(np.asarray(prompt, np.int32)) for prompt in prompts], (stop,), n=2)  # 6 answers in 4 rows
    assert found == [[row, row] for row in wanted]


def test_tokens_that_the_checkpoint_suppresses(tmp_path):
    """generation_config.json speaks of tokens that are never written (SmolVLM's of its image token) and of several that end a text."""
    folder = save_checkpoint(tmp_path / "model", "llama", **FIRST["llama"])
    tokenizer().save_pretrained(folder)
    prompts = [np.random.default_rng(0).integers(3, 60, length).tolist() for length in LENGTHS]
    model, params = aligner.load(folder)
    free = [token for row in theirs(load_torch(folder, torch.float32), prompts) for token in row]
    often = sorted({*free}, key=free.count)
    said = {"suppress_tokens": often[-1:], "bad_words_ids": [often[-2:-1], often[-3:-2], [4, 5]], "eos_token_id": [2, often[-3]]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    wanted = theirs(load_torch(folder, torch.float32), prompts, said["eos_token_id"])
    manner = sampling_of(tiny.config(generation__temperature=0.0), model)  # as online training writes, and aligner.generate
    assert manner.suppress_tokens == (often[-1], often[-2]) and {*manner.stop_tokens} == {2, often[-3]}
    prompts = [Prompt(np.asarray(prompt, np.int32)) for prompt in prompts]
    assert ours(model, params, prompts, manner.stop_tokens, suppress=manner.suppress_tokens) == [[row] for row in wanted]


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name == "penultimate" else pytest.mark.slow) for name in LLAVA])
def test_pictures(case, tmp_path):
    folder = save_llava(tmp_path / "model", **LLAVA[case])
    hf = load_hf(folder)
    model, params = aligner.load(folder)
    rng, media = np.random.default_rng(0), model.media
    prompts, pictures = [], []
    for length, images in ((9, 1), (6, 2), (7, 0)):
        words = rng.integers(7, 70, length)
        for _ in range(images):
            words = np.insert(words, rng.integers(1, len(words)), [IMAGE] * media.features)
        prompts.append(words.astype(np.int32))
        pictures.append(rng.standard_normal((images, media.height, media.width, 3)).astype(np.float32))
    pixels = torch.tensor(np.concatenate(pictures).transpose(0, 3, 1, 2))
    wanted = theirs(hf, [prompt.tolist() for prompt in prompts], EOS, pixel_values=pixels)
    seen = [whole({"pixel_values": images.transpose(0, 3, 1, 2)}, media.features) for images in pictures]
    found = ours(model, params, [Prompt(*pair) for pair in zip(prompts, seen)], (EOS,), n=2)
    assert found == [[row, row] for row in wanted]


SEEING = [(family, 0) for family in CASES] + [("llava", 4), ("paligemma", 3)]  # the last two are Pixtral and PaliGemma 2
FIRST_OF_DAY = ("qwen2_vl", 0)


@pytest.mark.parametrize(
    ("family", "n"), [pytest.param(*case, id="-".join(map(str, case)), marks=() if case == FIRST_OF_DAY else pytest.mark.slow) for case in SEEING]
)
def test_vision_families(family, n, tmp_path):
    """A prompt with one picture, one without, one with two, of which the second is a video where the family takes them: each alone there,
    all in one batch here, and twice."""
    hf = hf_config(family, CASES[family][n])
    folder = vision.save_checkpoint(tmp_path, family, n)
    model, params = aligner.load(folder)
    their_model = vision.load_torch(folder, torch.float32)
    prompts, wanted = [], []
    for row in vision.ROWS:
        made = batch(family, hf, [row])
        if family == "paligemma":
            made["token_type_ids"][:] = 0  # no part of it is an answer
        tensors = {name: torch.as_tensor(value) for name, value in made.items()}
        media = [IMG, VID] if family in VIDEOS else [IMG]
        options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, suppress_tokens=media)
        with torch.no_grad():
            wanted.append(their_model.generate(**tensors, **options)[0, made["input_ids"].shape[1] :].tolist())
        prompts.append(Prompt(made["input_ids"][0].astype(np.int32), vision.seen(model, made)))
    assert ours(model, params, prompts, n=2) == [[row, row] for row in wanted]
