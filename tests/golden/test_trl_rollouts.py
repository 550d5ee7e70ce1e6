"""What TRL's GRPO and RLOO trainers make of a rollout, its writing and its models aside: advantages, and metrics by their names."""

import inspect

import numpy as np
import pytest

from tests.golden.checkpoints import EOS, save_llama
from tests.rl.test_rollouts import LENGTHS, LONGEST, rollout
from tests.torch_required import torch

NAN = np.nan
REWARDS = {
    "known": [[[0.3, 1.0], [1.4, NAN], [0.7, 2.0]], [[2.0, 0.0], [-1.0, 4.0], [0.5, 1.0]]],
    "some unknown": [[[0.3, 1.0], [1.4, NAN], [NAN, NAN]], [[2.0, 0.0], [NAN, NAN], [NAN, NAN]]],
    "none of a group": [[[1.0, 1.0]] * 3, [[NAN, NAN]] * 3],
    "alike": [[[1.0, 0.5]] * 3, [[1.0, 0.5], [1.0, 0.5], [NAN, NAN]]],
}
RNG = np.random.default_rng(0)
OLD, REFERENCE = -RNG.exponential(size=(2, 6, LONGEST)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("policy"))


def theirs(name, folder, rewards, tmp_path, **settings):
    """(advantages [2,3], metrics)."""
    import trl
    from datasets import Dataset

    rewards = np.array(rewards, np.float32).reshape(6, 2)
    functions = [lambda completions, column=column, **_: [None if np.isnan(x) else float(x) for x in column] for column in rewards.T]
    functions[0].__name__, functions[1].__name__ = "math", "format"
    config = getattr(trl, f"{name.upper()}Config")(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, num_generations=3,
        per_device_train_batch_size=6, max_completion_length=LONGEST, **settings,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "t8"}, {"prompt": "t9"}])
    trainer = getattr(trl, f"{name.upper()}Trainer")(str(folder), functions, config, rows)
    trainer.model.train()
    tokens = [[5] * (m - 1) + [5 if m == LONGEST else EOS] for m in LENGTHS.ravel()]
    written = dict(prompt_ids=[[8]] * 6, completion_ids=tokens, completions=[""] * 6)
    names = inspect.getsource(trainer._generate).rpartition("return ")[2].strip().split(", ")  # of what it returns
    lengths = torch.tensor(LENGTHS.ravel())
    trainer._generate = lambda prompts: tuple(written.get(name) for name in names)
    logps = lambda model, *_, **__: (torch.tensor(REFERENCE if model is trainer.ref_model else OLD)[:, : lengths.max()], None, None)
    trainer._get_per_token_logps_and_entropies = logps
    made = trainer._generate_and_score_completions([{"prompt": "t8"}] * 3 + [{"prompt": "t9"}] * 3)
    return made["advantages"].numpy().reshape(2, 3), {key: found[-1] for key, found in trainer._metrics["train"].items()}


@pytest.mark.parametrize("case", REWARDS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", dict(scale_rewards="group")),
        ("grpo", dict(scale_rewards="batch")),
        ("grpo", dict(scale_rewards="none")),
        ("rloo", dict(beta=0.0)),
        ("rloo", dict(beta=0.3)),
        ("rloo", dict(beta=0.3, mask_truncated_completions=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_equals_trl(name, settings, case, folder, tmp_path):
    advantages, metrics = theirs(name, folder, REWARDS[case], tmp_path, **settings)
    cut = lambda column: [[column[3 * i + j, :m] for j, m in enumerate(row)] for i, row in enumerate(LENGTHS)]
    columns = {"old_logps": cut(OLD)} | ({"reference_logps": cut(REFERENCE)} if settings.get("beta") else {})
    batch, found, _ = rollout(name, np.array(REWARDS[case]), columns, **settings)
    starts = np.cumsum(LENGTHS, axis=1) - LENGTHS
    np.testing.assert_allclose(np.take_along_axis(batch["advantages"], starts, axis=1), advantages, rtol=1e-4, atol=1e-5)
    assert metrics.keys() >= {"reward", "frac_reward_zero_std"}
    for key, value in metrics.items():
        if not np.isnan(value):  # a deviation of one reward, which is 0 here
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
