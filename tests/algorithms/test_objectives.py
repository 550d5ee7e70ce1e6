"""What every algorithm minimises, whole, against NumPy written from the papers: value and gradient by every token's log-probability (or
every score), in float64. What a paper holds constant has no gradient here either.

The reference's gradient is exact: f is analytic, so df/dx = Im f(x + ih) / h with h far below rounding (complex step).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import algorithms
from aligner.likelihood import answer_lengths, sum_answers
from aligner.types import Scores
from tests.algorithms.rows import ANSWERS
from tests.algorithms.test_invariance import SETTINGS
from tests.losses.test_from_papers import by_real, ls, odds, paper_plackett_luce
from tests.models import tiny

BAR = 1e-10
N, L, PROMPT = 6, 5, 3  # examples, room for tokens of an answer, scored tokens of a prompt
BETA = 0.1  # every algorithm's default


class Case:
    """Random tokens and scores of N examples with R answers, as the papers' sums see them: x[n][r] are the tokens of an answer."""

    def __init__(self, needs: str):
        rng = np.random.default_rng(11)
        self.R = ANSWERS.get(needs, 2)
        self.prompt = PROMPT if needs == "preference_prompt" else 0
        lengths = rng.integers(1, L + 1, (N, self.R))
        if needs.startswith(("ranked", "scored")):  # lists differ in length
            lengths[np.arange(self.R) >= 2 + np.arange(N)[:, None] % (self.R - 1)] = 0
        self.lengths, width = lengths, self.prompt + self.R * L
        self.mask = np.concatenate([np.ones((N, self.prompt), bool), *(np.arange(L) < lengths[:, [r]] for r in range(self.R))], axis=1)
        self.role = np.concatenate([np.zeros(self.prompt, int), np.repeat(1 + np.arange(self.R), L)])
        self.x = {"logp": -rng.gamma(1.5, 1.0, (N, width)), "lse": rng.normal(0, 3, (N, width)), "values": rng.normal(0, 2, (N, self.R))}
        self.sum_p2 = rng.uniform(0.1, 0.9, (N, width))
        self.reference = rng.normal(-5, 3, (N, self.R))
        self.values = {"label": np.array([1, 0, 0, 1, 1, 0.0]), "margin": rng.normal(size=N), "safe": rng.choice([-1.0, 1.0], (N, 2)),
                       "scores": rng.normal(0, 2, (N, self.R))}  # fmt: skip

    def tokens(self, array: np.ndarray) -> list[list[np.ndarray]]:
        return [[array[n, self.mask[n] & (self.role == r + 1)] for r in range(self.R)] for n in range(N)]

    def everything(self, array: np.ndarray, most: int = 99) -> np.ndarray:
        """Scored tokens of all examples in a row, of roles up to `most`."""
        return array[self.mask & (self.role <= most)]

    def h(self, x: dict) -> np.ndarray:
        """[N, R] log-ratios."""
        return np.array([[answer.sum() for answer in row] for row in self.tokens(x["logp"])]) - self.reference

    def average(self, x: dict) -> np.ndarray:
        """[N, R] log-probabilities per token."""
        return np.array([[answer.sum() / max(len(answer), 1) for answer in row] for row in self.tokens(x["logp"])])

    def nll(self, x: dict, answer: int = 0) -> complex:
        """Per token of the answers at a place."""
        return -np.concatenate([row[answer] for row in self.tokens(x["logp"])]).mean()

    def lists(self, values: np.ndarray) -> list[np.ndarray]:
        """The values of the answers that there are."""
        return [values[n, self.lengths[n] > 0] for n in range(N)]


def hinge(x):
    return np.where(x.real < 1, 1 - x, 0)


def js(h):
    return np.log(2 * np.exp(h) / (1 + np.exp(h)))


def weigh(case, x):
    """WPO's weight of both answers: constants (equation 2), so of the real part alone."""
    tokens, p2 = case.tokens(x["logp"].real), case.tokens(case.sum_p2)
    one = lambda n, r: np.exp((tokens[n][r] - np.log(p2[n][r])).mean())
    return np.array([one(n, 0) * one(n, 1) for n in range(N)])


