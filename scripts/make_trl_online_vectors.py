"""Run PPO, online DPO, XPO and Nash-MD of TRL 1.12, the last release that has them all, and store what they compute.

    python -m scripts.make_trl_online_vectors --out tests/golden/vectors

Needs trl==1.12 in an environment of its own. PPO's mathematics stands in the middle of its trainer's loop: that loop runs here as it is, on
stubs that look logits and values up in tables; what it computes is read where it calls for the backward pass. All in float64.
tests/golden/test_trl_online_losses.py compares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROWS, WIDTH, VOCABULARY = 8, 5, 7
PAD, EOS, FIRST = 0, 2, 10  # row r's prompt is the one token FIRST + r
FULL = [WIDTH] * ROWS
RAGGED = [5, 3, 1, 5, 2, 4, 5, 3]
# TRL gives the score one position behind the end of an answer that is shorter than the widest. Where the critic's value there is the score
# itself and gamma is 1, that is the same as the score at the answer's last token, as it is elsewhere.
PPO = {
    "k1": (FULL, {}),
    "k3": (FULL, {"kl_estimator": "k3", "kl_coef": 0.4}),
    "discounted": (FULL, {"gamma": 0.9, "lam": 0.8, "cliprange": 0.1, "cliprange_value": 0.1, "vf_coef": 0.5}),
    "whitened rewards": (FULL, {"whiten_rewards": True, "kl_coef": 0.3}),
    "missing EOS": (FULL, {"missing_eos_penalty": 1.3}),
    "ragged, k1": (RAGGED, {"lam": 0.9, "kl_coef": 0.2}),
    "ragged, k3": (RAGGED, {"kl_estimator": "k3", "kl_coef": 0.5, "cliprange_value": 0.4}),
}
DEFAULTS = {"kl_estimator": "k1", "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1,
            "whiten_rewards": False, "missing_eos_penalty": None}  # fmt: skip
PAIRS = {
    "online_dpo": {"sigmoid": {}, "ipo": {"loss_type": "ipo", "beta": 0.3}},
    "xpo": {"sigmoid": {"alpha": 0.2}, "ipo": {"loss_type": "ipo", "alpha": 0.05, "beta": 0.4}},
    "nash_md": {"nash_md": {}, "strong": {"beta": 0.7}},
}


def ppo(lengths: list[int], changes: dict[str, Any]) -> dict[str, Any]:
    """One rollout of the real `PPOTrainer.train`, two passes of two updates: its inputs, advantages and returns, and every update."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    rng = np.random.default_rng(0)
    c = DEFAULTS | changes
    draw = lambda scale, *shape: torch.tensor(rng.normal(0, scale, (ROWS, WIDTH + 1, *shape)))
    columns = torch.arange(WIDTH)
    tokens = torch.tensor(rng.integers(3, VOCABULARY, (ROWS, WIDTH)))
    ends = torch.tensor(lengths)
    tokens[torch.arange(ROWS)[:5], ends[:5] - 1] = EOS  # of full rows the first ones end, the others were cut
    tokens[ends < WIDTH, ends[ends < WIDTH] - 1] = EOS
    tokens[columns >= ends[:, None]] = PAD
    logits, reference = draw(1.5, VOCABULARY), None
    reference = logits + draw(0.4, VOCABULARY)
    values, scores = draw(1.0), draw(1.0)[:, 0]
    values[torch.arange(ROWS), ends] = scores

    class Tables(torch.nn.Module):
        """A policy, a critic or a reward model that says what stands in a table at the row of the prompt."""

        base_model_prefix, is_gradient_checkpointing = "model", False

        def __init__(self, table: Any):
            super().__init__()
            self.table, self.score = torch.nn.Parameter(table), torch.nn.Identity()

        @property
        def model(self):
            return self

        def forward(self, input_ids, **options):
            found = self.table[input_ids[:, 0] - FIRST]
            return SimpleNamespace(logits=found, hidden_states=[found])

    seen: list[dict[str, Any]] = []

    def backward(loss: Any) -> None:
        here = sys._getframe(1).f_locals
        new, value = torch.autograd.grad(loss, [here["new_logprobs"], here["vpred"]], retain_graph=True)
        keys = ("new_logprobs", "vpred", "loss", "pg_loss", "vf_loss")
        found = {key: here[key].detach() for key in keys} | {"logp_gradient": new, "value_gradient": value}
        whole = {key: here[key] for key in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "scores")}
        seen.append({"rows": here["micro_batch_inds"], "whole": whole, **found})
        loss.backward()

    policy, critic = Tables(logits), Tables(values[..., None])
    model = ppo_trainer.PolicyAndValueWrapper(policy, critic)
    trainer = object.__new__(ppo_trainer.PPOTrainer)
    args = SimpleNamespace(
        **c, response_length=WIDTH, temperature=1.0, num_ppo_epochs=2, num_mini_batches=2, gradient_accumulation_steps=1,
        num_total_batches=1, total_episodes=ROWS, batch_size=ROWS, local_batch_size=ROWS, local_mini_batch_size=ROWS // 2,
        per_device_train_batch_size=ROWS // 2, local_rollout_forward_batch_size=ROWS, logging_steps=None, eval_steps=None, save_steps=None,
        num_sample_generations=0, ds3_gather_for_generation=False,
    )  # fmt: skip
    logged: dict[str, float] = {}
    same = lambda *given: given[-1]
    handler = SimpleNamespace(on_train_begin=same, on_step_end=same, on_train_end=same)
    accelerator = SimpleNamespace(device="cpu", print=lambda *a: None, backward=backward, unwrap_model=lambda m: m,
                                  accumulate=lambda m: contextlib.nullcontext(), gather_for_metrics=lambda x: x)  # fmt: skip
    prompts = FIRST + torch.arange(ROWS)[:, None]
    for name, value in dict(
        args=args, accelerator=accelerator, optimizer=torch.optim.SGD(model.parameters(), 4.0), model=model, ref_model=Tables(reference),
        reward_model=Tables(scores[:, None, None].expand(ROWS, WIDTH + 1, 1)), dataloader=[{"input_ids": prompts}],
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), state=SimpleNamespace(),
        control=SimpleNamespace(should_save=False),
        callback_handler=handler, train_dataset_len=ROWS, is_deepspeed_enabled=False, stop_token_id=EOS, log=logged.update,
        lr_scheduler=SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0]), is_peft_model=False,
    ).items():  # fmt: skip
        setattr(trainer, name, value)
    ppo_trainer.unwrap_model_for_generation = lambda model, *a, **k: contextlib.nullcontext(model)
    ppo_trainer.batch_generation = lambda *a: (torch.cat([prompts, tokens], 1), policy.table.detach()[:, :WIDTH].clone())
    np.random.seed(0)
    trainer.train()
    whole = seen[0]["whole"]
    updates = [{name: plain(value) for name, value in update.items() if name != "whole"} for update in seen]
    names = ("policy/clipfrac_avg", "val/clipfrac_avg", "loss/policy_avg", "loss/value_avg")
    return {"lengths": lengths, "tokens": tokens.tolist(), "raw_scores": plain(scores), **{name: plain(x) for name, x in whole.items()},
            "updates": updates, "metrics": {name: logged[name] for name in names}}  # fmt: skip


