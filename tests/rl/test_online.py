"""Online training as a whole: what a rollout is made of, what later updates see, and going on after a kill with the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import online, sharding
from aligner.algorithms import make, ppo
from aligner.algorithms.grpo import check, check_online
from aligner.data import catalogue
from aligner.data.templates import Encoded, chat_template
from aligner.generation.engine import Completion, Prompt
from aligner.rl import rollouts
from aligner.rl.prompts import Item
from aligner.rl.rollouts import Group
from aligner.stopping import Stopped
from aligner.types import UserError
from configs import common, grpo_llama3, ppo_llama3
from scripts.make_tiny_checkpoint import make_llama
from scripts.online_demo import make_sums, make_words
from tests.models import tiny


def brevity(prompts, completions, **columns):
    """Some reward that differs among answers."""
    return [float(len(text)) - 0.1 * len(prompt[0]["content"]) for prompt, text in zip(prompts, completions)]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The suite simulates eight devices, which take turns on two cores."""
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: original(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    make_llama(folder / "model", tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1)
    make_sums(folder / "data", scored=3)
    return folder


def settings(demo, name, **changes):
    """The tiny preset of an algorithm on the demo, smaller still; changes by dotted name, two underscores for the dot."""
    config = {"ppo": ppo_llama3, "grpo": grpo_llama3}[name].get_config("tiny").unlock()
    config.setup = ""
    config.model.path = str(demo / "model")
    config.data.train.path = str(demo / "data" / "train.jsonl")
    config.data.eval.path = ""
    config.data.batch_size = 8
    config.algorithm.reward_funcs = ("tests.rl.test_online:brevity",)
    config.algorithm.reward_weights = ()
    config.algorithm.num_generations = 2
    config.generation.max_new_tokens = 4
    config.generation.batch_size = 16
    config.log.every = 1
    config.log.completions = 0
    config.optim.warmup = 0.0
    config.checkpoint.every = 3
    config.checkpoint.export = False
    config.train.steps = 6
    for key, value in changes.items():
        section, _, key = key.partition("__")
        config[section][key] = value
    return config.lock()


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Nothing catches this: as if the process were gone."""


def test_prompts_are_written_by_the_chat_template_of_the_config(demo, tmp_path, monkeypatch):
    """As rows are in other runs, and as the preview shows them; the setting was passed over."""
    asked = []

    def look(config, split, model, *rest):
        asked.append(model)
        raise Killed

    monkeypatch.setattr(online, "load_prompts", look)
    with pytest.raises(Killed):
        online.run(settings(demo, "grpo", data__chat_template="zephyr"), tmp_path)
    assert chat_template(asked[0].assets) == catalogue.template("zephyr")


@pytest.mark.slow
def test_a_run_killed_within_a_ppo_rollout_goes_on_bit_for_bit(demo, tmp_path, monkeypatch):
    """Four updates a rollout; saved after the third, killed after the fifth."""
    config = settings(demo, "ppo", algorithm__num_mini_batches=2, algorithm__num_iterations=2, algorithm__beta=0.1, train__steps=9)
    online.run(config, tmp_path / "whole")
    shown = []
    original = rollouts.collect
    monkeypatch.setattr(rollouts, "collect", lambda *a: (shown.append(a[2]), original(*a))[1])
    finite = online.check_finite

    def kill(step, *rest):
        if step == 5:
            raise Killed
        return finite(step, *rest)

    monkeypatch.setattr(online, "check_finite", kill)
    with pytest.raises(Killed):
        online.run(config, tmp_path / "killed")
    monkeypatch.setattr(online, "check_finite", finite)
    online.run(config, tmp_path / "killed")
    assert shown == [0, 16, 16, 32], "the first rollout is not made again, the second from the same prompts"
    whole, killed = records(tmp_path / "whole"), records(tmp_path / "killed")
    for record in (*whole, *killed):
        record.pop("time/rollout"), record.pop("time/scoring")
    assert killed == whole
    for file in sorted((tmp_path / "whole" / "completions").iterdir()):
        assert file.read_bytes() == (tmp_path / "killed" / "completions" / file.name).read_bytes()
    # the first update of a rollout is on-policy, later ones are not
    assert whole[0]["val/ratio"] == 1 and whole[0]["policy/approxkl_avg"] < 1e-10
    assert whole[1]["policy/approxkl_avg"] > 1e-9 and whole[3]["policy/approxkl_avg"] > 1e-7
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-4 for record in whole)


@pytest.mark.slow
def test_stopped_between_updates(demo, tmp_path, monkeypatch):
    config = settings(demo, "grpo", algorithm__num_iterations=2, checkpoint__every=100)
    online.run(config, tmp_path / "whole")
    finite = online.check_finite

    def stop(step, *rest):
        finite(step, *rest)
        if step == 3:
            raise Stopped(15)

    monkeypatch.setattr(online, "check_finite", stop)
    with pytest.raises(Stopped):
        online.run(config, tmp_path / "stopped")
    monkeypatch.setattr(online, "check_finite", finite)
    online.run(config, tmp_path / "stopped")
    found, wanted = ({r["step"]: r["loss"] for r in records(tmp_path / name)} for name in ("stopped", "whole"))
    assert {step: loss for step, loss in found.items()} == {step: loss for step, loss in wanted.items() if step in found}
    assert set(found) >= {1, 2, 4, 5, 6}


# ---- what an update learns from


def answer(*tokens):
    return Completion(np.array(tokens, np.int32), -np.ones(len(tokens), np.float32), True)


def group(row, prompt, answers, rewards):
    encoded = Encoded(np.array(prompt, np.int32), ())
    item = Item(row, "x", encoded, Prompt(encoded.prompt), {})
    return Group(item, [answer(*a) for a in answers], ["x"] * len(answers), np.array(rewards, float)[:, None])


GROUPS = [group(4, [3, 5, 7], [[9, 2], [11, 12, 13, 2]], [1.0, 0.0]), group(6, [8, 9], [[4, 4, 2], [2]], [0.0, 2.0])]


def config_of(name, **changes):
    config = tiny.config()
    config.algorithm = getattr(common, name)()
    config.algorithm.update(dict(reward_funcs=("math",), num_generations=2, beta=0.0) | changes)
    config.generation.max_new_tokens = 4
    return config


@pytest.mark.parametrize("setting", ["epsilon_high", "delta", "dynamic_sampling"])
def test_what_may_be_left_out_may_not_be_negative(setting):
    """dynamic_sampling=-1 was a traceback in the first rollout, a negative bound one that every ratio was beyond."""
    with pytest.raises(UserError, match=rf"config\.algorithm\.{setting} is -1(\.0)?, but grpo needs {setting} >= 0"):
        check_online(config_of("grpo", **{setting: -1}))
    check_online(config_of("ppo"))


def test_settings_that_would_be_passed_over_are_refused():
    """Packing and further evaluation sets are not for answers that are written; of one answer to a prompt dynamic sampling keeps none."""
    packed, more = config_of("grpo"), config_of("grpo")
    packed.data.packing = True
    more.data.evals.second = common.data_source()
    check_online(more)  # without a path it is none
    more.data.evals.second.path = "rows.jsonl"
    single = config_of("reinforce", num_generations=1, dynamic_sampling=2)
    for config, words in ((packed, "data.packing is True"), (more, "data.evals.second is set"), (single, "as one alone is; set 0")):
        with pytest.raises(UserError, match=words):
            check(config)
    check(config_of("reinforce", num_generations=2, dynamic_sampling=2))


def test_a_groups_answers_stand_in_its_row_and_are_compared_with_each_other_alone(llama):
    batch = rollouts.lay_out(GROUPS, llama.model, True, 8)
    config = config_of("rloo")
    found, _, _ = rollouts.learnable(config, GROUPS, None, batch, np.ones(1), {})
    assert batch["example_id"][:, 0].tolist() == [4, 6]
    for row, of_row in zip(found["advantages"], ([1, 1, -1, -1, -1, -1], [-2, -2, -2, 2])):
        assert row[: len(of_row)].tolist() == of_row and not row[len(of_row) :].any()
    assert batch["score_token"][0, :6].tolist() == [9, 2, 11, 12, 13, 2]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_tokens_left_out_get_no_gradient(llama, name):
    """Of answers that were cut, and of what an environment said."""
    config = config_of(name)
    algorithm = make(config, llama.model)
    batch, _, _ = rollouts.learnable(config, GROUPS, None, rollouts.lay_out(GROUPS, llama.model, True, 8), np.ones(1), {})
    batch["learn"][0, 3] = 0

    def loss(bump):
        scores = algorithm.score(tiny.as_arrays(llama.params), {}, batch, None)
        scores = scores._replace(tokens={**scores.tokens, "logp": scores.tokens["logp"] + bump})
        terms, _, _ = algorithm.objective(scores, batch, {})
        return sum(term.weight * term.sum / term.count for term in terms.values())

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros(batch["advantages"].shape)))
    assert gradient[0, 3] == 0 and (gradient[0, [0, 1, 2, 4, 5]] != 0).all()


def test_minibatches_deal_every_group_out_once_a_pass():
    batch = {"tokens": np.arange(8)}
    seen = [rollouts.minibatch(batch, 0, 3, update, 2)["tokens"] for update in range(4)]
    assert sorted(np.concatenate(seen[:2])) == sorted(np.concatenate(seen[2:])) == list(range(8))
    assert seen[0].tolist() != seen[2].tolist()


def costly(prompts, completions, **columns):
    """A cost that differs among answers."""
    return [float(text.count("7")) + 0.1 for text in completions]


OTHERS = {
    "reinforce": dict(num_generations=1, beta=0.1),
    "reinforce_plus_plus": dict(num_generations=2, beta=0.1),
    "reinforce_plus_plus_baseline": dict(beta=0.1),
    "remax": dict(num_generations=1),
    "grpo": dict(dynamic_sampling=1, top_entropy_quantile=0.5, mask_truncated_completions=True, overlong_buffer=2, num_iterations=2),
    "online_dpo": dict(),
    "xpo": dict(xpo_alpha=0.1),
    "nash_md": dict(mixture_coef=0.3),
    "on_policy_distillation": dict(reward_funcs=()),
    "ppo_lagrangian": dict(cost_funcs=("tests.rl.test_online:costly",), kl_target=0.1, standardize_rewards=True, reward_clip=2.0,
                           missing_eos_penalty=1.0, whiten_rewards=True, critic_warmup=1, dual_clip=3.0, num_iterations=1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_algorithm_takes_two_steps(demo, tmp_path, name):
    config = settings(demo, "grpo", train__steps=2).copy_and_resolve_references().unlock()
    rewards = config.algorithm.reward_funcs
    config.algorithm = getattr(common, name)()
    config.algorithm.update({"reward_funcs": rewards, **OTHERS[name]})
    if name == "on_policy_distillation":
        config.algorithm.teacher = str(demo / "model")
    online.run(config.lock(), tmp_path / name)
    found = records(tmp_path / name)
    assert [record["step"] for record in found] == [1, 2] and all(np.isfinite(record["loss"]) for record in found)
    if name == "ppo_lagrangian":
        assert found[1]["lagrangian"] > found[0]["lagrangian"] == 1.0 and found[0]["cost"] > 0
    if name in ("xpo", "nash_md"):
        assert found[0]["sampling/sampling_logp_difference/max"] < 1e-4, "only the policy's own answers are compared"
    if name == "on_policy_distillation":
        assert found[0]["loss"] == pytest.approx(0, abs=1e-6), "the teacher is the student itself"


@pytest.mark.slow
def test_who_wrote_what_is_distilled(demo, tmp_path):
    """IW-OPD's advantage is over the student that wrote: the same in all passes over a rollout, while that student learns."""
    make_llama(tmp_path / "teacher", seed=1, tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1)
    config = settings(demo, "grpo", train__steps=2, optim__learning_rate=1e-2).copy_and_resolve_references().unlock()
    config.algorithm = common.on_policy_distillation()
    config.algorithm.update(objective="iw_opd", teacher=str(tmp_path / "teacher"), num_iterations=2)
    online.run(config.lock(), tmp_path / "run")
    first, second = records(tmp_path / "run")
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-3)
    for name in ("advantage", "abs_advantage", "weight"):
        assert second[f"iw_opd/mean_{name}"] == pytest.approx(first[f"iw_opd/mean_{name}"], rel=1e-5)
    assert 1 < first["iw_opd/mean_weight"] < 1 + config.algorithm.iw_opd_gamma


