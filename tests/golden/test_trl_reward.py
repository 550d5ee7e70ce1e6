"""Reward modelling against TRL: one full step of RewardTrainer on the same weights and rows."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import aligner
from aligner import trees
from aligner.algorithms import reward
from aligner.convert import tables
from aligner.data.formatters import find_formatter
from aligner.data.kinds import ENCODERS
from aligner.data.layout import lay_out, shape_of
from aligner.metrics import values
from configs import common
from tests.golden.checkpoints import TEXT, perturb, tokenizer
from tests.models import tiny
from tests.torch_required import torch

LOSS, GRADIENT = 1e-5, 1e-4
CENTER = 0.03
ROWS = [
    {"prompt": "t8 t9 t10", "chosen": " t11 t12", "rejected": " t13", "margin": 0.5},
    {"prompt": "t8 t9 t10 t15 t20 t21", "chosen": " t40", "rejected": " t13 t20 t21 t22 t60", "margin": 0.0},
    {"prompt": "t33", "chosen": " t34 t35 t36 t37", "rejected": " t34 t35 t36 t38", "margin": -0.25},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    perturb(LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=1))).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trl_step(folder, rows, tmp_path, **arguments):
    """(loss, metrics, gradients by name) of RewardTrainer for all rows as one batch, in float64."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    config = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", max_length=None,
        per_device_train_batch_size=len(rows), disable_tqdm=True, disable_dropout=True, **arguments,
    )  # fmt: skip
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(folder))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: found[-1] for name, found in trainer._metrics["train"].items()}
    return loss.item(), metrics, {name: p.grad.numpy() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("margin", [True, False])
def test_step_equals_reward_trainer(folder, tmp_path, margin):
    rows = ROWS if margin else [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]
    expected, their_metrics, their_gradients = trl_step(folder, rows, tmp_path, center_rewards_coefficient=CENTER if margin else None)

    model, params = aligner.load(folder)
    _, to_sample = find_formatter("auto", list(rows[0]), "data.train")
    encoded = [ENCODERS["preference_last"].encode(to_sample(row), model, ConfigDict()) for row in rows]
    T, S, _ = (max(sizes) for sizes in zip(*map(shape_of, encoded)))
    made = [lay_out([e], [i], T + 1, S, 0, last=True) | {"margin": np.float32([e.values["margin"]])} for i, e in enumerate(encoded)]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    config = common.base()
    config.algorithm = common.reward()
    config.algorithm.center_rewards_coefficient = CENTER if margin else 0.0
    algorithm = reward.make(config, model)

    def loss_of(params):
        terms, metrics, _ = algorithm.objective(algorithm.score(params, {}, batch, None), batch, {})
        return sum(term.weight * term.sum / term.count for term in terms.values()), metrics

    (loss, metrics), gradients = tiny.quick(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert float(loss) == pytest.approx(expected, rel=LOSS)
    found = values(metrics)
    for name, value in their_metrics.items():
        if name != "num_tokens":  # TRL counts the prompt twice
            assert found[name] == pytest.approx(value, rel=LOSS), name
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(gradients).items()}
    tensors = tables.by_tensor(tables.table(model.conversion, gradients))
    assert tensors.keys() == their_gradients.keys()
    for name, parts in tensors.items():
        ours, theirs = tables.write_tensor(parts, lambda path, index: leaves[path][index]), their_gradients[name]
        assert np.abs(ours - theirs).max() <= GRADIENT * np.abs(theirs).max(), name
