"""TRL's trainers that learn from the policy's own answers: GRPO, RLOO, GMPO, A*-PO, asynchronous GRPO, online DPO. As in offline.py."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from scripts.trl_vectors.batches import bare

LONGEST = 9  # tokens that an answer may have
BEST_OF = {"num_value_samples": 5}
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
    "high entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4, "entropy_coef": 0.05},
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "sapo, temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.5},
    "vespo, settings": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.2},
    "sampler": {"loss_type": "dapo", "importance_cap": 1.2},
}
RLOO = {"rloo": {}, "rloo, clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3}}
GMPO = {"gmpo": {}, "gmpo, kl": {"beta": 0.2, "epsilon": 0.1, "epsilon_high": 0.05}}
ASYNC_GRPO = {"async": {}, "async, clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3}}
A2PO = {"a2po": {"beta1": 0.5, "beta2": 1e-3}, "a2po, strong": {"beta1": 0.05, "beta2": 0.4}}
ONLINE_DPO = {"sigmoid": {}, "ipo": {"loss_type": "ipo", "beta": 0.3}}


def inputs_of(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    ones = torch.ones(len(tensors["mask"]), 1).long()
    ids = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": tensors["mask"].long(), "completion_mask": tensors["mask"]}
    return ids | {"advantages": tensors["advantages"], "num_items_in_batch": tensors["mask"].sum()}


def own_answers(trainer_type: type, tensors: dict[str, Any], logps: Any, c: dict[str, Any], **more: Any) -> Any:
    trainer = bare(
        trainer_type, model=SimpleNamespace(training=True), args=SimpleNamespace(**c, steps_per_generation=1),
        epsilon_low=c["epsilon"], epsilon_high=c["epsilon_high"] or c["epsilon"], current_gradient_accumulation_steps=1,
        beta=c.get("beta", 0.0), top_entropy_quantile=c.get("top_entropy_quantile", 1.0), **more,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps, tensors["entropy"], None)
    trainer.accelerator.num_processes, trainer.accelerator.sync_gradients = 1, True
    trainer.accelerator.reduce = lambda x, reduction: x
    trainer.accelerator.pad_across_processes = lambda x, dim, pad_index: x
    return trainer


def metrics_of(trainer: Any, *names: str) -> dict[str, float]:
    return {name: float(trainer._metrics["train"][name][-1]) for name in names if name in trainer._metrics["train"]}


CLIPS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min",
         "clip_ratio/high_max", "cispo_clip_ratio")  # fmt: skip


def grpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl import GRPOTrainer

    c = {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "delta": None, "importance_sampling_level": "token",
         "use_bias_correction_kl": False, "entropy_coef": 0.0, "off_policy_mask_threshold": None,
         "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
         "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}  # fmt: skip
    c |= changes
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps, cap = tensors["logps"].requires_grad_(), c.pop("importance_cap", None)
    trainer = own_answers(
        GRPOTrainer, tensors, logps, c, loss_type=c["loss_type"], importance_sampling_level=c["importance_sampling_level"],
        off_policy_mask_threshold=c["off_policy_mask_threshold"], use_vllm=cap is not None, vllm_importance_sampling_correction=True,
        max_completion_length=LONGEST, use_adaptive_entropy=False, entropy_coef=c["entropy_coef"],
        _entropy_bonus_enabled=c["entropy_coef"] > 0,
    )  # fmt: skip
    inputs = inputs_of(tensors) | {"old_per_token_logps": tensors["old"], "ref_per_token_logps": tensors["reference"]}
    if cap is not None:
        inputs["importance_sampling_ratio"] = torch.exp(tensors["old"] - tensors["sampled"]).clamp(max=cap)
    loss = trainer._compute_loss(None, inputs)
    return loss, logps, metrics_of(trainer, *CLIPS)


def gmpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl.experimental.gmpo import GMPOTrainer

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps = tensors["logps"].requires_grad_()
    trainer = own_answers(GMPOTrainer, tensors, logps, {"epsilon": 0.4, "epsilon_high": None} | changes)
    loss = trainer._compute_loss(
        None, inputs_of(tensors) | {"old_per_token_logps": tensors["old"], "ref_per_token_logps": tensors["reference"]}
    )
    return loss, logps, {}


def rloo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl import RLOOTrainer

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps = tensors["logps"].requires_grad_()
    trainer = own_answers(RLOOTrainer, tensors, logps, {"epsilon": 0.2, "epsilon_high": None} | changes)
    loss = trainer._compute_loss(None, inputs_of(tensors) | {"old_logps": tensors["old"].sum(1)})
    return loss, logps, metrics_of(trainer, "entropy")


def async_grpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """Without padding: all tokens of all answers in one row."""
    import torch
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps, there = tensors["logps"].requires_grad_(), tensors["mask"].bool()
    rows = lambda x: x[:, None].expand(there.shape)[there][None]
    outputs = SimpleNamespace(log_probs=logps[there], entropy=tensors["entropy"][there])
    trainer = own_answers(AsyncGRPOTrainer, tensors, logps, {"epsilon": 0.2, "epsilon_high": None} | changes)
    trainer._step_forward_tokens = trainer._step_trained_tokens = trainer._step_seq_len_weighted = trainer._step_samples = 0.0
    trainer._step_forward_s, trainer._last_forward_time_s = 0.0, 0.0
    count = int(there.sum())
    absent = {key: torch.full((1, 1), -1) for key in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    ones = torch.ones(1, count).long()
    inputs = {"attention_mask": ones, "input_ids": ones, "position_ids": ones, "shift_labels": ones,
              "token_index": torch.arange(count)[None], "old_log_probs": tensors["old"][there][None],
              "advantages": rows(tensors["advantages"]),
              "segment_id": rows(torch.arange(len(there))), "tree_max_seqlens": torch.ones(1, 2).long(),
              "global_n_tokens": torch.tensor([count]), "global_n_forward_tokens": torch.tensor([count]),
              "mean_seq_len": torch.tensor([1.0])}  # fmt: skip
    loss = trainer.compute_loss(lambda **_: outputs, inputs | absent)
    return loss, logps, metrics_of(trainer, *(name for name in CLIPS if name != "kl"))


def a2po(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """Both stages: prompts' values from answers of the reference that are right or wrong, then the regression of one answer to each."""
    import torch
    from trl.experimental.a2po import A2POTrainer, a2po_trainer

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    n, m = len(arrays["label"]), BEST_OF["num_value_samples"]
    logps = tensors["logps"].requires_grad_()
    right = (np.arange(n * m) % 3 == 0).astype(float)  # whether an answer of the reference is
    prompts = [{"prompt": str(i)} for i in range(n)]
    args = SimpleNamespace(**changes, **BEST_OF, per_device_train_batch_size=n, max_prompt_length=9, filter_all_incorrect=False)
    processor = mock.MagicMock()
    processor.return_value.to.return_value = {"input_ids": torch.ones(n, 1).long()}
    trainer = bare(
        A2POTrainer, args=args, train_dataset=prompts, eval_dataset=None, processing_class=processor, ref_model=mock.MagicMock(),
        value_generation_config=None, _optimal_values=None, model=SimpleNamespace(training=True),
    )  # fmt: skip
    trainer.accelerator.prepare = lambda x: x
    trainer._calculate_rewards = lambda prompts, completions, **_: torch.tensor(right)
    as_it_is = lambda model, accelerator: contextlib.nullcontext(model)
    with mock.patch.multiple(a2po_trainer, unwrap_model_for_generation=as_it_is, gather_object=lambda x: x, logger=mock.MagicMock()):
        trainer._estimate_optimal_values()
    trainer._get_sequence_logps = lambda *_: logps[:n].sum(1)
    inputs = {"input_ids": None, "attention_mask": None, "logits_to_keep": None, "ref_logps": tensors["reference"][:n].sum(1)}
    inputs |= {"rewards": tensors["label"].double(), "v_star": torch.tensor([trainer._optimal_values[str(i)] for i in range(n)])}
    loss = trainer.compute_loss(None, inputs)
    return loss, logps, metrics_of(trainer, "implicit_reward", "advantage")