def long_answers(case, x, alpha):
    """LD-DPO's sums: tokens beyond the length of the shorter answer count alpha times."""
    shared = case.lengths.min(axis=1)
    weight = lambda n, answer: np.where(np.arange(len(answer)) < shared[n], 1, alpha)
    return np.array([[(weight(n, answer) * answer).sum() for answer in row] for n, row in enumerate(case.tokens(x["logp"]))])


def aot(values, targets):
    return -ls(BETA * (by_real(values) - by_real(targets))).mean()


def of_groups(case, x, loss):
    return np.mean([loss(group) for group in case.lists(x["values"])])


def judged(case, h, good, bad, undesirable=1.0):
    """The mean over answers that are labelled good or bad."""
    return np.mean([good(h[n]) if case.values["label"][n] else undesirable * bad(h[n]) for n in range(N)])


def sigmoid(x):
    return np.exp(ls(x))


def kto(case, x):
    h = case.h(x)
    kl = max(h[:, 1].real.mean(), 0)  # a constant
    return judged(case, h[:, 0], lambda h: 1 - sigmoid(BETA * (h - kl)), lambda h: 1 - sigmoid(BETA * (kl - h)), 0.7)


def bco(case, x):
    h = case.h(x)
    delta = BETA * h.real.mean()  # of the first batch; a constant
    return (-ls(BETA * h[:, 0] - delta) - ls(delta - BETA * h[:, 1])).mean() / 2


def bco_unpaired(case, x):
    h = case.h(x)[:, 0]
    delta = BETA * h.real.mean()
    return judged(case, h, lambda h: -ls(BETA * h - delta), lambda h: -ls(delta - BETA * h))


def orpo(case, x, nll):
    a = case.average(x)
    return nll - BETA * ls(np.log(odds(a[:, 0]) / odds(a[:, 1]))).mean()


def cost(case, x):
    c, safe = x["values"], case.values["safe"]
    return (-ls(c[:, 1] - c[:, 0])).mean() + 0.7 * (-ls(-safe * c)).sum(axis=1).mean() + 0.001 * (c**2).mean()


def sso(case, x):
    h, a = case.h(x), case.average(x)
    pairs = -ls(BETA * (h[:, 0] - h[:, 1])) - ls(BETA * (h[:, 2] - h[:, 3]))
    return (pairs - 0.1 * (a[:, 0] + a[:, 2])).mean()


def split(x):
    return x[:, 0], x[:, 1]


def difference(x):
    return x[:, 0] - x[:, 1]


# name as in test_invariance -> (case, x) -> loss
PAPERS = {
    "sft": lambda c, x: -c.everything(x["logp"]).mean() + 0.1 * (c.everything(x["lse"]) ** 2).mean(),
    "dft": lambda c, x: -(np.exp(c.everything(x["logp"]).real) * c.everything(x["logp"])).mean(),
    "cpt": lambda c, x: -c.everything(x["logp"]).mean(),
    "reward": lambda c, x: (
        -ls(difference(x["values"]) - c.values["margin"]) + 0.3 * x["values"].sum(axis=1) ** 2 + 0.2 * (x["values"] ** 2).mean(axis=1)
    ).mean(),
    "plackett_luce": lambda c, x: of_groups(c, x, lambda r: paper_plackett_luce(*r) + 0.1 * r.sum() ** 2),
    "mse": lambda c, x: (np.concatenate(c.lists(x["values"] - c.values["scores"])) ** 2).mean(),
    "cost": cost,
    "dpo": lambda c, x: -ls(BETA * difference(c.h(x))).mean(),
    "dpo, mixed": lambda c, x: 0.5 * hinge(BETA * difference(js(c.h(x)))).mean() + 2.0 * c.nll(x),
    "dpo, ipo, weighted": lambda c, x: (weigh(c, x) * (difference(c.h(x) / c.lengths) - 1 / (2 * BETA)) ** 2).mean(),
    "dpo, long answers": lambda c, x: -ls(BETA * difference(long_answers(c, x, 0.3) - c.reference)).mean(),
    "aot": lambda c, x: aot(difference(c.h(x) + c.reference), difference(c.reference)),
    "aot_unpaired": lambda c, x: aot(*split(c.h(x))) - ls(BETA * difference(c.h(x) / c.lengths)).mean(),
    "bco": bco,
    "dpo_ranked": lambda c, x: np.mean([paper_plackett_luce(*r) for r in c.lists(BETA * c.h(x))]),
    "kto": kto,
    "apo_zero_unpaired": lambda c, x: judged(c, c.h(x)[:, 0], lambda h: 1 - sigmoid(BETA * h), lambda h: sigmoid(BETA * h)),
    "bco, unpaired": bco_unpaired,
    "orpo": lambda c, x: orpo(c, x, -c.everything(x["logp"], most=1).mean()),
    "orpo, completion": lambda c, x: orpo(c, x, c.nll(x)),
    "cpo": lambda c, x: -ls(BETA * difference(c.h(x) + c.reference)).mean() + c.nll(x),
    "simpo": lambda c, x: -ls(BETA * difference(c.average(x)) - 0.5).mean(),
    "alphapo": lambda c, x: -ls(BETA * difference((1 - np.exp(c.average(x)) ** -0.25) / 0.25) - 0.5).mean(),
    "tpo": lambda c, x: -ls(0.01 * difference(c.h(x) + c.reference)).mean() + c.nll(x, 2),
    "tpo-l": lambda c, x: -ls(2.0 * difference(c.average(x)) - 0.5).mean() + 0.5 * c.nll(x, 2),
    "sso": sso,
}


