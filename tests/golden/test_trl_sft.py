"""One SFT step against TRL's SFTTrainer: same weights, same rows, read by the loader; loss, metrics and the gradient of every tensor."""

import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import aligner
from aligner.algorithms import sft
from aligner.data import loader
from configs import common
from tests.everyday import everyday
from tests.golden.checkpoints import LLAMA, LLAVA, load_hf, rename_parameters, save_llama, save_llava
from tests.golden.compare import by_name, relative
from tests.models import tiny
from tests.torch_required import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
LOSS, GRADIENT = 1e-6, 2e-5

TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: "
    "{% generation %}" + TEXT + "{{ eos_token }}{% endgeneration %}{% else %}USER: " + TEXT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def says(*turns):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]


def talks(images=()):
    """Conversations of one, two and three turns, one ending with the user; with pictures in the first and a later turn."""
    rows = [says("t8 t9", "t10 t11 t12"), says("t20", "t21", "t22 t23 t24", "t25 t26"), says("t30", "t31 t32", "t33", "t34", "t35")]
    if not images:
        return [{"messages": talk} for talk in rows]
    shown = [images[:1], images[1:3], []]
    parts = lambda text, count: [{"type": "image"}] * count + [{"type": "text", "text": text}]
    for talk, pictures in zip(rows, shown):
        for turn, message in enumerate(talk):
            here = 1 if len(pictures) > turn // 2 and turn % 2 == 0 else 0
            message["content"] = parts(message["content"], here)
    return [{"messages": talk, "images": pictures} for talk, pictures in zip(rows, shown)]


PAIRS = [
    {"prompt": says("t8 t9"), "completion": [{"role": "assistant", "content": "t10 t11 t12"}]},
    {"prompt": says("t20", "t21", "t22 t23"), "completion": [{"role": "assistant", "content": "t25 t26"}]},
    {"prompt": says("t30 t31 t32 t33 t34"), "completion": [{"role": "assistant", "content": "t35"}]},
]
TEXTS = [{"text": "t8 t9 t10 t11"}, {"text": "t20"}, {"text": "t30 t31 t32 t33 t34 t35 t36"}]

# name -> (how the folder is made, its overrides, rows, arguments of SFTConfig, changes of our config)
CASES = {
    "turns": (save_llama, LLAMA["biases"], talks, dict(assistant_only_loss=True), {}),
    "turns, packed": (save_llama, LLAMA["biases"], talks, dict(assistant_only_loss=True), dict(packing=True, packed_length=48)),
    "all tokens, tied head": (save_llama, LLAMA["mha_tied"], talks, {}, dict(loss_on="all")),
    "completions": (save_llama, LLAMA["gqa"], lambda: PAIRS, dict(completion_only_loss=True), {}),
    "prompts too": (save_llama, LLAMA["gqa"], lambda: PAIRS, dict(completion_only_loss=False), dict(loss_on="all")),
    "dft": (save_llama, LLAMA["gqa"], lambda: PAIRS, dict(loss_type="dft"), {}),
    "plain text": (save_llama, LLAMA["gqa"], lambda: TEXTS, {}, {}),
    "images, packed": (save_llava, LLAVA["penultimate"], None, dict(assistant_only_loss=True), dict(packing=True, packed_length=96)),
}


def theirs(folder: Path, rows: list[dict], **arguments):
    """(loss, metrics, gradients by the name on disk) of TRL in float64."""
    from datasets import Dataset, Features, List
    from datasets import Image as ImageFeature
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    if "images" in rows[0]:
        features = Dataset.from_list([{"messages": row["messages"]} for row in rows]).features
        dataset = Dataset.from_list(rows, features=Features({**features, "images": List(ImageFeature())}))
    else:
        dataset = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(out, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
                           max_length=None, per_device_train_batch_size=len(rows), disable_tqdm=True, **arguments)  # fmt: skip
        trainer = SFTTrainer(
            load_hf(folder, torch.float64), config, train_dataset=dataset, processing_class=AutoProcessor.from_pretrained(folder)
        )
    batch = {
        name: value.double() if value.is_floating_point() else value for name, value in next(iter(trainer.get_train_dataloader())).items()
    }
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.numpy() for name, p in rename_parameters(trainer.model).items()}
    return loss.item(), {name: values[-1] for name, values in trainer._metrics["train"].items()}, gradients


def ours(folder: Path, path: Path, loss_type: str, **data):
    """The same of aligner, the rows read from a file."""
    config = common.base()
    config.algorithm = common.sft()
    config.algorithm.loss_type = loss_type
    config.data.pad_to_multiple = 4
    config.data.train.path = str(path)
    config.data.update(data)
    model, params = aligner.load(folder)
    algorithm = sft.make(config, model)
    dataset = loader.load_dataset(config, "train", model, algorithm.needs, progress=False)
    batch = next(loader.eval_batches(dataset, dataset.size + 1))  # and an empty row

    def loss_of(params):
        terms, metrics, _ = algorithm.objective(algorithm.score(params, {}, batch, None), batch, {})
        return sum(term.weight * term.sum / term.count for term in terms.values()), metrics

    (loss, metrics), gradients = tiny.quick(jax.value_and_grad(loss_of, has_aux=True))(params)
    return float(loss), {name: float(m.sum / m.count) for name, m in metrics.items()}, by_name(model, gradients)


@pytest.mark.parametrize("name", everyday(CASES, "turns", "completions"))
def test_step_equals_trl(name, tmp_path):
    save, overrides, make_rows, arguments, data = CASES[name]
    folder = save(tmp_path / "model", **overrides)
    if arguments.get("assistant_only_loss"):
        for file in folder.glob("*.jinja"):
            file.write_text(MARKED)
    if save is save_llava:
        images = [np.random.default_rng(i).integers(0, 256, (15, 19, 3), dtype=np.uint8) for i in range(3)]
        rows = talks([Image.fromarray(image) for image in images])
        written = talks([f"{i}.png" for i in range(3)])
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
    else:
        rows = written = make_rows()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))

    loss, metrics, gradients = ours(folder, path, arguments.get("loss_type", "nll"), **data)
    expected_loss, expected_metrics, expected_gradients = theirs(folder, rows, **arguments)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    for metric in ("entropy", "mean_token_accuracy"):
        assert metrics[metric] == pytest.approx(expected_metrics[metric], rel=2e-6, abs=2e-6), metric
    assert set(gradients) == set(expected_gradients)
    for tensor, expected in expected_gradients.items():
        if expected is None:  # the tower's layers after the selected one: torch has no gradient where ours is zero
            assert not gradients[tensor].any(), tensor
        elif "vision_tower" in tensor and tensor.endswith("k_proj.bias"):  # true gradient 0: softmax does not see a constant
            assert np.abs(gradients[tensor] - expected).max() <= 1e-6, tensor
        else:
            assert relative(gradients[tensor], expected) <= GRADIENT, f"{tensor}: {relative(gradients[tensor], expected):.1e}"
