"""GRPO and the others that learn from groups of their own answers without a critic: RLOO, REINFORCE and its kin, ReMax.

They share one objective over tokens and differ in how rewards become advantages (aligner/rl/advantages.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice, check_not_negative
from aligner.algorithms.pairs import mean_over
from aligner.data.mixture import is_set
from aligner.likelihood import make_likelihood, spread, sum_answers
from aligner.lora import without_adapters
from aligner.losses import policy_gradient
from aligner.rl.advantages import SCALES
from aligner.types import Algorithm, Array, Batch, Float, Max, Mean, Min, Model, Scores, Term, UserError

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence", "sequence_sum")
PENALISED = ("rloo", "reinforce", "reinforce_plus_plus", "remax")  # their KL is part of the reward


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm` (configs.common.grpo, rloo, ..) describes.

    The batch has `advantages` [B,S]; `old_logps` [B,S] where a rollout serves several updates, else the policy is the one that wrote;
    `reference_logps` [B,S] with beta > 0; `sampling_logps` [B,S] as the sampler saw them; `learn` [B,S], 0 at tokens left out.
    Metrics are TRL's.
    """
    c = config.algorithm
    check(config)
    R, temperature = c.num_generations, config.generation.temperature
    policy = make_likelihood(model, R, ("logp", "entropy"), config.train.remat, temperature)
    frozen = make_likelihood(model, R, ("logp", "entropy"), temperature=temperature)
    in_loss = c.beta > 0 and c.name not in PENALISED
    estimator = "k2" if c.name == "reinforce_plus_plus_baseline" else "k3"

    def rollout(params, fixed, batch: Batch) -> dict[str, Array]:
        stats = frozen(params, batch).tokens
        columns = {"old_logps": stats["logp"], "old_entropy": stats["entropy"]}
        if c.beta > 0:
            columns["reference_logps"] = frozen(reference_params(config, fixed), batch).tokens["logp"]
        return columns

    def objective(scores: Scores, batch: Batch, carry):
        logps, mask = scores.tokens["logp"], (batch["score_segment"] > 0) * batch["learn"]
        old = batch.get("old_logps", jax.lax.stop_gradient(logps))
        log_ratio, advantages = logps - old, batch["advantages"].astype(logps.dtype)
        lengths = sum_answers(mask, batch, R)
        summed = lambda x: sum_answers(x * mask, batch, R)
        level = {
            "token": lambda: log_ratio,
            "sequence": lambda: spread(summed(log_ratio) / jnp.maximum(lengths, 1), batch),
            "sequence_sum": lambda: spread(summed(log_ratio), batch),
        }[c.importance_sampling_level]()
        high = c.epsilon if c.epsilon_high is None else c.epsilon_high
        found = metrics(level, advantages, mask, lengths, c, high, batch)
        lagging = lag(config, old, batch)
        match c.loss_type:
            case "cispo":
                losses = policy_gradient.cispo(level, logps, advantages, high)
            case "sapo":
                losses = policy_gradient.sapo(level, advantages, c.sapo_temperature_pos, c.sapo_temperature_neg)
            case "vespo":
                # from the policy that wrote, whoever that was, to this one
                sequence = spread(summed(jnp.clip(log_ratio, -20, 20) + jnp.log(lagging)), batch)
                settings = (c.vespo_k_pos, c.vespo_lambda_pos, c.vespo_k_neg, c.vespo_lambda_neg)
                losses = policy_gradient.vespo(sequence, logps, advantages, *settings)
            case _:
                losses = policy_gradient.clipped(level, advantages, c.epsilon, high, c.delta, c.dual_clip)
        if c.off_policy_mask_threshold is not None:
            wrote = batch["sampling_logps"] if config.generation.server else old
            drift = spread(summed(wrote - jax.lax.stop_gradient(logps)) / jnp.maximum(lengths, 1), batch)
            losses = losses * ((advantages >= 0) | (drift <= c.off_policy_mask_threshold))
        losses = losses if c.loss_type == "vespo" else losses * lagging
        if "sure" in batch:
            losses = jnp.where(batch["sure"] > 0, 0, losses)
        if in_loss:
            kl = policy_gradient.kl(logps, batch["reference_logps"], estimator)
            kl = kl * jnp.exp(level) if c.use_bias_correction_kl else kl
            losses = losses + c.beta * kl
            found["kl"] = mean_over(mask > 0, kl)
        # every answer of a prompt that is there counts, whether or not anything of it is scored
        answers = R * jnp.sum(batch["example_id"] >= 0)
        tokens = jnp.sum(mask)
        total, per_answer = jnp.sum(losses * mask), summed(losses)
        term = {
            "grpo": (jnp.sum(per_answer / jnp.maximum(lengths, 1)), answers),
            "dr_grpo": (total / longest(config), answers),
            "luspo": (jnp.sum(per_answer), answers),
        }
        terms = {c.loss_type: Term(1.0, *term.get("grpo" if c.loss_type == "sapo" else c.loss_type, (total, tokens)))}
        entropy = scores.tokens["entropy"]
        if c.entropy_coef:
            acts = mask * (batch["sure"] == 0) if "sure" in batch else mask
            terms["entropy"] = Term(-c.entropy_coef, jnp.sum(entropy * acts), jnp.sum(acts))
        found["entropy"] = mean_over(mask > 0, entropy)
        return terms, found | sampling_differences(old, batch, mask), carry

    return Algorithm(lambda params, fixed, batch, key: policy(params, batch, key), objective, rollout=rollout, needs="prompt")


