"""TRL's trainers that follow a teacher: GKD, distillation with a teacher at hand or behind a server, GOLD, IW-OPD, SDFT, SDPO. As in
offline.py; all are differentiated by the student's logits."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from scripts.trl_vectors.batches import DISTILLED, OTHER_VOCABULARY, VOCABULARY, bare

DISTILLATION = {f"{trainer}, beta {beta}, temperature {temperature}": {"trainer": trainer, "beta": beta, "temperature": temperature}
                for trainer, temperature in (("gkd", 1.0), ("gkd", 0.6), ("gold", 0.8), ("distillation", 1.5))
                for beta in (0.0, 0.3, 1.0)}  # fmt: skip
# of a few tokens. of: whose likeliest; "written": the one that stands there (and the teacher's likeliest, but for the reverse divergence)
FEW = {f"{trainer}, beta {beta}": {"trainer": trainer, "beta": beta, "k": k, "of": of, "temperature": t} for trainer, beta, k, of, t in (
    ("iw_opd", 0.0, 3, "teacher", 1.0), ("iw_opd", 0.3, 3, "both", 1.5), ("iw_opd", 1.0, 3, "student", 1.0),
    ("iw_opd_top1", 0.3, 1, "written", 1.0), ("iw_opd_top1", 1.0, 1, "written", 0.7), ("iw_opd_argmax", 0.3, 1, "both", 1.0),
    ("server", 0.0, 3, "teacher", 1.5), ("server", 0.5, 1, "written", 1.0), ("server", 1.0, 1, "written", 1.0),
    ("async", 0.0, 3, "teacher", 1.0), ("async", 0.5, 1, "written", 1.5), ("async", 1.0, 1, "written", 1.0),
)}  # fmt: skip
FEW |= {f"{case}, no tail": FEW[case] | {"add_tail": False} for case in ("iw_opd, beta 0.0", "iw_opd, beta 0.3", "async, beta 0.5")}
IW_OPD = {"iw_opd": {}, "iw_opd, as written": {"written": True, "temperature": 1.5}, "iw_opd, strong": {"written": True, "gamma": 2.0},
          "iw_opd, not at all": {"gamma": 0.0}}  # fmt: skip
SELF = {
    "sdft": {}, "sdft, forward, no tail": {"distillation_alpha": 0.0, "distillation_add_tail": False},
    "sdft, all tokens": {"distillation_mode": "full_logits"}, "sdft, clipped": {"distillation_is_clip": 1.1},
    "sdft, sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "distillation_is_clip": 2.0},
    "sdpo": {"trainer": "sdpo", "distillation_alpha": 1.0}, "sdpo, mixed": {"trainer": "sdpo", "distillation_weight": 0.4},
    "sdpo, policy": {"trainer": "sdpo", "distillation_weight": 0.0, "loss_type": "grpo"},
    "sdpo, policy, dr_grpo": {"trainer": "sdpo", "distillation_weight": 0.0, "loss_type": "dr_grpo"},
}  # fmt: skip
ULD = {
    "token by token": {"extended": False}, "without the last": {"extended": False, "skip_eos": True}, "merged, observed": {},
    "merged, bayesian": {"strategy": "bayesian", "student_temperature": 1.3, "teacher_temperature": 0.8},
    "hybrid": {"hybrid": True, "beta": 0.5}, "hybrid, weights": {"hybrid": True, "beta": 0.0, "weights": [0.7, 0.2]},
    "hybrid, bayesian": {"hybrid": True, "beta": 1.0, "strategy": "bayesian"}, "with likelihood": {"crossentropy_weight": 0.3},
}  # fmt: skip
SHARED = {"ours": list(range(7)), "theirs": list(range(3, 10))}  # ids of the tokens that both vocabularies have
LONGEST = 9  # tokens that an answer may have


def tensors_of(arrays: dict[str, np.ndarray]) -> tuple[Any, Any, Any, Any]:
    """(student, teacher, mask, token) of the rows of distillation."""
    import torch

    student = torch.tensor(arrays["student"], requires_grad=True)
    return student, torch.tensor(arrays["teacher"]), torch.tensor(arrays["mask"][:DISTILLED]), torch.tensor(arrays["token"])


def distillation(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """GKD's and GOLD's divergence of logits, and DistillationTrainer's of hidden states, whose heads are here the identity."""
    import torch
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher, mask, _ = tensors_of(arrays)
    options = {key: changes[key] for key in ("beta", "temperature")}
    if changes["trainer"] == "distillation":
        head = torch.eye(VOCABULARY)
        return _chunked_divergence_loss(student, teacher, head, head, mask, **options)[0], student, {}
    trainer = {"gkd": GKDTrainer, "gold": GOLDTrainer}[changes["trainer"]]
    labels = torch.where(mask.bool(), 1, -100)
    return trainer.generalized_jsd_loss(student, teacher, labels, num_items_in_batch=int(mask.sum()), **options), student, {}


