"""One step of TRL's KTO, CPO and ORPO trainers on the CPU, and the examples it took, read back from its own batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligner.data.templates import Encoded
from tests.golden.checkpoints import load_hf, rename_parameters
from tests.torch_required import torch


class Step(NamedTuple):
    """What one step of TRL gave."""

    loss: float
    metrics: dict[str, float]  # by TRL's names
    gradients: dict[str, np.ndarray]  # by the name on disk
    examples: list[Encoded]


def kto(policy: Path, reference: Path, rows: list[dict[str, Any]], **arguments) -> Step:
    """Rows are dicts with `prompt, completion, label`. An example's second answer is the mismatched one that TRL gave it."""
    from trl import KTOConfig, KTOTrainer

    def examples(batch):
        made = []
        for i, label in enumerate(batch["label"].tolist()):
            prompt, own = split(batch["input_ids"][i], batch["attention_mask"][i], batch["completion_mask"][i])
            answers = (own,)
            if "KL_input_ids" in batch:
                answers += split(batch["KL_input_ids"][i], batch["KL_attention_mask"][i], batch["KL_completion_mask"][i])[1:]
            made.append(Encoded(prompt, answers, values={"label": float(label)}))
        return made

    return step(KTOTrainer, KTOConfig, policy, rows, examples, ref_model=load_hf(reference, torch.float64), **arguments)


def cpo(policy: Path, rows: list[dict[str, Any]], **arguments) -> Step:
    """Rows are dicts with `prompt, chosen, rejected`."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return step(CPOTrainer, CPOConfig, policy, rows, pairs_of, remove_unused_columns=False, **arguments)


def orpo(policy: Path, rows: list[dict[str, Any]], **arguments) -> Step:
    """Rows are dicts with `prompt, chosen, rejected`."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return step(ORPOTrainer, ORPOConfig, policy, rows, pairs_of, remove_unused_columns=False, **arguments)


def step(trainer_type, config_type, policy: Path, rows, examples_of, ref_model=None, **arguments) -> Step:
    """All rows as one batch, in float64, so that only our rounding counts."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer

    disable_progress_bar()
    arguments = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
                 "per_device_train_batch_size": len(rows), "max_length": 64, "disable_tqdm": True, **arguments}  # fmt: skip
    models = {"model": load_hf(policy, torch.float64)} | ({"ref_model": ref_model} if ref_model is not None else {})
    with tempfile.TemporaryDirectory() as folder:
        tr = trainer_type(
            **models, args=config_type(folder, **arguments), train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )  # fmt: skip
    batch = next(iter(tr.get_train_dataloader()))
    tr.model.train()
    loss = tr.compute_loss(tr.model, batch)
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in rename_parameters(tr.model).items()}
    kept = tr._metrics["train"] if hasattr(tr, "_metrics") else tr._stored_metrics["train"]
    return Step(loss.item(), {name: float(found[-1]) for name, found in kept.items()}, gradients, examples_of(batch))


def split(ids, real, answer) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, answer) of one padded row."""
    ids, real, answer = ids.numpy().astype(np.int32), real.numpy().astype(bool), answer.numpy().astype(bool)
    return ids[real & ~answer], ids[real & answer]


def pairs_of(batch) -> list[Encoded]:
    """The pairs in a batch of the older trainers."""
    made = []
    for i in range(len(batch["chosen_input_ids"])):
        row = lambda side, name: batch[f"{side}_{name}"][i]  # noqa: B023
        sides = [split(row(s, "input_ids"), row(s, "attention_mask"), row(s, "labels") != -100) for s in ("chosen", "rejected")]
        assert np.array_equal(sides[0][0], sides[1][0]), "both answers follow the same prompt"
        made.append(Encoded(sides[0][0], (sides[0][1], sides[1][1])))
    return made
