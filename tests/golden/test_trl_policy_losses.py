"""GRPO's and RLOO's losses and gradients against numbers that the real TRL computed (scripts/make_trl_policy_vectors.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.algorithms import make
from aligner.likelihood import answer_lengths
from aligner.types import Scores
from configs import common
from tests.models import tiny

STORED = json.loads((Path(__file__).parent / "vectors" / "trl_losses_policy.json").read_text())
ARRAYS = {name: np.array(value) for name, value in STORED["batch"].items()}
R = 3  # answers of a prompt: two rows of three


def at_slots(array):
    """[6, T] answers -> [2, S] scored positions of two rows, each answer after the one before."""
    lengths = ARRAYS["mask"].sum(1).astype(int)
    rows = [np.concatenate([array[i, : lengths[i]] for i in range(3 * row, 3 * row + 3)]) for row in range(2)]
    S = max(map(len, rows)) + 2  # and some padding
    return np.stack([np.pad(row, (0, S - len(row))) for row in rows])


def batch_of(advantages):
    spread = np.where(ARRAYS["mask"] > 0, advantages[:, None], 0)
    role = at_slots(np.where(ARRAYS["mask"] > 0, np.tile([[1], [2], [3]], (2, 1)), 0)).astype(np.int32)
    return {
        "score_segment": jnp.asarray(role > 0, jnp.int32),
        "score_role": jnp.asarray(role),
        "example_id": jnp.zeros((2, 1), jnp.int32),
        "advantages": jnp.asarray(at_slots(spread)),
        "old_logps": jnp.asarray(at_slots(ARRAYS["old"])),
        "reference_logps": jnp.asarray(at_slots(ARRAYS["reference"])),
        "sampling_logps": jnp.asarray(at_slots(ARRAYS["old"])),
        "learn": jnp.asarray((role > 0).astype(float)),
    }


def objective_of(algorithm, **settings):
    config = tiny.config()
    config.algorithm = getattr(common, algorithm)()
    config.algorithm.update(dict(reward_funcs=("math",), num_generations=R, beta=0.0) | settings)
    config.generation.max_new_tokens = STORED["longest"]
    return make(config, tiny.family("llama").model).objective


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: f"{case['algorithm']}: {case['case']}")
def test_loss_and_gradient(case):
    with jax.enable_x64(True):
        batch = batch_of(ARRAYS["advantages"])
        objective = objective_of(case["algorithm"], **case["settings"])

        def loss(logps):
            tokens = {"logp": logps, "entropy": jnp.asarray(at_slots(ARRAYS["entropy"]))}
            lengths = answer_lengths(batch, R)
            terms, _, _ = objective(Scores(lengths, lengths, tokens, {}), batch, {})
            return sum(term.weight * term.sum / term.count for term in terms.values())

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(at_slots(ARRAYS["logps"])))
    assert float(value) == pytest.approx(case["loss"], rel=1e-6)
    wanted = at_slots(np.array(case["gradient"]))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6 * np.abs(wanted).max())


def test_a_group_is_one_prompt_and_a_shuffled_one_gives_another_loss():
    """The vectors would not notice if answers changed places between groups; the lengths of the answers do."""
    batch = batch_of(ARRAYS["advantages"])
    assert np.asarray(answer_lengths(batch, R))[:, 0].tolist() == [[7, 1, 4], [2, 5, 3]]