def few_tokens(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl.experimental.async_distillation import async_distillation_trainer as asynchronous
    from trl.experimental.iw_opd import IWOPDTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer

    student, teacher, mask, token = tensors_of(arrays)
    kind, beta, k, t, tail = (changes.get(key, True) for key in ("trainer", "beta", "k", "temperature", "add_tail"))
    labels = torch.where(mask.bool(), token, -100)
    log_p, log_q = (torch.log_softmax(x / t, -1) for x in (student, teacher))
    at = lambda ids: log_q.gather(-1, ids)
    if kind == "iw_opd":
        loss = IWOPDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=t, top_k=k, add_tail=tail)
        return loss, student, {}
    if kind in ("iw_opd_top1", "iw_opd_argmax"):
        mode = "argmax" if kind.endswith("argmax") else "sampled"
        trainer = bare(IWOPDTrainer, temperature=t, beta=beta, loss_add_tail=tail, reverse_kl_top_1_mode=mode)
        return trainer._compute_local_sparse_top_1_divergence_loss(student, teacher, token, labels), student, {}
    ids = log_q.topk(k, -1).indices
    if kind == "server":
        trainer = bare(ServerDistillationTrainer, temperature=t, beta=beta, loss_add_tail=tail, reverse_kl_top_1_mode="sampled")
        told = {"actual_logprobs": at(token[..., None])[..., 0], "topk_logprobs": at(ids), "topk_token_ids": ids}
        if beta == 0:
            return trainer._compute_server_forward_kl_loss(told, log_p, labels), student, {}
        return trainer._compute_server_sparse_top_1_divergence_loss(told, log_p, token, labels), student, {}
    there = mask.bool()
    told, known = torch.cat([ids, token[..., None]], -1)[there], torch.ones(int(mask.sum()), k + 1).bool()
    told_logps = at(torch.cat([ids, token[..., None]], -1))[there]
    if beta == 0:
        told, told_logps, known = told[:, :k], told_logps[:, :k], known[:, :k]
    else:
        told, told_logps, known = asynchronous._narrow_top1_actual_support(told, told_logps, token[there], known, beta)
    head = torch.eye(VOCABULARY)
    loss, *_ = asynchronous._chunked_jsd_loss(student[there], head, None, 1.0, None, told, told_logps, known, beta, t, tail, None, 1, 5)
    return loss / mask.sum(), student, {}


