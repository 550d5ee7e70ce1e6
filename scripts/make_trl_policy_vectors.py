"""Run TRL's GRPO and RLOO losses on given log-probabilities and store what they and their gradients are.

    python -m scripts.make_trl_policy_vectors --out tests/golden/vectors

As scripts/make_trl_vectors.py, which does the same for preference losses; tests/golden/test_trl_policy_losses.py compares.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

GRPO = {name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "vespo")}
GRPO |= {
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "clip-higher": {"loss_type": "dapo", "epsilon_high": 0.28},
    "two-sided": {"loss_type": "grpo", "delta": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "luspo, sequence": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "kl": {"loss_type": "bnpo", "beta": 0.04},
    "kl, corrected": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.05},
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "sapo, temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.5},
    "vespo, settings": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.2},
}
RLOO = {"rloo": {}, "rloo, clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3}}
LONGEST = 9


def make_batch() -> dict[str, np.ndarray]:
    """Six answers, three to each of two prompts: mask, logps, old, reference, entropy [6, T] and advantages [6], float64."""
    rng = np.random.default_rng(0)
    lengths = np.array([7, 1, 4, 2, 5, 3])
    mask = (np.arange(7) < lengths[:, None]).astype(float)
    logps = -rng.gamma(1.5, 1.0, mask.shape)
    near = lambda scale: (logps + rng.normal(0, scale, mask.shape)) * mask
    arrays = {"old": near(0.2), "reference": near(0.5), "entropy": rng.gamma(2, 0.5, mask.shape) * mask}
    return {"mask": mask, "logps": logps * mask, **arrays, "advantages": np.array([1.2, -0.7, -0.5, 0.4, -1.1, 0.7])}


def grpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from trl import GRPOTrainer

    from scripts.make_trl_vectors import bare

    c = {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "delta": None, "importance_sampling_level": "token",
         "use_bias_correction_kl": False, "entropy_coef": 0.0, "off_policy_mask_threshold": None,
         "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
         "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}  # fmt: skip
    c |= changes
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps = tensors["logps"].requires_grad_()
    trainer = bare(
        GRPOTrainer, model=SimpleNamespace(training=True), args=SimpleNamespace(**c, steps_per_generation=1),
        loss_type=c["loss_type"], beta=c["beta"], epsilon_low=c["epsilon"], epsilon_high=c["epsilon_high"] or c["epsilon"],
        importance_sampling_level=c["importance_sampling_level"], off_policy_mask_threshold=c["off_policy_mask_threshold"],
        top_entropy_quantile=1.0, use_vllm=False, vllm_importance_sampling_correction=False, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, use_adaptive_entropy=False, entropy_coef=c["entropy_coef"],
        _entropy_bonus_enabled=c["entropy_coef"] > 0,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, tensors["entropy"], None)
    trainer.accelerator.num_processes, trainer.accelerator.sync_gradients = 1, True
    trainer.accelerator.reduce = lambda x, reduction: x
    ones = torch.ones(6, 1).long()
    loss = trainer._compute_loss(None, {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": tensors["mask"].long(), "completion_mask": tensors["mask"],
        "advantages": tensors["advantages"], "old_per_token_logps": tensors["old"], "ref_per_token_logps": tensors["reference"],
        "num_items_in_batch": tensors["mask"].sum(),
    })  # fmt: skip
    return loss, logps


def rloo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from trl import RLOOTrainer

    from scripts.make_trl_vectors import bare

    c = {"epsilon": 0.2, "epsilon_high": None} | changes
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps = tensors["logps"].requires_grad_()
    trainer = bare(
        RLOOTrainer, model=SimpleNamespace(training=True), epsilon_low=c["epsilon"], epsilon_high=c["epsilon_high"] or c["epsilon"]
    )
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, tensors["entropy"], None)
    trainer.accelerator.reduce = lambda x, reduction: x
    ones = torch.ones(6, 1).long()
    loss = trainer._compute_loss(None, {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": tensors["mask"].long(), "completion_mask": tensors["mask"],
        "advantages": tensors["advantages"], "old_logps": tensors["old"].sum(1),
    })  # fmt: skip
    return loss, logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import trl

    arrays, found = make_batch(), []
    for algorithm, run, cases in (("grpo", grpo, GRPO), ("rloo", rloo, RLOO)):
        for case, changes in cases.items():
            loss, logps = run(arrays, changes)
            loss.backward()
            gradient = np.vectorize(lambda x: float(f"{x:.10g}"))(logps.grad.numpy()).tolist()
            found.append({"algorithm": algorithm, "case": case, "settings": changes, "loss": loss.item(), "gradient": gradient})
    lists = {name: array.tolist() for name, array in arrays.items()}
    stored = {"trl": trl.__version__, "longest": LONGEST, "batch": lists, "cases": found}
    (out / "trl_losses_policy.json").write_text(json.dumps(stored) + "\n")
    print(f"{len(found)} cases of TRL {trl.__version__}")


if __name__ == "__main__":
    main()
