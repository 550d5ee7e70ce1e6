"""Distillation from less than a teacher's whole distribution: a few tokens of it, the one that stands there, or another vocabulary's.

Throughout, at each position:
    log_p, log_q   log-probabilities of student and teacher over the vocabulary; p and q are the probabilities
    logps          log-probabilities of the token that stands there
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aligner.losses.distillation import generalized_jsd
from aligner.losses.reference_free import log1mexp
from aligner.sharding import largest, taken

Values = Float[Array, "..."]
SUPPORTS = ("student", "teacher", "both")
ABSENT = -1e30  # log-probability of what is not there: finite, so that 0 * (ABSENT - ABSENT) is 0


def likeliest(log_p: Float[Array, "... V"], log_q: Float[Array, "... V"], k: int, of: str) -> Int[Array, "... K"]:
    """The tokens that are compared.

    Args:
        k: how many of each.
        of: whose likeliest, one of SUPPORTS; of both they are 2k, and some may stand there twice.
    """
    chosen = {"student": (log_p,), "teacher": (log_q,), "both": (log_q, log_p)}[of]
    return jnp.concatenate([largest(x, k, "vocab") for x in chosen], axis=-1)


def few_tokens_jsd(
    log_p: Float[Array, "... V"], log_q: Float[Array, "... V"], support: Int[Array, "... K"], beta: float, add_tail: bool = True
) -> Values:
    """The generalised Jensen-Shannon divergence (`aligner.losses.distillation`) over the tokens of `support`.

    Args:
        support: token ids; one that stands there again counts once.
        beta: as in `generalized_jsd`.
        add_tail: all other tokens are one more; without, they are forgotten and the rest is made to sum to one.
    """
    again = jnp.any(jnp.tril(support[..., :, None] == support[..., None, :], -1), axis=-1)
    return generalized_jsd(_over(log_p, support, again, add_tail), _over(log_q, support, again, add_tail), beta)


def _over(log_p, support, again: Bool[Array, "... K"], add_tail: bool):
    few = jnp.where(again, ABSENT, taken(log_p, support, "vocab"))
    total = jax.nn.logsumexp(few, axis=-1, keepdims=True)
    # where the few have everything, the tail is held at 1e-7, as in TRL
    return jnp.concatenate([few, log1mexp(jnp.minimum(total, -1e-7))], axis=-1) if add_tail else few - total


def sampled_reverse_kl(logps: Values, teacher_logps: Values) -> Values:
    """sg(log p - log q) log p of a token that the student wrote: its gradient estimates that of KL(p || q) without bias."""
    return jax.lax.stop_gradient(logps - teacher_logps) * logps


def iw_opd(logps: Values, advantages: Values, weight: Values) -> Values:
    """On-policy distillation with early tokens weighted more (IW-OPD, arXiv 2606.22600): -w a log p.

    Where w is 1, at gamma = 0, it is `sampled_reverse_kl` of the student that wrote.

    Args:
        advantages: a = log q - log p_old, p_old being the student that wrote; a constant.
        weight: w, by `iw_opd_weight`; a constant.
    """
    return -jax.lax.stop_gradient(weight * advantages) * logps


def iw_opd_weight(before: Values, total: Values, gamma: float, epsilon: float = 1e-8) -> Values:
    """1 + gamma (1 - before / total): from 1 + gamma at an answer's first token down to 1.

    Args:
        before, total: |a| summed over the tokens of the answer that stand before this one, and over all of them.
    """
    return 1 + gamma * (1 - before / jnp.maximum(total, epsilon))


def importance(logps: Values, old_logps: Values, cap: float) -> Values:
    """min(p / p_old, cap), a constant: how much likelier a token is than when it was written. The log-ratio is held in [-20, 20]."""
    return jnp.minimum(jnp.exp(jnp.clip(jax.lax.stop_gradient(logps - old_logps), -20, 20)), cap)


def uld(p: Float[Array, "... V"], q: Float[Array, "... W"]) -> Values:
    """Universal logit distillation (arXiv 2402.12030): sum_i |p_(i) - q_(i)|, probabilities in descending order, so that
    the two vocabularies need have nothing in common; the smaller is filled up with zeros."""
    size = max(p.shape[-1], q.shape[-1])
    ordered = lambda x: jnp.pad(-jnp.sort(-x, axis=-1), [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    return jnp.sum(jnp.abs(ordered(p) - ordered(q)), axis=-1)


def hybrid_uld(
    p: Float[Array, "... V"],
    q: Float[Array, "... W"],
    ours: Int[Array, "M"],
    theirs: Int[Array, "M"],
    beta: float,
    weights: tuple[float, float] | None = None,
) -> Values:
    """GOLD's: the divergence where the vocabularies share a token, `uld` of the rest.

    Args:
        ours, theirs: ids of the shared tokens in the student's and in the teacher's vocabulary.
        beta: as in `generalized_jsd`, which here is of probabilities that need not sum to one, none below 1e-8.
        weights: of the two parts; None: how much of the teacher's vocabulary is shared, and how much is not.
    """
    shared, other = weights or (len(theirs) / q.shape[-1], 1 - len(theirs) / q.shape[-1])
    logs = lambda x, ids: jnp.log(jnp.maximum(x[..., ids], 1e-8))
    known = generalized_jsd(logs(p, ours), logs(q, theirs), beta)
    return shared * known + other * uld(p.at[..., ours].set(0), q.at[..., theirs].set(0))


def merge_tokens(p: Float[Array, "T V"], at: Float[Array, "T"], group: Int[Array, "T"], groups: int, last: bool) -> Float[Array, "G V"]:
    """The distributions of an answer's tokens, those of one group made one: where one tokenizer writes several tokens, the other one.

    Args:
        p: probabilities at each token.
        at: of the token that stands there.
        group: which group a token belongs to, ascending from 0.
        groups: how many there are.
        last: a group's distribution is that at its last token, given those before; else that at its first. It is multiplied by `at` of
            the others, held above 1e-8.
    """
    edge = group != jnp.roll(group, -1 if last else 1)
    edge = edge.at[-1 if last else 0].set(True)
    member = jax.nn.one_hot(group, groups, axis=0, dtype=p.dtype)
    others = jnp.exp(member @ jnp.where(edge, 0, jnp.log(jnp.maximum(at, 1e-8))))
    return (member * edge) @ p * others[:, None]
