"""One DPO step against TRL's DPOTrainer: same weights, same rows; loss, metrics and the gradient of every tensor."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import aligner
from aligner.algorithms import dpo
from aligner.data.layout import pair_row, shape_of
from aligner.data.templates import Encoded
from aligner.train_step import global_counts
from aligner.types import Mean
from configs import common
from tests.everyday import everyday
from tests.golden import trl_dpo
from tests.golden.checkpoints import LLAMA, LLAVA, load_hf, perturb, save_llama, save_llava
from tests.golden.compare import by_name, relative
from tests.models import tiny
from tests.torch_required import torch

LOSS, GRADIENT = 1e-6, 1e-5
BETA = 0.3  # not TRL's default, so that it is seen to arrive


def config(kind: str) -> ConfigDict:
    made = common.base()
    made.algorithm.beta, made.reference.kind = BETA, kind
    return made


def text_rows() -> list[dict]:
    """Plain strings and different lengths of prompt and answers."""
    return [
        {"prompt": "t8 t9 t10", "chosen": " t11 t12", "rejected": " t13"},
        {"prompt": "t8 t9 t10 t15 t20 t21", "chosen": " t40", "rejected": " t13 t20 t21 t22 t60"},
        {"prompt": "t33", "chosen": " t34 t35 t36 t37", "rejected": " t34 t35 t36 t38"},
    ]


def vision_rows() -> list[dict]:
    """Messages with one image, two and none."""
    picture = lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (15, 19, 3), dtype=np.uint8))

    def row(question, chosen, rejected, images):
        says = lambda role, text: [{"role": role, "content": text}]
        answers = {"chosen": says("assistant", chosen), "rejected": says("assistant", rejected)}
        return {"prompt": says("user", question), **answers, "images": images}

    return [
        row("t8 t9", "t11 t12", "t13", [picture(0)]),
        row("t8 t9 t30", "t40", "t13 t20 t21 t22", [picture(1), picture(2)]),
        row("t33", "t34 t35", "t34 t36 t37", []),
    ]


def batch_of(model, inputs: dict[str, np.ndarray], shared: bool) -> dict[str, np.ndarray]:
    """TRL's arrays, whose rows are [all chosen, all rejected], as our batch of pairs; a column and a slot stay empty at the end."""
    pairs = len(inputs["input_ids"]) // 2
    real, answer = inputs["attention_mask"].astype(bool), inputs["completion_mask"].astype(bool)
    examples, pixels = [], []
    if model.media is not None:
        count = (inputs["input_ids"][:pairs] == model.media.placeholder).sum(axis=1) // model.media.features
        values = inputs["pixel_values"].transpose(0, 2, 3, 1)[: count.sum()]  # the second half repeats them for the rejected
        pixels = np.split(values, np.cumsum(count)[:-1])
    for i in range(pairs):
        ids = inputs["input_ids"].astype(np.int32)
        answers = tuple(ids[row][answer[row]] for row in (i, i + pairs))
        examples.append(Encoded(ids[i][real[i] & ~answer[i]], answers, tuple(("image", image) for image in pixels[i]) if pixels else ()))
    T, S, I = (max(sizes) for sizes in zip(*(shape_of(example, shared) for example in examples)))
    rows = [pair_row(example, T + 1, S + 1, I, model.media, shared, example_id=i) for i, example in enumerate(examples)]
    for row, example in zip(rows, examples):
        for i, (_, image) in enumerate(example.media):
            row["pixel_values"][i] = image
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def pairs_of_folders(tmp_path_factory):
    """Name -> (policy, reference, rows): the policy is the reference with every weight moved a little."""

    def make(save, name, rows, **overrides):
        reference, policy = (tmp_path_factory.mktemp(f"{name}_{part}") for part in ("reference", "policy"))
        save(reference, **overrides)
        save(policy, **overrides)
        model = perturb(load_hf(policy), scale=0.02, seed=7)
        model.save_pretrained(policy)
        return policy, reference, rows

    return {
        "llama": make(save_llama, "llama", text_rows(), **LLAMA["biases"]),
        "llama_tied": make(save_llama, "llama_tied", text_rows(), **LLAMA["mha_tied"]),
        "llava": make(save_llava, "llava", vision_rows(), **LLAVA["penultimate"]),
    }


