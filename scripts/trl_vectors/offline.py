"""TRL's trainers that learn from given answers: DPO, KTO, CPO, ORPO, TPO, SFT, rewards.

Each function here takes (arrays of `batches.make_batches`, what differs from TRL's defaults) and gives (loss, the tensor it is
differentiated by, metrics).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from scripts.trl_vectors.batches import as_inputs, bare, outputs_of, stub

# name -> what differs from TRL's defaults
DPO = {name: {"loss_type": [name]} for name in (
    "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
    "sft", "sigmoid_norm")}  # fmt: skip
DPO |= {f"{name}, smoothed": {"loss_type": [name], "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")}
DPO |= {f"{name}, {kind}": {"loss_type": [name], "f_divergence_type": kind} for name, kind in (
    ("sigmoid", "forward_kl"), ("hinge", "js_divergence"), ("sigmoid", "js_divergence"), ("ipo", "js_divergence"),
    ("sigmoid", "alpha_divergence"), ("sigmoid_norm", "alpha_divergence"))}  # fmt: skip
DPO |= {f"{name}, long answers": {"loss_type": [name], "ld_alpha": 0.4} for name in ("sigmoid", "ipo", "aot", "sft")}
# TRL 1.16 fails on `sft` and `hinge` here
DPO |= {f"{name}, weighted": {"loss_type": [name], "use_weighting": True} for name in ("sigmoid", "apo_zero")}
DPO |= {"mixed": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5], "beta": 0.3}}
DPO |= {"weighted, long answers": {"loss_type": ["sigmoid", "robust"], "loss_weights": [0.5, 2.0], "use_weighting": True, "ld_alpha": 0.5}}
KTO = {
    "kto": {}, "kto, weights": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "apo_zero_unpaired, weights": {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.7},
}  # fmt: skip
CPO = {
    "sigmoid": {}, "sigmoid, smoothed": {"label_smoothing": 0.2, "cpo_alpha": 0.5}, "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"}, "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    "simpo, smoothed": {"loss_type": "simpo", "label_smoothing": 0.1},
    "alphapo": {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.1}, "alphapo, below 0": {"loss_type": "simpo", "alpha": -0.2},
}  # fmt: skip
ORPO = {"orpo": {}, "orpo, strong": {"beta": 1.0}}
TPO = {
    "sigmoid": {}, "sigmoid, smoothed": {"label_smoothing": 0.2, "beta": 0.3}, "hinge": {"loss_type": "hinge"}, "ipo": {"loss_type": "ipo"},
    "tpo-l": {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 1.0}, "no gold": {"tpo_alpha": 0.0},
}  # fmt: skip
SFT = {"nll": {"loss_type": "nll"}, "dft": {"loss_type": "dft"}}
REWARD = {"reward": {}, "margin": {"margin": True}, "centred": {"margin": True, "center_rewards_coefficient": 0.05}}


def dpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl import DPOTrainer

    c = {"beta": 0.1, "loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
         "f_alpha_divergence_coef": 0.5, "ld_alpha": None, "use_weighting": False} | changes  # fmt: skip
    everything = slice(None)
    # TRL knows no float64 in its alpha divergence
    dtype = torch.float32 if c["f_divergence_type"] == "alpha_divergence" else torch.float64
    logps = torch.tensor(arrays["logps"], dtype=dtype, requires_grad=True)
    model = stub({0: outputs_of(arrays, everything, logps)})
    trainer = bare(
        DPOTrainer, model=model, ref_model=stub({0: SimpleNamespace(log_probs=torch.tensor(arrays["reference"], dtype=dtype))}),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05), precompute_ref_logps=False,
        loss_types=c["loss_type"], loss_weights=c["loss_weights"] or [1.0] * len(c["loss_type"]),
        **{name: value for name, value in c.items() if not name.startswith("loss_")},
    )  # fmt: skip
    loss = trainer._compute_loss(model, as_inputs(arrays, everything), return_outputs=False)
    return loss, logps, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def kto(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl import KTOTrainer

    c = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0} | changes
    n = len(arrays["label"])
    own, other = slice(None, n), slice(n, None)  # the second answer is the mismatched one
    logps = torch.tensor(arrays["logps"], requires_grad=True)
    reference = torch.tensor(arrays["reference"])
    model = stub({0: outputs_of(arrays, own, logps[own]), 1: SimpleNamespace(log_probs=logps[other])})
    frozen = stub({0: SimpleNamespace(log_probs=reference[own]), 1: SimpleNamespace(log_probs=reference[other])})
    inputs = as_inputs(arrays, own) | {f"KL_{name}": value for name, value in as_inputs(arrays, other, first=1).items()}
    trainer = bare(
        KTOTrainer, model=model, ref_model=frozen, args=SimpleNamespace(gradient_checkpointing_kwargs=None), precompute_ref_logps=False,
        calculate_KL=c["loss_type"] == "kto", **c,
    )  # fmt: skip
    loss = trainer._compute_loss(model, inputs | {"label": torch.tensor(arrays["label"])}, return_outputs=False)
    return loss, logps, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def reference_free(trainer: Any, arrays: dict[str, np.ndarray], average: bool) -> tuple[Any, Any, dict[str, float]]:
    """CPO and ORPO: what their forward pass would return is made from the same tokens."""
    import torch

    logps = torch.tensor(arrays["logps"], requires_grad=True)
    lengths = torch.tensor(arrays["mask"]).sum(1)
    n = len(lengths) // 2
    summed = logps.sum(1)
    values = summed / lengths if average else summed
    nll = -summed[:n].sum() / lengths[:n].sum()
    trainer.concatenated_forward = lambda model, batch: (values[:n], values[n:], torch.zeros(1), torch.zeros(1), nll)
    loss, metrics = trainer.get_batch_loss_metrics(None, {})
    return loss, logps, {name: float(value) for name, value in metrics.items() if not name.startswith("logits/")}


def cpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    from trl.experimental.cpo import CPOTrainer

    c = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0} | changes
    return reference_free(bare(CPOTrainer, **c), arrays, average=c["loss_type"] in ("ipo", "simpo"))


def orpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    from trl.experimental.orpo import ORPOTrainer

    return reference_free(bare(ORPOTrainer, **({"beta": 0.1} | changes)), arrays, average=True)


def tpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """The gold answer to a prompt is here the chosen one to the next. Two words make logits: the one that stands there and all others."""
    import torch
    from trl.experimental.tpo import TPOTrainer

    c = {"beta": 0.01, "loss_type": "sigmoid", "label_smoothing": 0.0, "tpo_alpha": 1.0, "tpo_l_gamma": 0.5} | changes
    n = len(arrays["label"])
    rows = np.concatenate([np.arange(2 * n), np.roll(np.arange(n), -1)])[: (3 if c["tpo_alpha"] else 2) * n]
    logps, mask = torch.tensor(arrays["logps"][rows], requires_grad=True), torch.tensor(arrays["mask"][rows])
    here = torch.where(mask > 0, logps, -1.0)
    logits = torch.nn.functional.pad(torch.stack([here, torch.log(-torch.expm1(here))], -1), (0, 0, 0, 1))
    trainer = bare(TPOTrainer, model=stub({0: SimpleNamespace(logits=logits)}), **c)
    loss = trainer._compute_loss(trainer.model, as_inputs({"mask": arrays["mask"][rows]}, slice(None)), return_outputs=False)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    return loss, logps, {name: trainer._metrics["train"][name][-1] for name in names}


def sft(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl import SFTTrainer

    logps, mask = torch.tensor(arrays["logps"], requires_grad=True), torch.tensor(arrays["mask"]).bool()
    outputs = outputs_of(arrays, slice(None), torch.where(mask, logps, 0))
    outputs.label_mask = mask
    arguments = SimpleNamespace(average_tokens_across_devices=False, **changes)
    trainer = bare(SFTTrainer, model=stub({0: outputs}), args=arguments, compute_loss_func=None, label_smoother=None)
    trainer.accelerator.parallelism_config = None
    loss = trainer.compute_loss(trainer.model, as_inputs(arrays, slice(None)))
    return loss, logps, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def reward(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """The score of an answer is its summed log-probability: with ties, and far out."""
    import torch
    from trl import RewardTrainer

    scores = torch.tensor(arrays["logps"].sum(1, keepdims=True), requires_grad=True)
    inputs = as_inputs(arrays, slice(None))
    if changes.get("margin"):
        inputs["margin"] = torch.tensor(arrays["mean_logits"][: len(scores) // 2, 0])
    model = stub({0: SimpleNamespace(logits=scores)})
    arguments = SimpleNamespace(center_rewards_coefficient=changes.get("center_rewards_coefficient"))
    trainer = bare(RewardTrainer, model=model, args=arguments)
    loss = trainer.compute_loss(model, inputs)
    return loss, scores, {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}


TRAINERS = {
    "dpo": (dpo, DPO), "kto": (kto, KTO), "cpo": (cpo, CPO), "orpo": (orpo, ORPO), "tpo": (tpo, TPO), "sft": (sft, SFT),
    "reward": (reward, REWARD),
}  # fmt: skip
