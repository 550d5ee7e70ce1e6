"""One DPO step as TRL computes it on the CPU: the numbers that ours are compared with."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.golden.checkpoints import load_hf, rename_parameters
from tests.torch_required import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Step(NamedTuple):
    """What one step of TRL gave. Rows of the inputs are [chosen of every pair, rejected of every pair]."""

    loss: float
    metrics: dict[str, float]  # by TRL's names
    gradients: dict[str, np.ndarray | None]  # by the name on disk; None where torch has no gradient
    inputs: dict[str, np.ndarray]  # input_ids, attention_mask, completion_mask [2n,T], pixel_values [2i,3,H,W] with media
    reference: np.ndarray  # [n,2]: log-probabilities of the reference


def trainer(policy, reference, processing_class, rows: list[dict[str, Any]], **arguments):
    """TRL's DPOTrainer on the CPU: no bfloat16, no checkpointing of activations (both are on by default), nothing reported or cut.

    Args:
        policy, reference: transformers models.
        rows: dicts with `prompt, chosen, rejected`, as strings or messages, and `images` (lists of PIL images) for a model that sees.
        **arguments: further ones of `DPOConfig`.
    """
    from datasets import Dataset, Features, Image, List
    from datasets.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer

    disable_progress_bar()
    dataset = Dataset.from_list([{key: value for key, value in row.items() if key != "images"} for row in rows])
    if "images" in rows[0]:
        dataset = Dataset.from_list(rows, features=Features({**dataset.features, "images": List(Image())}))
    arguments = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
                 "per_device_train_batch_size": len(rows), "max_length": None, "disable_tqdm": True, **arguments}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, **arguments)
        return DPOTrainer(model=policy, ref_model=reference, args=config, train_dataset=dataset, processing_class=processing_class)


def step(policy: Path, reference: Path, rows: list[dict[str, Any]], dtype=torch.float32, **arguments) -> Step:
    """Loss, metrics and gradients of TRL for all `rows` as one batch, on the weights of two folders."""
    from transformers import AutoProcessor

    tr = trainer(load_hf(policy, dtype), load_hf(reference, dtype), AutoProcessor.from_pretrained(policy), rows, **arguments)
    batch = next(iter(tr.get_train_dataloader()))
    tr.model.train()
    loss = tr.compute_loss(tr.model, batch)
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.numpy() for name, p in rename_parameters(tr.model).items()}
    metrics = {name: values[-1] for name, values in tr._metrics["train"].items()}
    reference_logps = torch.stack(tr.compute_ref_log_probs(tr.ref_model, batch), 1)
    return Step(loss.item(), metrics, gradients, {name: value.numpy() for name, value in batch.items()}, reference_logps.numpy())
