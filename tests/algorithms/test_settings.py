"""What `config.algorithm` may hold: one sentence for each thing that is wrong, and what follows from what is right."""

import json

import jax
import numpy as np
import pytest

from aligner import algorithms
from aligner.likelihood import answer_lengths
from aligner.metrics import merge, values
from aligner.models import from_hf
from aligner.prepare import fingerprint
from aligner.train_step import make_eval_step
from aligner.types import Scores, UserError
from configs import common
from tests.algorithms import bigram, rows
from tests.models.vision_configs import CASES, hf_config


def make(algorithm, reference=None, model=None, **changes):
    config = common.base()
    config.algorithm = algorithm()
    config.algorithm.update(changes)
    config.reference.update(reference or {})
    return algorithms.make(config, model or bigram.make_model())


@pytest.mark.parametrize(
    ("algorithm", "changes", "says"),
    [
        (common.dpo, dict(loss_type=("sigmiod",)), "config.algorithm.loss_type 'sigmiod' is not known; did you mean 'sigmoid'?"),
        (common.dpo, dict(loss_type=("sigmoid", "SFT")), "config.algorithm.loss_type 'SFT' is not known .there is sigmoid, hinge"),
        (common.dpo, dict(loss_type=("sft", "sft")), "several different ones"),
        (common.dpo, dict(loss_type=()), "it must name one loss"),
        (common.dpo, dict(loss_type=("sigmoid", "sft"), loss_weights=(1.0,)), "must have one number for each"),
        (common.dpo, dict(beta=0.0), "config.algorithm.beta is 0.0, but dpo needs beta > 0"),
        (common.dpo, dict(label_smoothing=0.5), r"must be in \[0, 0.5\)"),
        (common.dpo, dict(loss_type=("exo_pair",)), "recommends 1e-3"),
        (common.dpo, dict(loss_type=("hinge", "sft"), label_smoothing=0.1), "label_smoothing is 0.1, but hinge and sft do not smooth labels"),
        (common.dpo, dict(f_divergence_type="reverse"), "f_divergence_type 'reverse' is not known; did you mean 'reverse_kl'?"),
        (common.dpo, dict(loss_type=("apo_zero",), f_divergence_type="forward_kl"), "has no meaning for apo_zero"),
        (common.dpo, dict(loss_type=("aot",), use_weighting=True), "compare values of different pairs"),
        (common.dpo, dict(ld_alpha=1.5), r"config.algorithm.ld_alpha is 1.5, but it must be in \[0, 1\]"),
        (common.dpo, dict(sync_ref_model=True), "config.reference.kind=copy"),
        (common.kto, dict(loss_type="kt"), "did you mean 'kto'?"),
        (common.kto, dict(undesirable_weight=-1.0), "undesirable_weight is -1.0"),
        (common.orpo, dict(nll_over="completions"), "did you mean 'completion'?"),
        (common.cpo, dict(loss_type="simpoo"), "did you mean 'simpo'?"),
        (common.cpo, dict(loss_type="ipo", label_smoothing=0.1), "ipo does not smooth labels"),
        (common.dpo_ranked, dict(answers=1), "a ranking needs at least 2"),
        (common.sso, dict(gamma=-0.1), "gamma >= 0"),
        (common.dpo, dict(name="dop"), "config.algorithm.name 'dop' is not known; did you mean 'dpo'?"),
    ],
)  # fmt: skip
def test_one_sentence(algorithm, changes, says):
    with pytest.raises(UserError, match=says):
        make(algorithm, **changes)


def test_a_reference_that_follows_starts_as_the_policy():
    with pytest.raises(UserError, match=r"config.reference.model empty"):
        make(common.dpo, dict(kind="copy", model="other"), sync_ref_model=True)
    assert make(common.dpo, dict(kind="copy"), sync_ref_model=True, ref_model_mixup_alpha=0.5).sync == (0.5, 512)


def test_only_what_is_of_the_whole_batch_pays_for_it():
    assert not any(make(a).whole_batch for a in (common.dpo, common.orpo, common.cpo, common.sso, common.dpo_ranked))
    assert make(common.kto).whole_batch and not make(common.kto, loss_type="apo_zero_unpaired").whole_batch
    assert make(common.dpo, loss_type=("sigmoid", "aot")).whole_batch