@pytest.fixture(scope="module")
def trl_steps(pairs_of_folders):
    """TRL in float64, so that only our rounding counts: in float32 its own gradients are off by up to 5e-6."""
    return {name: trl_dpo.step(*pair, dtype=torch.float64, beta=BETA) for name, pair in pairs_of_folders.items()}


def our_step(policy, reference, inputs, reference_logps, kind: str, shared: bool):
    """(loss, metrics, gradients by name) of our DPO, reduced as the training step does."""
    model, params = aligner.load(policy)
    batch, fixed = batch_of(model, inputs, shared), {}
    if kind == "copy":
        fixed["reference"] = aligner.load(reference)[1]
    else:
        batch["reference_logps"] = reference_logps[:, None].astype(np.float32)
    algorithm = dpo.make(config(kind), model)

    def loss_of(params):
        score = lambda params, batch, key: algorithm.score(params, fixed, batch, key)
        counts = global_counts(algorithm, score, params, batch, None, algorithm.carry)
        terms, metrics, _ = algorithm.objective(score(params, batch, None), batch, algorithm.carry)
        return sum(term.weight * term.sum / counts[name] for name, term in terms.items()), metrics

    (loss, metrics), gradients = tiny.quick(jax.value_and_grad(loss_of, has_aux=True))(params)
    metrics = {name: float(m.sum / m.count) if isinstance(m, Mean) else float(m.value) for name, m in metrics.items()}
    return float(loss), metrics, by_name(model, gradients)


@pytest.mark.parametrize(
    ("name", "kind", "shared"),
    everyday(
        [("llama", "copy", False), ("llama", "precomputed", True), ("llama_tied", "copy", True), ("llava", "copy", False),
         ("llava", "precomputed", True)],
        ("llama", "copy", False), ("llava", "precomputed", True),
    ),
)  # fmt: skip
def test_step_equals_trl(pairs_of_folders, trl_steps, name, kind, shared):
    policy, reference, _ = pairs_of_folders[name]
    theirs = trl_steps[name]
    loss, metrics, gradients = our_step(policy, reference, theirs.inputs, theirs.reference, kind, shared)
    assert abs(loss - theirs.loss) <= LOSS
    assert abs(theirs.loss - np.log(2)) > 1e-2  # the policy is not the reference
    for metric, value in theirs.metrics.items():
        if metric != "num_tokens":  # the training step counts those, over the tokens it really computes
            assert metrics[metric] == pytest.approx(value, rel=2e-6, abs=2e-6), metric
    assert set(gradients) == set(theirs.gradients)
    for tensor, expected in theirs.gradients.items():
        ours = gradients[tensor]
        if expected is None:  # the tower's layers after the selected one: torch has no gradient where ours is zero
            assert not ours.any(), tensor
        elif "vision_tower" in tensor and tensor.endswith("k_proj.bias"):  # true gradient 0: softmax does not see a constant
            assert np.abs(ours - expected).max() <= 1e-6, tensor
        else:
            assert relative(ours, expected) <= GRADIENT, f"{tensor}: {relative(ours, expected):.1e}"


@pytest.mark.slow
def test_images_matter_to_the_step(pairs_of_folders, trl_steps):
    """Blank pictures give another loss: the golden step really reads its pixels."""
    policy, reference, _ = pairs_of_folders["llava"]
    theirs = trl_steps["llava"]
    blank = {**theirs.inputs, "pixel_values": np.zeros_like(theirs.inputs["pixel_values"])}
    loss, *_ = our_step(policy, reference, blank, theirs.reference, "precomputed", True)
    assert abs(loss - theirs.loss) > 1e-3
