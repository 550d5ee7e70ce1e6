"""Every vision-language family against PyTorch through saved folders: logits, gradients, checkpoints byte for byte.

Rows have one picture, none, and two with words between them, of different sizes where the family takes them so. Every day the first config
of a family is run in float32; the rest, float64 and gradients are slow tests.
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
from aligner.models import VISION_LANGUAGE
from tests.golden.checkpoints import perturb
from tests.golden.compare import by_name
from tests.golden.test_text_families import compile_quickly
from tests.models.vision_configs import CASES, batch, hf_config
from tests.torch_required import torch

ALL = [pytest.param(family, n, id=f"{family}-{n}") for family, cases in CASES.items() for n in range(len(cases))]
ROWS = [0, 1, 2]


def save_checkpoint(folder, family: str, n: int = 0):
    """Write a seeded model with every weight perturbed to `folder`."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    perturb(AutoModelForImageTextToText.from_config(hf_config(family, CASES[family][n]))).save_pretrained(folder)
    return folder


def load_torch(folder, dtype):
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run_torch(model, rows: dict[str, np.ndarray]) -> torch.Tensor:
    tensors = {name: torch.as_tensor(value) for name, value in rows.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    return model(**tensors, use_cache=False).logits


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
    ours = np.asarray(compile_quickly(functools.partial(logits_of, model), params, model.inputs(rows)))
    real = rows["attention_mask"].astype(bool)
    assert np.abs(ours[real] - theirs[real]).max() <= bar * max(1, np.abs(theirs[real]).max())


def check_alone(folder, family: str, hf, gradients: bool, bar: float = 1e-5):
    """Each row alone in PyTorch, all together here, in float64; and the gradients of a random linear function of all logits."""
    rows = batch(family, hf, ROWS)
    real = rows["attention_mask"].astype(bool)
    theirs = load_torch(folder, torch.float64)
    logits = [run_torch(theirs, batch(family, hf, [row]))[0] for row in ROWS]
    expected = torch.cat(logits)
    weight = np.random.default_rng(1).normal(size=expected.shape)
    with jax.enable_x64(True):
        model, params = aligner.load(folder, dtype="float64")
        made = model.inputs(rows)

        def scalar(params, made):
            found = logits_of(model, params, made)[real]
            return jnp.sum(found * weight), found

        run = jax.value_and_grad(scalar, has_aux=True) if gradients else lambda params, made: (scalar(params, made), None)
        (_, found), grads = compile_quickly(run, params, made)
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


@pytest.mark.parametrize("family", CASES)
def test_float32_logits_and_bytes(family, tmp_path):
    save_checkpoint(tmp_path, family)
    check_padded(tmp_path, family, hf_config(family, CASES[family][0]), "left")
    assert verify(tmp_path).different == ()


def test_every_family_has_its_configs():
    assert CASES.keys() | {"vision_llm"} == VISION_LANGUAGE.keys(), "vision_llm is ours alone"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "n"), ALL)
def test_logits_gradients_and_round_trip(family, n, tmp_path):
    hf = hf_config(family, CASES[family][n])
    folder, copy = save_checkpoint(tmp_path / "hf", family, n), tmp_path / "copy"
    check_padded(folder, family, hf, "right")
    check_alone(folder, family, hf, gradients=True)
    aligner.save(*aligner.load(folder, dtype=None), copy)
    before, after = (load_torch(where, torch.float32).state_dict() for where in (folder, copy))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