def ours(case: Case, algorithm, x: dict) -> jax.Array:
    """The loss as the training step puts it together, one example a row."""
    mask = jnp.asarray(case.mask, jnp.int32)
    batch = {"score_segment": mask, "score_role": mask * case.role, "example_id": jnp.arange(N)[:, None]}
    batch |= {name: jnp.asarray(value)[:, None] for name, value in case.values.items()}
    zeros = jnp.zeros(case.mask.shape)
    tokens = {"logp": x["logp"], "lse": x["lse"], "sum_p2": jnp.asarray(case.sum_p2), "entropy": zeros, "correct": zeros, "mean_logit": zeros}
    tokens = {name: jnp.where(mask > 0, value, 0) for name, value in tokens.items()}
    lengths = answer_lengths(batch, case.R).astype(float)
    scores = Scores(sum_answers(tokens["logp"], batch, case.R), lengths, tokens, {}, jnp.asarray(case.reference)[:, None])
    if algorithm.summed:
        scores = scores._replace(logps=algorithm.summed(scores, batch))
    scores = scores._replace(values=jnp.where(lengths > 0, x["values"][:, None], 0))
    carry = jax.tree.map(lambda leaf: leaf.astype(float), algorithm.carry)
    terms, *_ = algorithm.objective(scores, batch, carry)
    return sum(term.weight * term.sum / term.count for term in terms.values())


def test_every_algorithm_is_here():
    """Distillation is in tests/losses: test_distillation.py, from hidden states, and test_partial_distillation.py."""
    assert set(PAPERS) == {name for name, setting in SETTINGS.items() if setting().name != "distillation"}


@pytest.mark.parametrize("name", PAPERS)
def test_value_and_gradient(name):
    config = tiny.config()
    config.algorithm = SETTINGS[name]()
    with jax.enable_x64(True):
        made = algorithms.make(config, SimpleNamespace(config=None, has_score_head=config.algorithm.name in algorithms.SCORING))
        case = Case(made.needs)
        summed = None
        if config.algorithm.get("ld_alpha") is not None:
            from aligner.algorithms.dpo import ld_logps

            summed = lambda scores, batch: ld_logps(scores, batch, config.algorithm.ld_alpha)
        algorithm = SimpleNamespace(objective=made.objective, carry=made.carry, summed=summed)
        step = tiny.quick(jax.value_and_grad(lambda x: ours(case, algorithm, x)))
        value, gradients = step({key: jnp.asarray(array) for key, array in case.x.items()})
        assert value.dtype == np.float64
    at = {key: array + 0j for key, array in case.x.items()}
    expected = PAPERS[name](case, at).real
    assert abs(float(value) - expected) <= BAR * max(1, abs(expected))
    moved = 0
    for key, array in at.items():
        slope = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            stepped = array.copy()
            stepped[place] += 1e-40j
            slope[place] = np.imag(PAPERS[name](case, at | {key: stepped})) / 1e-40
        assert np.abs(np.asarray(gradients[key]) - slope).max() <= BAR * max(1, np.abs(slope).max()), key
        moved += np.abs(slope).max() > 1e-3
    assert moved