def iw_opd(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    import torch
    from trl.experimental.iw_opd import IWOPDTrainer

    student, teacher, mask, token = tensors_of(arrays)
    c = {"temperature": 1.0, "gamma": 0.5, "written": False} | changes
    trainer = bare(
        IWOPDTrainer, model=SimpleNamespace(training=True), temperature=c["temperature"], iw_opd_gamma=c["gamma"], iw_opd_epsilon=1e-8
    )
    told = torch.log_softmax(teacher / c["temperature"], -1).gather(-1, token[..., None])[..., 0]
    written = torch.tensor(arrays["written"]) if c["written"] else None
    loss = trainer._compute_iw_opd_loss(student, token, torch.where(mask.bool(), token, -100), told, written)
    return loss, student, {}


def self_distillation(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """SDFT and SDPO. The third row takes no part in SDPO's distillation."""
    import torch
    from trl.experimental.sdft import SDFTTrainer
    from trl.experimental.sdpo import SDPOTrainer

    student, teacher, mask, token = tensors_of(arrays)
    c = {"trainer": "sdft", "distillation_mode": "topk_logits", "distillation_topk": 3, "distillation_alpha": 0.5, "loss_type": "dapo",
         "distillation_add_tail": True, "distillation_is_clip": None, "distillation_weight": 1.0} | changes  # fmt: skip
    trainer = bare(
        SDFTTrainer if c["trainer"] == "sdft" else SDPOTrainer, args=SimpleNamespace(**c), model=SimpleNamespace(training=True),
        use_teacher_server=False, current_gradient_accumulation_steps=1, model_kwarg_keys=set(), teacher_model="teacher",
        importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, loss_type=c["loss_type"], max_completion_length=LONGEST,
        num_loss_tokens_to_skip=0, temperature=1.0,
    )  # fmt: skip
    trainer._forward_logits = lambda model, **_: teacher if model == "teacher" else student
    trainer._get_teacher_context_for_self_distillation = contextlib.nullcontext
    ones = torch.ones(DISTILLED, 1).long()
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": token, "completion_mask": mask,
              "teacher_input_ids": ones, "teacher_attention_mask": ones, "old_per_token_logps": torch.tensor(arrays["written"]),
              "advantages": torch.tensor(arrays["advantages"][:DISTILLED])}  # fmt: skip
    if c["trainer"] == "sdpo":
        inputs["self_distillation_mask"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    return trainer.compute_loss(SimpleNamespace(training=True), inputs), student, {}


def uld(arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """GOLD with a teacher of another vocabulary. One token of a prompt stands before every answer."""
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    student, _, mask, _ = tensors_of(arrays)
    c = {"extended": True, "strategy": "observed", "skip_eos": False, "hybrid": False, "weights": [None, None], "beta": 0.5,
         "crossentropy_weight": 0.0, "student_temperature": 1.0, "teacher_temperature": 1.0} | changes  # fmt: skip
    config = SimpleNamespace(
        uld_crossentropy_weight=c["crossentropy_weight"], uld_distillation_weight=1.0, uld_student_temperature=c["student_temperature"],
        uld_teacher_temperature=c["teacher_temperature"], uld_skip_student_eos=c["skip_eos"], uld_skip_teacher_eos=c["skip_eos"],
        use_extended_uld=c["extended"], uld_token_merge_strategy=c["strategy"], uld_use_hybrid_loss=c["hybrid"], beta=c["beta"],
        uld_hybrid_matched_weight=c["weights"][0], uld_hybrid_unmatched_weight=c["weights"][1],
    )  # fmt: skip
    place = {id: f"shared {i}" for i, id in enumerate(SHARED["ours"])}, {id: f"shared {i}" for i, id in enumerate(SHARED["theirs"])}
    words = lambda side, size: {place[side].get(id, f"{side}'s own {id}"): id for id in range(size)}
    tokenizers = [SimpleNamespace(get_vocab=lambda side=side, size=size: words(side, size))
                  for side, size in enumerate((VOCABULARY, OTHER_VOCABULARY))]  # fmt: skip
    loss = ULDLoss(config, *tokenizers)
    # "observed" takes the logits at a token, "bayesian" those before it
    around = (0, 0, 0, 1) if c["strategy"] == "bayesian" else (0, 0, 1, 0)
    logits = lambda x: torch.nn.functional.pad(x, around)
    before = lambda x: torch.nn.functional.pad(torch.tensor(x), (1, 0))
    labels = lambda x, mask: torch.where(before(mask) > 0, before(x), -100)
    offsets = lambda ends: torch.stack([before(ends)] * 2, -1)
    other = torch.tensor(arrays["other_teacher"])
    total = loss(
        logits(student), logits(other), labels(arrays["token"], mask.numpy()), labels(arrays["other_token"], arrays["other_mask"]),
        before(arrays["token"]), before(arrays["other_token"]), offsets(arrays["ends"]), offsets(arrays["other_ends"]),
    )  # fmt: skip
    return total, student, {}


TRAINERS = {"distillation": (distillation, DISTILLATION), "few_tokens": (few_tokens, FEW), "iw_opd": (iw_opd, IW_OPD),
            "self_distillation": (self_distillation, SELF), "uld": (uld, ULD)}  # fmt: skip