def test_columns_of_another_ld_alpha_have_another_name():
    """A column summed with one weight must not be read by a run with another."""
    names = {fingerprint(settings=make(common.dpo, ld_alpha=alpha).prepared_with) for alpha in (None, 0.0, 0.5, 1.0)}
    assert len(names) == 4


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3])
def test_the_column_is_summed_as_the_policy_is(alpha):
    """policy = reference: log-ratios are 0, whatever LD-DPO's weight."""
    examples = rows.make_examples("preference")
    batch = rows.make_batch(examples, np.zeros((len(examples), 2)))
    algorithm, params = make(common.dpo, ld_alpha=alpha), bigram.make_params()
    column = algorithm.prepare(params, batch)["reference_logps"]
    terms, metrics, _ = algorithm.objective(algorithm.score(params, {}, {**batch, "reference_logps": column}, None), batch, {})
    assert terms["sigmoid"].sum / terms["sigmoid"].count == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["rewards/margins"].sum == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_weighs_what_is_beyond_the_shorter_answer(alpha):
    """Against sums made one token at a time."""
    examples = rows.make_examples("preference")
    params = bigram.make_params()
    logits = params["embed"]["embedding"] @ params["lm_head"]["kernel"]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def summed(example, answer):
        shared = min(map(len, example.answers))
        before = np.concatenate([example.prompt[-1:], answer[:-1]])
        return sum(logp[a, b] * (1 if i < shared else alpha) for i, (a, b) in enumerate(zip(before, answer)))

    batch = rows.make_batch(examples, np.zeros((len(examples), 2)), per_row=2, empty_rows=1)
    column = np.asarray(make(common.dpo, ld_alpha=alpha).prepare(params, batch)["reference_logps"])
    expected = np.array([[summed(example, answer) for answer in example.answers] for example in examples])
    np.testing.assert_allclose(column[batch["example_id"] >= 0], expected, rtol=1e-5)
    assert not column[batch["example_id"] < 0].any()


def test_bco_carries_the_mean_of_all_rewards():
    examples, params = rows.make_examples("preference"), bigram.make_params()
    algorithm = make(common.dpo, loss_type=("bco",))
    carry, rewards = algorithm.carry, []

    @jax.jit
    def step(batch, carry):
        scores = algorithm.score(params, {}, batch, None)
        return 0.1 * (scores.logps - scores.reference_logps), *algorithm.objective(scores, batch, carry)[1:]

    for seed in range(3):
        reference = np.random.default_rng(seed).normal(-20, 4, (len(examples), 2)).astype(np.float32)
        batch = rows.make_batch(examples, reference, empty_rows=2)
        found, metrics, carry = step(batch, carry)
        rewards.append(np.asarray(found)[batch["example_id"] >= 0])
    assert carry["count"] == 48
    assert metrics["delta"].value == pytest.approx(np.concatenate(rewards).mean(), rel=1e-5)


@pytest.mark.parametrize("algorithm, changes", [(common.dpo, dict(loss_type=("bco",))), (common.kto, dict(loss_type="bco"))])
def test_held_out_answers_do_not_move_the_mean_of_bco(algorithm, changes):
    """TRL's trainer holds it fixed in evaluation; a batch's own rewards made what it is worth depend on the batch's size."""
    algorithm = make(algorithm, **changes)
    examples, params = rows.make_examples(algorithm.needs), bigram.make_params()
    reference = np.random.default_rng(0).normal(-20, 4, (len(examples), len(examples[0].answers))).astype(np.float32)
    batch = rows.make_batch(examples, reference, algorithm.needs)
    scores = algorithm.score(params, {}, batch, None)
    rewards = 0.1 * np.asarray(scores.logps - scores.reference_logps)
    signs = np.array([1, -1]) if algorithm.needs == "preference" else np.where(batch["label"][..., None] > 0.5, 1, -1)
    found = make_eval_step(algorithm, dtype="float32")(params, {"mean": np.float32(0.7), "count": np.float32(5)}, {"base": {}}, batch)
    losses = np.log1p(np.exp(-signs * (rewards - 0.7)))[batch["example_id"] >= 0]
    assert found["delta"].value == np.float32(0.7)
    term = found["loss/bco"]
    assert term.sum / term.count == pytest.approx(losses.sum(axis=-1).mean() / losses.shape[-1], rel=1e-5)