@pytest.mark.slow
def test_another_reference(demo, tmp_path):
    """config.reference.model is what the KL is taken from, here too: it was passed over, and the policy at its start stood in."""
    make_llama(tmp_path / "other", tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1, seed=5)
    for other in ("", str(tmp_path / "other")):
        config = settings(demo, "grpo", algorithm__beta=0.1, reference__model=other, train__steps=1)
        online.run(config, tmp_path / f"run{bool(other)}")
        assert (abs(records(tmp_path / f"run{bool(other)}")[0]["objective/kl"]) > 1e-3) == bool(other)
    make_llama(tmp_path / "wide", tokenizer=make_words(), hidden_size=64, layers=1, heads=2, kv_heads=1)
    with pytest.raises(UserError, match=r"config\.reference\.model .* is not of the same shape"):
        online.run(settings(demo, "grpo", algorithm__beta=0.1, reference__model=str(tmp_path / "wide")), tmp_path / "run")


def test_a_bound_on_costs_needs_costs():
    """Without them it was PPO, and nothing was said."""
    with pytest.raises(UserError, match=r"config\.algorithm\.cost_funcs is empty"):
        ppo.check(config_of("ppo_lagrangian"))
    ppo.check(config_of("ppo"))
    ppo.check(config_of("ppo_lagrangian", cost_funcs=("math",)))


