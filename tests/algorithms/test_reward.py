"""Reward and cost models: scores of the right token, and the same loss and gradients however a batch is laid out, split and computed."""

import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from aligner import algorithms, sharding
from aligner.data.layout import empty_row, lay_out, shape_of
from aligner.data.templates import Encoded
from aligner.likelihood import make_scorer
from aligner.models import from_hf
from aligner.run import check_answers
from aligner.types import UserError
from configs import common
from tests.invariance.step import ZERO_GRADIENT, loss_and_gradients, one_device
from tests.models import tiny

BAR = 1e-5
CUBE = dict(data=2, fsdp=2, tensor=2)
MADE = {"reward": common.reward, "cost": common.cost}


@functools.cache
def family(name: str, answers: int = 2) -> tiny.Family:
    """A tiny model with a score head, and 8 groups of up to so many answers, some of one token."""
    model = from_hf({"llama": tiny.llama_config, "llava": tiny.llava_config}[name](), score_head=True)
    rng = np.random.default_rng(1)
    groups = tiny.make_pairs(model, 8, rng)
    if answers > 2:  # ragged lists
        extra = lambda n: tuple(rng.integers(3, 60, rng.integers(1, 6)).astype(np.int32) for _ in range(n))
        groups = [group._replace(answers=group.answers + extra(i % (answers - 1))) for i, group in enumerate(groups)]
    return tiny.Family(model, tiny.perturbed(model), groups, np.zeros((8, 2)))


def make_batch(f: tiny.Family, *, shared=True, per_row=1, more=0, empty_rows=0, last=False) -> dict[str, np.ndarray]:
    """A batch as the loader gives it, with margins, signs and scores."""
    rng, media = np.random.default_rng(3), f.model.media
    answers = max(len(group.answers) for group in f.pairs)
    columns = {
        "margin": rng.normal(0, 1, 8).astype(np.float32),
        "safe": rng.choice([-1, 1], (8, 2)).astype(np.float32),
        "scores": rng.normal(0, 2, (8, answers)).astype(np.float32),
    }
    rows = [range(i, i + per_row) for i in range(0, 8, per_row)]
    T, S, I = (max(sum(shape_of(f.pairs[i], shared)[axis] for i in row) for row in rows) + more for axis in range(3))
    I = I if media else 0
    made = []
    for row in rows:
        one = lay_out([f.pairs[i] for i in row], [10 + i for i in row], T, S, I, media, shared, last=last)
        for place, name in enumerate(name for i in row for _, name in f.pairs[i].media):
            one["pixel_values"][place] = tiny.pixels(name, f.model)
        made.append(one | {name: column[list(row)] for name, column in columns.items()})
    for number in range(empty_rows):
        blank = empty_row(T, S, I, media, per_row) | {name: np.zeros_like(column[:per_row]) for name, column in columns.items()}
        made.insert(2 * number + 1, blank)
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def config(name="reward", train=(), **changes):
    made = common.base()
    made.model.dtype = "float32"
    made.algorithm = MADE[name]()
    made.algorithm.update(changes)
    made.train.update(dict(train))
    return made


@pytest.mark.parametrize("name", ["llama", pytest.param("llava", marks=pytest.mark.slow)])
def test_scores_are_those_of_each_answer_alone(name):
    """Every layout reads the hidden state of the answer's last token, as a forward pass of prompt + answer alone has it."""
    f = family(name, answers=4)
    expected = np.zeros((8, 4))
    alone = jax.jit(lambda params, batch: f.model.apply(params, batch, features=f.model.encode(params, batch)).hidden)
    longest = max(len(group.prompt) + len(answer) for group in f.pairs for answer in group.answers)
    for i, group in enumerate(f.pairs):
        for r, answer in enumerate(group.answers):
            row = lay_out([Encoded(group.prompt, (answer,), group.media)], [0], longest, longest, 2 if f.model.media else 0, f.model.media)
            for place, (_, image) in enumerate(group.media):
                row["pixel_values"][place] = tiny.pixels(image, f.model)
            hidden = alone(f.params, {key: value[None] for key, value in row.items()})
            expected[i, r] = np.asarray(hidden[0, len(group.prompt) + len(answer) - 1] @ f.params["score"]["kernel"])[0]
    scorer = jax.jit(make_scorer(f.model, 4))
    for options in (dict(shared=False, more=2), dict(per_row=2, last=True)):
        scores = scorer(f.params, make_batch(f, **options))
        np.testing.assert_allclose(scores.values.reshape(8, 4), expected, rtol=2e-5, atol=2e-5)
        assert (np.asarray(scores.lengths.reshape(8, 4) > 0) == (expected != 0)).all()