def pairs(algorithm: str, arrays: dict[str, np.ndarray], changes: dict[str, Any]) -> tuple[Any, Any]:
    """(loss, log-probabilities that it depends on [2n, T]): first answers in the first half; the second are XPO's reference's."""
    import torch
    from trl.experimental.nash_md.nash_md_trainer import NashMDTrainer
    from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
    from trl.experimental.xpo.xpo_trainer import XPOTrainer

    c = {"beta": 0.1, "alpha": 0.0, "loss_type": "sigmoid"} | changes
    mask, reference = torch.tensor(arrays["mask"]), torch.tensor(arrays["reference"])
    logps = torch.tensor(arrays["logps"]).requires_grad_()
    rewards = torch.tensor(arrays["rewards"])
    half = len(mask) // 2
    kind = {"online_dpo": OnlineDPOTrainer, "xpo": XPOTrainer, "nash_md": NashMDTrainer}[algorithm]
    trainer = object.__new__(kind)
    if algorithm == "nash_md":
        trainer._beta, trainer.state = c["beta"], None
        probability = torch.sigmoid(rewards[:half] - rewards[half:])
        return trainer._compute_losses(logps[:half] * mask[:half], reference[:half], probability)[0], logps
    if algorithm == "xpo":
        trainer._beta, trainer._alpha, trainer.args = c["beta"], c["alpha"], SimpleNamespace(loss_type=c["loss_type"])
        own, other = logps[:half] * mask[:half], logps[half:] * mask[half:]
        return trainer._compute_losses(own, other, reference[half:], reference[:half], rewards[:half] >= rewards[half:])[0], logps
    kept = []
    whole = lambda x: x
    model = torch.nn.Linear(1, 1)
    reference_model = torch.nn.Linear(1, 1)
    for name, value in dict(
        _beta=c["beta"], state=SimpleNamespace(global_step=0), args=SimpleNamespace(
            use_vllm=False, missing_eos_penalty=None, loss_type=c["loss_type"], torch_empty_cache_steps=None, n_gpu=1, optim="",
            gradient_accumulation_steps=1),
        _tokenizer=SimpleNamespace(eos_token_id=EOS), processing_class=SimpleNamespace(batch_decode=lambda ids, **k: [""] * len(ids)),
        is_vision_model=False, reward_funcs=[None], stats=defaultdict(list), ref_model=reference_model, model=model, judge=None,
        accelerator=SimpleNamespace(gather_for_metrics=whole, backward=kept.append),
        _generate=lambda *a: (torch.ones(half, 1).long(), torch.ones(half, 1), mask.long(), mask.long()),
        _forward=lambda which, *a: reference if which is reference_model else logps,
        _calculate_rewards_from_functions=lambda **k: rewards,
    ).items():  # fmt: skip
        setattr(trainer, name, value)
    trainer.training_step(model, {"prompt": ["x"] * half})
    return kept[0], logps