@pytest.mark.slow
def test_the_greedy_answer_pays_for_its_length_too(demo, tmp_path):
    """ReMax: where both answers are of one length, nothing is better than expected; the sampled one alone had paid."""
    config = settings(demo, "grpo", generation__max_new_tokens=1, train__steps=1).copy_and_resolve_references().unlock()
    config.algorithm = common.remax()
    config.algorithm.update(dict(reward_funcs=("format",), beta=0.0, overlong_buffer=1))
    online.run(config.lock(), tmp_path / "run")
    [found] = records(tmp_path / "run")
    assert found["reward"] == -1 and found["loss"] == 0 and found["grad_norm"] == 0


@pytest.mark.slow
def test_an_episode_of_several_turns(demo, tmp_path):
    """The demo's environment: what it says is in the text, not in what is learnt; its rewards are the run's."""
    from pyarrow import parquet

    config = settings(demo, "grpo", algorithm__reward_funcs=(), algorithm__environment="scripts.online_demo:AskAgain", train__steps=2,
                      algorithm__max_turns=3, algorithm__num_generations=8, generation__max_new_tokens=3)  # fmt: skip
    online.run(config, tmp_path / "run")
    found = records(tmp_path / "run")
    answers = [row for path in sorted((tmp_path / "run" / "completions").iterdir()) for row in parquet.read_table(path).to_pylist()]
    again = [row for row in answers if "? =" in row["completion"]]
    assert again and set(row["rewards/environment"] for row in answers) <= {0.0, 0.25, 0.5, 1.0}
    assert found[0]["completions/max_length"] <= 9 and found[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert found[0]["reward"] == pytest.approx(np.mean([row["rewards/environment"] for row in answers if row["step"] == 0]))


@pytest.mark.slow
def test_supervised_rows_beside_the_answers(demo, tmp_path):
    """PTX: what they teach is learnt, also over a restart with the same numbers and in micro-batches."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} +", "completion": " ?"}) + "\n" for i in range(10)))
    config = settings(demo, "ppo", algorithm__ptx_coef=1.0, algorithm__missing_eos_penalty=None, optim__learning_rate=3e-3, train__steps=8,
                      data__pad_to_multiple=4).copy_and_resolve_references().unlock()  # fmt: skip
    config.data.ptx.path = str(rows)
    online.run(config.lock(), tmp_path / "whole")
    found = records(tmp_path / "whole")
    assert found[-1]["loss/ptx_avg"] < 0.8 * found[0]["loss/ptx_avg"]
    config = config.copy_and_resolve_references().unlock()
    config.train.accumulate = 2
    online.run(config.lock(), tmp_path / "parts")
    for a, b in zip(records(tmp_path / "parts")[:2], found):
        assert a["loss/ptx_avg"] == pytest.approx(b["loss/ptx_avg"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
