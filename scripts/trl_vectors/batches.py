"""The numbers that losses are evaluated on, and what stands in for TRL's trainers and models."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np

DISTILLED, VOCABULARY, OTHER_VOCABULARY = 4, 11, 13  # rows of distillation, words of the student and of a teacher unlike it


def make_batches() -> dict[str, dict[str, np.ndarray]]:
    """name -> arrays of two answers to each of n prompts, all float64 [2n, T], first answers in the first half:
    mask, logps and reference (0 where there is no token), log_sum_sq_probs, entropy, mean_logits, is_top1; and label [n]. For online
    algorithms old and sampled, log-probabilities as of writing by the trained and by the sampling program, and advantages [2n]. For
    distillation student and teacher, logits [4, T, V] of the first rows, token [4, T] which stands there, written [4, T] its
    log-probability as of writing; and of a teacher unlike the student other_teacher [4, U, W], other_token and other_mask [4, U], and at
    which byte of the text tokens end, ends [4, T] and other_ends [4, U]."""
    rng = np.random.default_rng(0)

    def finish(lengths, logps, reference, label):
        mask = np.arange(logps.shape[1]) < np.asarray(lengths)[:, None]
        rest = {"log_sum_sq_probs": -rng.gamma(2, 0.5, mask.shape), "entropy": rng.gamma(2, 0.5, mask.shape)}
        rest |= {"mean_logits": rng.normal(0, 2, mask.shape), "is_top1": (rng.random(mask.shape) < 0.5).astype(float)}
        arrays = {"logps": logps, "reference": reference, **rest}
        return {name: np.where(mask, array, 0) for name, array in arrays.items()} | {"mask": mask.astype(float), "label": np.array(label)}

    ragged = -rng.gamma(1.5, 1.0, (10, 7))
    ties = -rng.gamma(1.5, 1.0, (8, 4))
    ties[4] = ties[0]  # a pair of equal answers
    ties[[2, 6]] = ties[[1, 5]]  # two equal pairs
    ties_reference = ties + rng.normal(0, 0.4, ties.shape)
    ties_reference[4], ties_reference[[2, 6]] = ties_reference[0], ties_reference[[1, 5]]
    ties_reference[[3, 7]] = ties[[3, 7]]  # a policy that is the reference
    extreme, extreme_reference = -rng.uniform(0, 30, (8, 6)), -rng.uniform(0, 30, (8, 6))
    extreme[0], extreme[4] = -1e-3, -40.0
    extreme_reference[1], extreme_reference[5] = -1e-3, -40.0
    made = {
        "ragged": finish([7, 1, 4, 2, 5, 3, 6, 4, 7, 1], ragged, ragged + rng.normal(0, 0.7, ragged.shape), [1, 0, 0, 1, 1]),
        "ties": finish([3, 4, 4, 2, 3, 1, 1, 4], ties, ties_reference, [0, 0, 1, 0]),
        "extreme": finish([6, 2, 4, 1, 6, 5, 3, 2], extreme, extreme_reference, [1, 0, 1, 0]),
    }
    for name, arrays in made.items():
        student, teacher = rng.normal(0, 40 if name == "extreme" else 2, (2, DISTILLED, arrays["mask"].shape[1], VOCABULARY))
        teacher[0] = student[0] if name == "ties" else teacher[0]
        arrays |= {"student": student, "teacher": teacher}
    for seed, (name, arrays) in enumerate(made.items(), 1):
        arrays |= written(np.random.default_rng(seed), name, arrays) | unlike(np.random.default_rng(seed), name, arrays)
    return made


def written(rng: np.random.Generator, name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What online algorithms know of answers besides. Of `ties` every second answer is its policy's own and some advantages are 0."""
    mask, wide = arrays["mask"], 5.0 if name == "extreme" else 0.2
    old = arrays["logps"] + rng.normal(0, wide, mask.shape)
    advantages = rng.normal(0, 10 if name == "extreme" else 1, len(mask))
    token = rng.integers(0, VOCABULARY, arrays["student"].shape[:2])
    if name == "ties":
        old[::2], advantages[[1, 2]] = arrays["logps"][::2], 0
        token[1] = arrays["teacher"][1].argmax(-1)
    log_softmax = arrays["student"] - np.log(np.exp(arrays["student"]).sum(-1, keepdims=True))
    logps = np.take_along_axis(log_softmax, token[..., None], -1)[..., 0]
    return {"old": old * mask, "sampled": (old + rng.normal(0, wide, mask.shape)) * mask, "advantages": advantages, "token": token,
            "written": logps + rng.normal(0, wide, token.shape)}  # fmt: skip


def unlike(rng: np.random.Generator, name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A teacher with another vocabulary, whose tokens end elsewhere in the text."""
    ours = arrays["mask"][:DISTILLED].sum(1).astype(int)
    theirs = np.array([max(1, n + d) for n, d in zip(ours, (-2, 1, 1, 0))])
    other_mask = (np.arange(theirs.max()) < theirs[:, None]).astype(float)
    logits = rng.normal(0, 40 if name == "extreme" else 2, (*other_mask.shape, OTHER_VOCABULARY))
    ends = {"ends": np.zeros(arrays["student"].shape[:2], int), "other_ends": np.zeros(other_mask.shape, int)}
    for row, lengths in enumerate(zip(ours, theirs)):
        size = max(lengths) + 1
        for key, n in zip(ends, lengths):
            ends[key][row, :n] = [*np.sort(rng.choice(np.arange(1, size), n - 1, replace=False)), size]
    return ends | {"other_teacher": logits, "other_mask": other_mask, "other_token": rng.integers(0, OTHER_VOCABULARY, other_mask.shape)}


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without its constructor, which wants a model and a dataset: only what its loss reads."""
    made = object.__new__(trainer)
    whole = lambda x: x
    made.accelerator = SimpleNamespace(device="cpu", gather=whole, gather_for_metrics=whole)
    made.aux_loss_enabled = False
    made._metrics, made._total_train_tokens, made._tp_size = {"train": defaultdict(list)}, 0, 1
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def stub(outputs: dict[int, Any]) -> Any:
    """A model that answers `input_ids` whose first token is k with outputs[k]."""
    import torch

    class Stub(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, input_ids, **_):
            return outputs[int(input_ids[0, 0])]

    return Stub().train()


def as_inputs(arrays: dict[str, np.ndarray], rows: slice, first: int = 0) -> dict[str, Any]:
    """Input ids, attention mask and completion mask: one prompt token, then the answers."""
    import torch

    mask = torch.tensor(arrays["mask"][rows])
    completion = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    return {"input_ids": torch.full(completion.shape, first), "attention_mask": torch.ones_like(completion), "completion_mask": completion}


def outputs_of(arrays: dict[str, np.ndarray], rows: slice, logps: Any) -> Any:
    import torch

    others = {name: torch.tensor(arrays[name][rows]) for name in ("entropy", "mean_logits", "log_sum_sq_probs")}
    return SimpleNamespace(log_probs=logps, is_top1=torch.tensor(arrays["is_top1"][rows]).bool(), **others)
