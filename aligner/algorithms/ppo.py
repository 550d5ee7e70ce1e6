"""PPO with a critic (arXiv 1707.06347, as in 2203.02155): the reward at the last token, a KL penalty at every token, GAE.

With `ptx_coef` supervised rows come with every update (2203.02155, equation 2), so that what they teach is not unlearnt.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice, check_not_negative, check_positive
from aligner.algorithms.grpo import check_online, lag, reference_params, sampling_differences
from aligner.algorithms.pairs import mean_over
from aligner.data.mixture import is_set
from aligner.likelihood import answer_lengths, make_likelihood, read, sum_answers, tempered
from aligner.logprobs import dense_logits, token_stats
from aligner.losses import policy_gradient
from aligner.models.score_head import with_score_head
from aligner.types import Algorithm, Array, Batch, Mean, Model, Params, Scores, Term, UserError

CRITIC = "critic"  # where its tree stands, beside the policy's
PTX = "ptx_"  # what the arrays of the supervised rows are called by, beside those of the answers


def make(config: ConfigDict, model: Model) -> Algorithm:
    """The algorithm that `config.algorithm` (configs.common.ppo) describes.

    The batch has `advantages`, `returns`, `old_logps`, `old_values`, `sampling_logps`, `learn`, all [B,S]; with `ptx_coef` the arrays of as
    many supervised rows, their names after "ptx_". `carry` counts updates for the critic's warm-up. Metrics are TRL's.
    """
    c = config.algorithm
    check(config)
    R, temperature = c.num_generations, config.generation.temperature
    critic = with_score_head(model)
    supervised = make_likelihood(model, 1, remat=config.train.remat)

    def values(params: Params, batch: Batch, remat="none") -> Array:
        states = read(critic, params[CRITIC], batch, batch["score_from"], remat=remat).hidden
        found = dense_logits(states, critic.head(params[CRITIC]))[..., 0]
        return jnp.where(batch["score_segment"] > 0, found, 0)

    def stats(params: Params, batch: Batch, key=None, remat="none") -> tuple[dict[str, Array], dict]:
        states, aux, _ = read(model, params, batch, batch["score_from"], key, remat)
        tokens = token_stats(states, tempered(model.head(params), temperature), batch["score_token"], ("logp", "entropy"))
        return {name: jnp.where(batch["score_segment"] > 0, value, 0) for name, value in tokens.items()}, aux

    def rollout(params, fixed, batch: Batch) -> dict[str, Array]:
        columns = {"old_logps": stats(params, batch)[0]["logp"], "old_values": values(params, batch)}
        if c.beta > 0:
            columns["reference_logps"] = stats(reference_params(config, fixed), batch)[0]["logp"]
        return columns

    def score(params, fixed, batch: Batch, key) -> Scores:
        tokens, aux = stats(params, batch, key, config.train.remat)
        tokens["value"] = values(params, batch, config.train.remat)
        if c.ptx_coef:
            rows = {name.removeprefix(PTX): x for name, x in batch.items() if name.startswith(PTX)}
            tokens["ptx"] = supervised(params, rows, key).tokens["logp"]
        return Scores(sum_answers(tokens["logp"], batch, R), answer_lengths(batch, R), tokens, aux)

    def objective(scores: Scores, batch: Batch, carry):
        mask = (batch["score_segment"] > 0) * batch["learn"]
        there, count = mask > 0, jnp.sum(mask)
        log_ratio = scores.tokens["logp"] - batch["old_logps"]
        ratio = jnp.exp(log_ratio)
        high = c.epsilon if c.epsilon_high is None else c.epsilon_high
        policy = policy_gradient.clipped(log_ratio, batch["advantages"], c.epsilon, high, c.delta, c.dual_clip)
        policy = policy * lag(config, batch["old_logps"], batch)
        value = policy_gradient.value(scores.tokens["value"], batch["old_values"], batch["returns"], c.cliprange_value)
        acts = jnp.where(carry["updates"] >= c.critic_warmup, 1.0, 0.0)  # the policy is held while the critic warms up
        entropy = scores.tokens["entropy"]
        terms = {
            "policy": Term(1.0, acts * jnp.sum(policy * mask), count),
            "value": Term(c.vf_coef, jnp.sum(value * mask), count),
        }
        if c.entropy_coef:
            terms["entropy"] = Term(-c.entropy_coef, acts * jnp.sum(entropy * mask), count)
        if c.ptx_coef:
            scored = batch[PTX + "score_segment"] > 0
            nll = -jnp.sum(jnp.where(scored, scores.tokens["ptx"], 0))
            terms["ptx"] = Term(c.ptx_coef, acts * nll, jnp.sum(scored))
        # where clipping counts
        clipped = jnp.clip(ratio, 1 - c.epsilon, 1 + high) * batch["advantages"] < ratio * batch["advantages"]
        outside = value > policy_gradient.value(scores.tokens["value"], batch["old_values"], batch["returns"], None)
        found = {
            "val/ratio": mean_over(there, ratio),
            "policy/approxkl_avg": mean_over(there, jnp.square(log_ratio) / 2),
            "policy/clipfrac_avg": mean_over(there, clipped),
            "policy/entropy_avg": mean_over(there, entropy),
            "loss/policy_avg": mean_over(there, policy),
            "loss/value_avg": mean_over(there, value),
            "val/clipfrac_avg": mean_over(there, outside),
        }
        if c.ptx_coef:
            found["loss/ptx_avg"] = Mean(nll, jnp.sum(scored))
        differences = sampling_differences(batch["old_logps"], batch, mask)
        return terms, found | differences, {"updates": carry["updates"] + 1}

    carry = {"updates": jnp.zeros((), jnp.int32)}
    return Algorithm(score, objective, carry=carry, rollout=rollout, needs="prompt")


def open_critic(config: ConfigDict, model: Model, disk):
    """The critic's model and where its weights are: another checkpoint's, or the policy's with a fresh score head.

    Raises:
        UserError: it does not read the tokens that the policy writes.
    """
    from aligner import convert

    if not config.algorithm.critic:
        critic = with_score_head(model)
        return dataclasses.replace(critic, conversion=dataclasses.replace(critic.conversion, fresh=("score.weight",))), disk
    critic, disk = convert.open_model(config.algorithm.critic, score_head=True)
    if critic.assets.tokenizer.get_vocab() != model.assets.tokenizer.get_vocab():
        raise UserError(
            f"config.algorithm.critic {config.algorithm.critic} has another vocabulary than the policy, whose tokens it reads; "
            'take one of the same tokenizer, or "" for the policy itself with a fresh score head'
        )
    if critic.config != model.config:
        raise UserError(f"config.algorithm.critic {config.algorithm.critic} is not of the same shape as {config.model.path}")
    return critic, disk


def clip_and_scale(rewards: np.ndarray, c: ConfigDict, running: list[float]) -> tuple[np.ndarray, list[float]]:
    """Rewards [N, n] standardised by those so far (count, mean, sum of squares about it), and held in bounds; and the numbers moved on."""
    if c.standardize_rewards:
        known = rewards[~np.isnan(rewards)]
        count, mean, squares = running
        for value in known.tolist():  # Welford's
            count += 1
            change = value - mean
            mean += change / count
            squares += change * (value - mean)
        running = [count, mean, squares]
        if count > 1:
            rewards = (rewards - mean) / (np.sqrt(squares / (count - 1)) + 1e-8)
    return (rewards if c.reward_clip is None else np.clip(rewards, -c.reward_clip, c.reward_clip)), running


def adapted(beta: float, kl: float, answers: int, c: ConfigDict) -> float:
    """The adaptive coefficient (arXiv 1909.08593, section 2.2): moved by how far an answer's KL is from its target."""
    if c.kl_target is None:
        return beta
    error = float(np.clip(kl / c.kl_target - 1, -0.2, 0.2))
    return beta * (1 + error * answers / c.kl_horizon)


def check(config: ConfigDict) -> None:
    """What the config alone can have wrong."""
    c = config.algorithm
    check_online(config)
    check_choice("algorithm.kl_estimator", c.kl_estimator, policy_gradient.KL_ESTIMATORS)
    check_not_negative(c, "vf_coef", "critic_warmup", "lam", "gamma", "ptx_coef")
    for name in ("reward_clip", "kl_target", "cliprange_value"):
        if c[name] is not None:
            check_positive(c, name)
    if not c.get("cost_funcs", True):
        raise UserError("config.algorithm.cost_funcs is empty: say what answers cost, as reward_funcs do, or train with ppo")
    if bool(c.ptx_coef) != is_set(config.data.ptx):
        given, missing = ("algorithm.ptx_coef", "data.ptx.path") if c.ptx_coef else ("data.ptx", "algorithm.ptx_coef")
        raise UserError(f"config.{given} is set and config.{missing} is not; supervised rows beside the answers take both")