def online_dpo(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """The first of a prompt's answers is the better one where the prompt's label says so."""
    import torch
    from trl.experimental.online_dpo import OnlineDPOTrainer

    c = {"beta": 0.1, "loss_type": "sigmoid"} | changes
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    logps, n = tensors["logps"].requires_grad_(), len(arrays["label"])
    policy, reference = mock.MagicMock(), mock.MagicMock()
    trainer = bare(
        OnlineDPOTrainer, model=policy, ref_model=reference, reward_funcs=None, _beta=c["beta"], eos_token_ids=[0], stats=defaultdict(list),
        state=SimpleNamespace(global_step=1), processing_class=mock.MagicMock(),
        args=SimpleNamespace(use_vllm=False, missing_eos_penalty=None, loss_type=c["loss_type"], torch_empty_cache_steps=None, optim=None,
                             n_gpu=1, gradient_accumulation_steps=1),
    )  # fmt: skip
    trainer.accelerator.backward = lambda loss: loss.backward()
    ones = torch.ones(2 * n, 1).long()
    trainer._generate = lambda *_: (ones, ones, tensors["mask"].long(), tensors["mask"].long(), None)
    trainer._forward = lambda model, *_: logps if model is policy else tensors["reference"]
    better = tensors["label"].double()
    trainer._calculate_rewards_from_functions = lambda **_: torch.cat([better, 1 - better])
    loss = trainer.training_step(policy, {"prompt": [str(i) for i in range(n)]})
    names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    return loss, logps, {name: float(trainer.stats[name][-1]) for name in names}


TRAINERS = {"grpo": (grpo, GRPO), "rloo": (rloo, RLOO), "gmpo": (gmpo, GMPO), "async_grpo": (async_grpo, ASYNC_GRPO), "a2po": (a2po, A2PO),
            "online_dpo": (online_dpo, ONLINE_DPO)}  # fmt: skip