def test_a_prompt_that_sees_all_of_itself_is_not_learnt():
    model = from_hf(hf_config("paligemma", CASES["paligemma"][0]))
    with pytest.raises(UserError, match="prompt of paligemma sees all of itself, what is to be predicted included; set it to"):
        make(common.orpo, model=model)
    assert make(common.orpo, model=model, nll_over="completion").needs == "preference"


def test_the_kl_of_an_evaluation_is_no_single_batch_s():
    """It is the mean over batches of more or fewer examples, here with log-ratios of 1, 2, .. each."""
    examples, algorithm, found = rows.make_examples("unpaired"), make(common.kto), []
    for members in (examples[:6], examples[6:]):
        batch = rows.make_batch(members, kind="unpaired", empty_rows=2)
        there = batch["example_id"] >= 0
        logps = np.float32(np.cumsum(there) * there[:, 0])[:, None, None] * np.ones(2, np.float32)
        tokens = {name: np.zeros(batch["score_from"].shape, np.float32) for name in ("entropy", "mean_logit")}
        scores = Scores(logps, answer_lengths(batch, 2), tokens, {}, reference_logps=0 * logps)
        found.append(algorithm.objective(scores, batch, {})[1])
    assert values(merge(*found))["kl"] == pytest.approx((6 * 3.5 + 2 * 1.5) / 8)


def test_a_ranking_of_two_is_dpo():
    examples = rows.make_examples("preference")
    reference = np.random.default_rng(0).normal(-20, 4, (len(examples), 4)).astype(np.float32)
    params, found = bigram.make_params(), []
    for algorithm, columns in ((make(common.dpo), reference[:, :2]), (make(common.dpo_ranked), reference)):
        batch = rows.make_batch(examples, columns)
        terms, metrics, _ = algorithm.objective(algorithm.score(params, {}, batch, None), batch, {})
        (term,) = terms.values()
        found.append((term.sum / term.count, *(metrics[f"rewards/{name}"].sum for name in ("chosen", "accuracies", "margins"))))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_sso_is_two_dpo_losses_less_the_likelihood():
    examples = rows.make_examples("two_sided")
    reference = np.random.default_rng(0).normal(-20, 4, (len(examples), 4)).astype(np.float32)
    batch, params = rows.make_batch(examples, reference), bigram.make_params()
    algorithm = make(common.sso, gamma=0.2)
    scores = algorithm.score(params, {}, batch, None)
    terms, *_ = algorithm.objective(scores, batch, {})
    h, lengths = 0.1 * np.asarray(scores.logps - reference[:, None])[:, 0], np.array([[m.sum() for m in e.scored] for e in examples])
    expected = np.log1p(np.exp(-(h[:, 0] - h[:, 1]))) + np.log1p(np.exp(-(h[:, 2] - h[:, 3])))
    likelihood = (np.asarray(scores.logps)[:, 0] / lengths)[:, [0, 2]].sum(axis=1)
    assert sum(t.weight * t.sum / t.count for t in terms.values()) == pytest.approx((expected - 0.2 * likelihood).mean(), rel=1e-5)


def test_a_longer_ranking_than_was_said_is_refused(tmp_path):
    """Its last answers would be left out without a word."""
    from aligner.run import run
    from scripts.make_tiny_checkpoint import make_llama

    make_llama(tmp_path / "model")
    lists = [{"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": ["one", "two", "three"]}]} for i in range(4)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    config = common.base()
    config.algorithm = common.dpo_ranked()
    config.algorithm.answers = 2
    config.model.path, config.data.train.path = str(tmp_path / "model"), str(tmp_path / "ranked.jsonl")
    with pytest.raises(UserError, match=r"config\.data\.train has rows of 3 answers, but config\.algorithm\.answers is 2"):
        run(config, tmp_path / "run")