def longest(config: ConfigDict) -> int:
    """The most tokens that the policy may write in an answer: of all its turns, where an environment hears several."""
    return config.generation.max_new_tokens * (config.algorithm.max_turns if config.algorithm.environment else 1)


def reference_params(config: ConfigDict, fixed):
    """The reference's parameters: a frozen copy, or the base with its adapters off."""
    return without_adapters(fixed) if config.reference.kind == "base" else fixed["reference"]


def policy_and_rollout(config: ConfigDict, model: Model) -> tuple[Callable, Callable]:
    """The policy's likelihood; and what a rollout adds to its batch, log-probabilities by the policy that wrote and by the reference."""
    R, temperature = config.algorithm.num_generations, config.generation.temperature
    policy = make_likelihood(model, R, ("logp", "entropy"), config.train.remat, temperature)
    frozen = make_likelihood(model, R, temperature=temperature)

    def rollout(params, fixed, batch: Batch) -> dict[str, Array]:
        reference = frozen(reference_params(config, fixed), batch).tokens["logp"]
        return {"old_logps": frozen(params, batch).tokens["logp"], "reference_logps": reference}

    return policy, rollout


def metrics(log_ratio, advantages, mask, lengths: Float[Array, "B G R"], c: ConfigDict, high: float, batch: Batch) -> dict:
    """TRL's clip ratios, shares of tokens or, where the ratio is the answer's, of answers; and the ratio's own mean."""
    ratio, there, R = jnp.exp(log_ratio), mask > 0, c.num_generations
    share = lambda x: sum_answers(x * mask, batch, R) / jnp.maximum(lengths, 1)
    of_tokens = c.importance_sampling_level == "token"
    mean = lambda x: mean_over(there, x) if of_tokens else Mean(jnp.sum(share(x)), R * jnp.sum(batch["example_id"] >= 0))
    found = {"ratio": mean_over(there, ratio)}
    if c.loss_type == "cispo":
        return found | {"cispo_clip_ratio": mean((ratio > high) & (advantages > 0))}
    held = ratio if c.delta is None else jnp.minimum(ratio, c.delta)
    low = (held < 1 - c.epsilon) & (advantages < 0)
    up = (held > 1 + high) & (advantages > 0)
    return found | {
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/high_mean": mean(up),
        "clip_ratio/region_mean": mean(low | up),
        "clip_ratio/low_min": Min(jnp.min(jnp.where(lengths > 0, share(low), jnp.inf))),
        "clip_ratio/high_max": Max(jnp.max(jnp.where(lengths > 0, share(up), -jnp.inf))),
    }


