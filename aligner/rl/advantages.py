"""From rewards to advantages, over a whole rollout, on the host in float64: constants of the updates that follow.

[N, n] arrays hold the n answers of N prompts; NaN where no reward function gave a value, and the advantage there is 0.
"""

from __future__ import annotations

import numpy as np

SCALES = ("group", "batch", "none")


def combine(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Several rewards as one: the weighted sum of those that have a value.

    Args:
        rewards: [N, n, K], NaN where a function gave None.
        weights: [K].

    Returns:
        [N, n], NaN where no function gave a value.
    """
    if not rewards.shape[-1]:
        return np.zeros(rewards.shape[:-1])
    total = np.nansum(rewards * weights, axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, total)


def std(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Unbiased, over the values there are; 0 where there is one or none."""
    count = np.sum(~np.isnan(x), axis=axis, keepdims=True)
    return np.sqrt(np.nansum((x - mean(x, axis)) ** 2, axis=axis, keepdims=True) / np.maximum(count - 1, 1))


def mean(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Over the values there are; 0 where there is none."""
    return np.nansum(x, axis=axis, keepdims=True) / np.maximum(np.sum(~np.isnan(x), axis=axis, keepdims=True), 1)


def grpo(rewards: np.ndarray, scale: str = "group") -> np.ndarray:
    """GRPO (arXiv 2402.03300): a reward less its group's mean, by the group's or the batch's standard deviation + 1e-4, or as it is."""
    centred = rewards - mean(rewards, 1)
    scaled = {"group": lambda: centred / (std(rewards, 1) + 1e-4), "batch": lambda: centred / (std(rewards, None) + 1e-4)}
    return np.nan_to_num(scaled[scale]() if scale in scaled else centred)


def normalised_apart(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N, n]: every reward function of [N, n, K] normalised in its group, then their weighted sum, which GDPO normalises over the batch."""
    each = np.stack([grpo(rewards[..., k]) for k in range(rewards.shape[-1])], axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, np.sum(each * weights, axis=-1))


def rloo(rewards: np.ndarray) -> np.ndarray:
    """RLOO (arXiv 2402.14740): a reward less the mean of its group's others; 0 where there are none."""
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    others = (np.nansum(rewards, axis=1, keepdims=True) - np.nan_to_num(rewards)) / np.maximum(count - 1, 1)
    return np.where(known & (count > 1), np.nan_to_num(rewards) - others, 0.0)


def reinforce(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE: the reward less the batch's mean."""
    return np.nan_to_num(rewards - mean(rewards, None))


def whiten_batch(rewards: np.ndarray) -> np.ndarray:
    """Over the batch: mean 0, standard deviation 1 (+ 1e-4)."""
    return np.nan_to_num((rewards - mean(rewards, None)) / (std(rewards, None) + 1e-4))


def reinforce_baseline(rewards: np.ndarray) -> np.ndarray:
    """REINFORCE++ with baseline (arXiv 2501.03262): the group's mean is taken off, the batch's deviation divides."""
    return whiten_batch(rewards - mean(rewards, 1))


def remax(rewards: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """ReMax (arXiv 2310.10505): the reward less that of the greedy answer to the same prompt, [N]."""
    return np.nan_to_num(rewards - greedy[:, None])


def whiten(x: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """Mean 0 and variance 1 over where the mask is true (unbiased variance + 1e-8); without `shift_mean` the mean stays."""
    count = max(int(mask.sum()), 1)
    middle = np.sum(x, where=mask) / count
    variance = np.sum((x - middle) ** 2, where=mask) / max(count - 1, 1)
    scaled = (x - middle) / np.sqrt(variance + 1e-8)
    return np.where(mask, scaled if shift_mean else scaled + middle, 0.0)


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) of one answer, which ends where its arrays end.

    Args:
        rewards, values: [m], at each of its tokens.

    Returns:
        [m]; added to the values they are the returns.
    """
    delta = rewards + gamma * np.append(values[1:], 0.0) - values
    advantages = np.zeros_like(delta)
    later = 0.0
    for t in range(len(delta) - 1, -1, -1):
        advantages[t] = later = delta[t] + gamma * lam * later
    return advantages


def discounted(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """[m]: what follows from each token on."""
    return gae(rewards, np.zeros_like(rewards), gamma, 1.0)


def overlong_penalty(lengths: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13), in tokens: 0 up to longest - buffer, then linear to -1 at `longest`."""
    if not buffer:
        return np.zeros(np.shape(lengths))
    return np.clip((longest - buffer - np.asarray(lengths, float)) / buffer, -1.0, 0.0)
