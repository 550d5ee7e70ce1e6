"""Every family that sees or hears against PyTorch through saved folders: logits, gradients, checkpoints byte for byte.

Rows have one picture (or sound), none, and two with words between them, of different sizes where the family takes them so, the last a video
where it takes those; they are padded on the left and on the right, and packed. Every day the first config of a family is run in float32; the
rest, float64 and gradients are slow tests.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aligner
from aligner.convert.hf import canonical_name
from aligner.convert.verify import verify
from aligner.logprobs import dense_logits
from aligner.models import WITH_MEDIA
from aligner.models.pictures import blank, fill, placeholders, read
from tests.everyday import everyday
from tests.golden.checkpoints import perturb
from tests.golden.compare import by_name
from tests.models import tiny
from tests.models.vision_configs import CASES, batch, hf_config
from tests.torch_required import torch

ALL = [pytest.param(family, n, id=f"{family}-{n}") for family, cases in CASES.items() for n in range(len(cases))]
ROWS = [0, 1, 2]


def save_checkpoint(folder, family: str, n: int = 0):
    """Write a seeded model with every weight perturbed to `folder`."""
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    perturb(AutoModelForMultimodalLM.from_config(hf_config(family, CASES[family][n]))).save_pretrained(folder)
    return folder


def load_torch(folder, dtype):
    from transformers import AutoModelForMultimodalLM

    model, info = AutoModelForMultimodalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run_torch(model, rows: dict[str, np.ndarray]) -> torch.Tensor:
    tensors = {name: torch.as_tensor(value) for name, value in rows.items()}
    tensors |= {name: tensor.to(model.dtype) for name, tensor in tensors.items() if name.startswith("pixel_values")}
    return model(**tensors, use_cache=False).logits


def seen(model, text: dict) -> list:
    """The pictures or sounds of a text."""
    return read(model.media, text) if text.keys() & {"pixel_values", "input_features"} else []


def logits_of(model, params, made):
    return dense_logits(model.apply(params, made, features=model.encode(params, made)).hidden, model.head(params))


def check_padded(folder, family: str, hf, padding: str, bar: float = 1e-4):
    """All rows at once in float32, padded as `transformers` pads them."""
    rows = batch(family, hf, ROWS, padding)
    if family == "mllama":  # there a token before the first picture looks at what fills up the batch
        rows = batch(family, hf, [2], padding)
    model, params = aligner.load(folder)
    with torch.no_grad():
        theirs = run_torch(load_torch(folder, torch.float32), rows).numpy()
    ours = np.asarray(tiny.quick(functools.partial(logits_of, model))(params, model.inputs(rows)))
    real = rows["attention_mask"].astype(bool)
    assert np.abs(ours[real] - theirs[real]).max() <= bar * max(1, np.abs(theirs[real]).max())


def pack(model, texts: list[dict], length: int, slots: int, left: bool) -> dict[str, np.ndarray]:
    """Texts one after another in a row of `length`, with their pictures, as the loader packs them; filled up on the left or on the right."""
    alone = [{name: np.asarray(array)[0] for name, array in model.inputs(text).items()} for text in texts]
    row = {name: np.concatenate([text[name] for text in alone]) for name in ("tokens", "positions", "segment_ids", "role")}
    row["segment_ids"] = np.repeat(1 + np.arange(len(texts)), [len(text["tokens"]) for text in alone])
    rest = length - len(row["tokens"])
    row = {name: np.pad(array, (rest, 0) if left else (0, rest)).astype(np.int32) for name, array in row.items()}
    row |= blank(model.media, length, slots)
    places = placeholders(row["tokens"], model.media)
    row["media_index"] = np.where(places, np.cumsum(places) - 1, -1).astype(np.int32)
    fill(row, [picture for text in texts for picture in seen(model, text)], model.media)
    return row


def check_packed(folder, family: str, hf, gradients: bool, bar: float = 1e-5):
    """Each text alone in PyTorch; here each in a row, filled up on either side, and all packed into a fourth, in float64.

    Where asked for, also the gradients of a random linear function of all logits.
    """
    texts = [batch(family, hf, [row]) for row in ROWS]
    theirs = load_torch(folder, torch.float64)
    logits = torch.cat([run_torch(theirs, text)[0] for text in texts])
    expected = torch.cat([logits, logits])
    weight = np.random.default_rng(1).normal(size=expected.shape)
    with jax.enable_x64(True):
        model, params = aligner.load(folder, dtype="float64")
        length = logits.shape[0] + 2
        slots = sum(len(picture.arrays["pixel_values"]) for text in texts for picture in seen(model, text))
        rows = [pack(model, [text], length, slots, left=number != 1) for number, text in enumerate(texts)]
        rows.append(pack(model, texts, length, slots, left=False))
        made = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
        real = np.asarray(made["segment_ids"]) > 0

        def scalar(params, made):
            found = logits_of(model, params, made)[real]
            return jnp.sum(found * weight), found

        run = jax.value_and_grad(scalar, has_aux=True) if gradients else lambda params, made: (scalar(params, made), None)
        (_, found), grads = tiny.quick(run)(params, made)
        found = np.asarray(found)
    assert found.dtype == np.float64
    assert np.abs(found - expected.detach().numpy()).max() <= bar * max(1, expected.detach().abs().max())
    if not gradients:
        return
    (expected * torch.tensor(weight)).sum().backward()
    ours = by_name(model, grads)
    parameters = {canonical_name(model.conversion, name): p for name, p in theirs.named_parameters() if p.grad is not None}
    shared = ours.keys() & parameters.keys()
    parts = {name.split(".")[0 if "model" not in name.split(".")[0] else 1] for name in shared}
    assert len(shared) >= 3 and len(parts) >= 2, parts
    noise = 1e-6 * max(np.abs(ours[name]).max() for name in shared)  # a key's bias has none, but torch takes softmax in float32
    for name in shared:
        grad = parameters[name].grad.numpy()
        assert np.abs(ours[name] - grad).max() <= 1e-4 * np.abs(grad).max() + noise, name


@pytest.mark.parametrize("family", everyday(CASES, "llava", "llava_next", "qwen2_vl", "gemma3", "paligemma", "qwen2_audio"))
def test_float32_logits_and_bytes(family, tmp_path):
    save_checkpoint(tmp_path, family)
    check_padded(tmp_path, family, hf_config(family, CASES[family][0]), "left")
    assert verify(tmp_path).different == ()


def test_every_family_has_its_configs():
    assert CASES.keys() | {"vision_llm"} == WITH_MEDIA.keys(), "vision_llm is ours alone"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "n"), ALL)
def test_logits_gradients_and_round_trip(family, n, tmp_path):
    """Gradients of the first config."""
    hf = hf_config(family, CASES[family][n])
    folder, copy = save_checkpoint(tmp_path / "hf", family, n), tmp_path / "copy"
    check_padded(folder, family, hf, "right")
    check_packed(folder, family, hf, gradients=n == 0)
    aligner.save(*aligner.load(folder, dtype=None), copy)
    before, after = (load_torch(where, torch.float32).state_dict() for where in (folder, copy))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
