"""Supervised fine-tuning, and continued pre-training, which is the same on running text."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from aligner.algorithms.checks import check_choice, check_not_negative
from aligner.likelihood import make_likelihood
from aligner.losses.supervised import LOSSES
from aligner.types import Algorithm, Batch, Head, Mean, Model, Params, Scores, Term


def make(config: ConfigDict, model: Model) -> Algorithm:
    """SFT (`name="sft"`) or CPT (`name="cpt"`): the mean loss of all scored tokens of the global batch, as TRL's SFTTrainer has it.

    Metrics are TRL's: `entropy` and `mean_token_accuracy`, means over scored tokens.
    """
    c = config.algorithm
    check_choice("algorithm.loss_type", c.loss_type, LOSSES)
    check_not_negative(c, "neftune_noise_alpha", "z_loss")
    stats = ("logp", "entropy", "correct", *(("lse",) if c.z_loss else ()))
    likelihood = make_likelihood(model, answers=1, stats=stats, remat=config.train.remat)

    def score(params: Params, fixed, batch: Batch, key) -> Scores:
        if c.neftune_noise_alpha and key is not None:  # evaluation has no key, and no noise
            noise_key, key = jax.random.split(key)
            batch = {**batch, "embedding_noise": neftune(noise_key, batch["segment_ids"], model.head(params), c.neftune_noise_alpha)}
        return likelihood(params, batch, key)

    def objective(scores: Scores, batch: Batch, carry):
        count = jnp.sum(scores.lengths)
        scored = batch["score_segment"] > 0
        total = lambda values: jnp.sum(jnp.where(scored, values, 0))
        terms = {c.loss_type: Term(1.0, total(LOSSES[c.loss_type](scores.tokens["logp"])), count)}
        if c.z_loss:
            terms["z_loss"] = Term(c.z_loss, total(jnp.square(scores.tokens["lse"])), count)
        metrics = {
            "entropy": Mean(total(scores.tokens["entropy"]), count),
            "mean_token_accuracy": Mean(total(scores.tokens["correct"]), count),
        }
        return terms, metrics, carry

    return Algorithm(score, objective, needs="text" if c.name == "cpt" else "supervised")


def neftune(key: Array, segment_ids: Array, head: Head, alpha: float) -> Float[Array, "B T D"]:
    """Uniform noise of +-alpha / sqrt(L * D) on the embeddings (NEFTune, arXiv 2310.05914, algorithm 1).

    L is the length of the token's own segment, so that padding and packing do not change how strong the noise is.

    Args:
        key: of the noise.
        segment_ids: [B,T].
        head: tells the width D and the dtype.
        alpha: the paper's; 5 to 15 are its values.
    """
    width = head.weight.shape[1 if head.transposed else 0]
    length = jnp.sum(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)
    magnitude = alpha / jnp.sqrt(length * width)
    noise = jax.random.uniform(key, (*segment_ids.shape, width), jnp.float32, -1, 1) * magnitude[..., None]
    return noise.astype(head.weight.dtype)