def make_pairs() -> dict[str, np.ndarray]:
    """Two answers to each of three prompts, [6, T], first answers in the first half: mask, logps, reference; and rewards [6]."""
    rng = np.random.default_rng(1)
    mask = (np.arange(6) < np.array([6, 1, 4, 3, 5, 2])[:, None]).astype(float)
    logps = -rng.gamma(1.5, 1.0, mask.shape) * mask
    return {"mask": mask, "logps": logps, "reference": (logps + rng.normal(0, 0.5, mask.shape)) * mask, "rewards": rng.normal(0, 1, 6)}


def plain(value: Any) -> Any:
    """Lists of floats with ten digits."""
    array = np.asarray(value)
    return array.tolist() if array.dtype.kind in "iub" else np.vectorize(lambda x: float(f"{x:.10g}"))(array.astype(np.float64)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl

    arrays = make_pairs()
    stored = {"trl": trl.__version__, "pairs": {name: plain(array) for name, array in arrays.items()}, "losses": [], "ppo": []}
    for algorithm, cases in PAIRS.items():
        for case, changes in cases.items():
            loss, logps = pairs(algorithm, arrays, changes)
            loss.backward()
            found = {"loss": float(f"{loss.item():.12g}"), "gradient": plain(logps.grad)}
            stored["losses"].append({"algorithm": algorithm, "case": case, "settings": changes, **found})
    for case, (lengths, changes) in PPO.items():
        stored["ppo"].append({"case": case, "settings": DEFAULTS | changes, **ppo(lengths, changes)})
    (out / "trl_losses_online.json").write_text(json.dumps(stored) + "\n")
    print(f"{len(stored['losses'])} losses and {len(stored['ppo'])} runs of PPO by TRL {trl.__version__}")


if __name__ == "__main__":
    main()