def lag(config: ConfigDict, old_logps, batch: Batch) -> Array | float:
    """What a token's loss is multiplied by where a server wrote it, whose policy lags behind and rounds otherwise; else 1."""
    if not config.generation.server:
        return 1.0
    return jnp.minimum(jnp.exp(jax.lax.stop_gradient(old_logps) - batch["sampling_logps"]), config.generation.importance_cap)


def sampling_differences(old_logps, batch: Batch, mask) -> dict:
    """How far the sampler's log-probabilities are from a training pass's of the same policy: rounding alone, or something is wrong."""
    difference = jnp.where(mask > 0, jax.lax.stop_gradient(old_logps) - batch["sampling_logps"], 0)
    ratio = jnp.where(mask > 0, jnp.exp(difference), 1)
    return {
        "sampling/sampling_logp_difference/mean": Mean(jnp.sum(jnp.abs(difference)), jnp.sum(mask > 0)),
        "sampling/sampling_logp_difference/max": Max(jnp.max(jnp.abs(difference))),
        "sampling/importance_sampling_ratio/min": Min(jnp.min(ratio)),
        "sampling/importance_sampling_ratio/max": Max(jnp.max(ratio)),
    }


def check(config: ConfigDict) -> None:
    """What the config alone can have wrong."""
    c = config.algorithm
    check_choice("algorithm.loss_type", c.loss_type, LOSS_TYPES)
    check_choice("algorithm.importance_sampling_level", c.importance_sampling_level, LEVELS)
    check_choice("algorithm.scale_rewards", c.scale_rewards, SCALES)
    check_choice("algorithm.multi_objective", c.multi_objective, ("sum", "gdpo"))
    check_online(config)
    if c.name in ("grpo", "rloo", "reinforce_plus_plus_baseline") and c.num_generations < 2:
        raise UserError(f"config.algorithm.num_generations is {c.num_generations}, but {c.name} compares answers to one prompt: at least 2")
    if c.dynamic_sampling and c.num_generations < 2:
        raise UserError("config.algorithm.dynamic_sampling leaves out prompts whose answers are worth the same, as one alone is; set 0")
    if not 0 < c.top_entropy_quantile <= 1:
        raise UserError(f"config.algorithm.top_entropy_quantile is {c.top_entropy_quantile}; it is a share, above 0 and at most 1")


def check_online(config: ConfigDict) -> None:
    """What all online algorithms have in common."""
    c = config.algorithm
    check_not_negative(c, "beta", "overlong_buffer", "overlong_penalty")
    check_not_negative(c, *(name for name in ("epsilon", "epsilon_high", "delta", "dynamic_sampling") if c.get(name) is not None))
    for name in ("num_generations", "num_iterations", "num_mini_batches", "max_turns"):
        if c[name] < 1:
            raise UserError(f"config.algorithm.{name} is {c[name]}; it must be at least 1")
    if not c.reward_timeout > 0:
        raise UserError(f"config.algorithm.reward_timeout is {c.reward_timeout}; it is in seconds, above 0")
    if c.get("dual_clip") is not None and not c.dual_clip > 1:
        raise UserError(f"config.algorithm.dual_clip is {c.dual_clip}; it must be above 1, or None")
    if not c.reward_funcs and not c.environment and c.name != "on_policy_distillation":
        raise UserError('config.algorithm.reward_funcs is empty: say what answers are worth, such as ("math",) or a reward model\'s path')
    if c.reward_weights and len(c.reward_weights) != len(c.reward_funcs):
        weights, names = tuple(c.reward_weights), tuple(c.reward_funcs)
        raise UserError(f"config.algorithm.reward_weights {weights} must have one number for each of reward_funcs {names}")
    if others := [name for name, source in config.data.evals.items() if is_set(source)]:
        raise UserError(f"config.data.evals.{others[0]} is set, but an online run evaluates on config.data.eval alone; leave it out")
    if config.data.packing and not c.get("ptx_coef"):
        raise UserError("config.data.packing is True, but the answers to a prompt are a row of their own here; set it to False")
    if config.generation.temperature <= 0:
        raise UserError(f"config.generation.temperature is {config.generation.temperature}; learning from samples needs it above 0")