LOSSES = {
    "bradley_terry": ("reward", 2, dict(center_rewards_coefficient=0.3, regularization=0.2)),
    "plackett_luce": ("reward", 4, dict(loss_type="plackett_luce", answers=4, center_rewards_coefficient=0.1)),
    "mse": ("reward", 4, dict(loss_type="mse", answers=4)),
    "cost": ("cost", 2, dict(scale=0.7)),
}
# Accumulation, padding, packing, remat, devices, and the layout of last tokens alone, all at once (one by one: test_invariance.py)
ALL = (dict(per_row=2, more=1, empty_rows=4, last=True), dict(accumulate=2, remat="full"), CUBE)
CASES = [("llava", "bradley_terry", ALL), ("llama", "plackett_luce", (dict(more=3, empty_rows=4, shared=False), {}, None))]


def compute(name: str, loss: str, variant=({}, {}, None)):
    algorithm, answers, changes = LOSSES[loss]
    batch, train, mesh = variant
    f = family(name, answers)
    made = config(algorithm, train, **changes)
    made.model.dtype = made.model.param_dtype = "float64"  # a tower's biases have gradients that all but cancel: float32 leaves 1e-5 of them
    with jax.enable_x64(True):
        return loss_and_gradients(f, make_batch(f, **batch), made, sharding.make_mesh(mesh) if mesh else one_device(), "float64")


baseline = functools.cache(compute)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss", "variant"), CASES)
def test_same_loss_and_gradients(name, loss, variant):
    expected, found = baseline(name, loss), compute(name, loss, variant)
    assert found.gradients.keys() == expected.gradients.keys()
    for metric in expected.metrics.keys() - {"num_tokens"}:
        assert found.metrics[metric] == pytest.approx(expected.metrics[metric], rel=BAR, abs=1e-6), metric
    for path, gradient in expected.gradients.items():
        scale = np.abs(expected.gradients[path.replace("k_proj", "q_proj")] if re.search(ZERO_GRADIENT, path) else gradient).max()
        assert np.abs(found.gradients[path] - gradient).max() <= BAR * scale, path


def test_terms_and_metrics_by_hand():
    """Loss and metrics from the scores, recomputed in NumPy."""
    f = family("llama", 2)
    batch = make_batch(f)
    r = np.asarray(jax.jit(make_scorer(f.model, 2))(f.params, batch).values, np.float64)[:, 0]
    softplus = lambda x: np.logaddexp(0, x)
    d, found = r[:, 0] - r[:, 1], baseline("llama", "bradley_terry").metrics
    loss = softplus(-(d - batch["margin"][:, 0])).mean() + 0.3 * (r.sum(1) ** 2).mean() + 0.2 * (r**2).mean()
    expected = dict(loss=loss, min_reward=r.min(), mean_reward=r.mean(), max_reward=r.max(), accuracy=(d > 0).mean(), margin=d.mean())
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    safe = batch["safe"][:, 0]
    loss = softplus(d).mean() + 0.7 * softplus(safe * r).sum(1).mean() + 0.001 * (r**2).mean()
    expected = dict(loss=loss, mean_cost=r.mean(), accuracy=(d < 0).mean(), margin=-d.mean())
    expected |= dict(accuracy_sign=((r < 0) == (safe > 0)).mean(), min_cost=r.min(), max_cost=r.max())
    found = baseline("llama", "cost").metrics
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_list_that_is_too_long_is_refused():
    made = config(loss_type="plackett_luce", answers=3)
    check_answers(made, SimpleNamespace(name="data.train", answers=3))
    with pytest.raises(UserError, match=r"data\.train has rows of 4 answers, but config\.algorithm\.answers is 3; set it to 4"):
        check_answers(made, SimpleNamespace(name="data.train", answers=4))


def test_bad_settings_are_refused_in_a_sentence():
    model, lm = family("llama").model, tiny.family("llama").model
    for made, on, words in [
        (config(loss_type="bradly_terry"), model, "did you mean 'bradley_terry'"),
        (config(loss_type="plackett_luce", answers=1), model, "at least 2"),
        (config(regularization=-1.0), model, "regularization is -1.0"),
        (config(), lm, "score head"),
        (config("cost", scale=-1.0), model, "scale is -1.0"),
        (common.base(), model, "trains a language model"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            algorithms.make(made, on)
