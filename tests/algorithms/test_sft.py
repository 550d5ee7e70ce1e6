"""SFT and CPT: values by hand, noise, and packing that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import algorithms, sharding
from aligner.algorithms import sft
from aligner.data.layout import empty_row, lay_out, shape_of
from aligner.data.templates import Encoded
from aligner.metrics import values
from aligner.types import UserError
from configs import common
from tests.everyday import everyday
from tests.invariance.step import Result
from tests.invariance.test_layout import assert_same
from tests.models import tiny

GROUPS = {"plain": [[i] for i in range(8)], "packed": [[0, 3, 4], [1], [2, 5, 6, 7]]}


def config(name="sft", **algorithm):
    made = tiny.config()
    made.algorithm = common.sft()
    made.algorithm.name = name
    made.algorithm.update(algorithm)
    return made


def conversations(family: tiny.Family) -> list[Encoded]:
    """The family's examples as conversations of one answer in which some tokens, and all pictures, are not scored."""
    rng, made = np.random.default_rng(7), []
    for number, pair in enumerate(family.pairs):
        parts = [pair.answers[0], pair.answers[1]]
        images = pair.media
        if family.model.media is not None and number % 2:  # a picture in a later turn
            parts.insert(1, np.full(family.model.media.features, tiny.IMAGE, np.int32))
            images = (*images, ("image", f"{number}.9"))
        answer = np.concatenate(parts)
        mask = (rng.random(len(answer)) < 0.6) & (answer != tiny.IMAGE)
        mask[-1] = True
        made.append(Encoded(pair.prompt, (answer,), images, (mask,)))
    return made


def batch_of(family: tiny.Family, examples: list[Encoded], groups: list[list[int]]) -> dict[str, np.ndarray]:
    """Rows of the given examples, with room to spare and an empty row."""
    G = max(map(len, groups)) + 1
    sizes = np.array([shape_of(example) for example in examples])
    T, S, I = (max(int(sizes[group, axis].sum()) for group in groups) + 1 for axis in range(3))
    I = I if family.model.media else 0
    rows = []
    for group in groups:
        members = [examples[i] for i in group]
        row = lay_out(members, group, T, S, I, family.model.media, G=G)
        for place, name in enumerate(name for example in members for _, name in example.media):
            row["pixel_values"][place] = tiny.pixels(name, family.model)
        rows.append(row)
    rows.append(empty_row(T, S, I, family.model.media, G))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def compute(family: tiny.Family, made, batch: dict[str, np.ndarray], key=None) -> Result:
    """Loss, metrics and gradients of one batch."""
    algorithm = algorithms.make(made, family.model)

    def loss_of(params, batch):
        terms, metrics, _ = algorithm.objective(algorithm.score(params, {}, batch, key), batch, {})
        means = {name: term.sum / term.count for name, term in terms.items()}
        return sum(term.weight * means[name] for name, term in terms.items()), (means, metrics)

    step = tiny.quick(jax.value_and_grad(loss_of, has_aux=True))
    (loss, (means, metrics)), gradients = step(tiny.as_arrays(family.params), tiny.as_arrays(batch))
    numbers = {"loss": float(loss)} | {name: float(mean) for name, mean in means.items()} | values(metrics)
    return Result(numbers, {path: np.asarray(leaf) for path, leaf in sharding.tree_paths(gradients).items()}, batch["example_id"])


@pytest.mark.parametrize("name", everyday(["llama", "llava"], "llava"))
def test_packing_changes_neither_loss_nor_gradients(name):
    """Pictures in later turns and rows of different numbers of examples too."""
    family = tiny.family(name)
    made, examples = config(z_loss=0.01), conversations(family)
    plain, packed = (compute(family, made, batch_of(family, examples, groups)) for groups in GROUPS.values())
    ids = lambda found: np.sort(found.example_ids[found.example_ids >= 0]).tolist()
    assert ids(plain) == ids(packed) == list(range(8))
    assert_same(packed, plain)


def by_hand(family: tiny.Family, examples: list[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """log p and log-sum-exp of the logits at the scored tokens, from rows with one example each."""
    tokens = [np.concatenate([example.prompt, *example.answers]) for example in examples]
    padded = np.zeros((len(tokens), max(map(len, tokens))), np.int32)
    for row, ids in zip(padded, tokens):
        row[: len(ids)] = ids
    look = tiny.quick(lambda params: family.model.logits(params, {"input_ids": padded}))
    logits = np.asarray(look(tiny.as_arrays(family.params)))
    lse = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    found = [
        (logits[row, at - 1, ids[at]] - lse[row, at - 1], lse[row, at - 1])
        for row, (ids, example) in enumerate(zip(tokens, examples))
        for at in [len(example.prompt) + np.flatnonzero(example.scored[0])]
    ]
    return tuple(np.concatenate(parts) for parts in zip(*found))


@pytest.mark.parametrize("settings", [dict(z_loss=0.5), dict(loss_type="dft")], ids=["nll", "dft"])
def test_values(llama, settings):
    examples = conversations(llama)
    logp, lse = by_hand(llama, examples)
    batch = batch_of(llama, examples, GROUPS["packed"])
    assert (batch["score_segment"] > 0).sum() == len(logp)
    found = compute(llama, config(**settings), batch).metrics
    if "z_loss" in settings:
        assert found["z_loss"] == pytest.approx(np.mean(lse**2), rel=1e-5)
        assert found["loss"] == pytest.approx(np.mean(-logp) + 0.5 * np.mean(lse**2), rel=1e-5)
    else:
        assert found["loss"] == pytest.approx(np.mean(-np.exp(logp) * logp), rel=1e-5)
        assert found.keys() == {"loss", "dft", "entropy", "mean_token_accuracy"}


def test_what_rows_become(llama):
    assert sft.make(config(), llama.model).needs == "supervised"
    assert sft.make(config("cpt"), llama.model).needs == "text"


def test_noise_only_while_training(llama):
    batch = tiny.as_arrays(batch_of(llama, conversations(llama), GROUPS["packed"]))
    score = sft.make(config(neftune_noise_alpha=5.0), llama.model).score
    logps = tiny.quick(lambda key: score(tiny.as_arrays(llama.params), {}, batch, key).logps.sum())
    calm, first, again, other = (float(logps(key)) for key in (None, *map(jax.random.key, (0, 0, 1))))
    assert first == again and abs(first - calm) > 0.1 and abs(other - first) > 0.1
    quiet = sft.make(config(), llama.model).score
    still = tiny.quick(lambda key: quiet(tiny.as_arrays(llama.params), {}, batch, key).logps.sum())
    assert float(still(jax.random.key(0))) == pytest.approx(calm, rel=1e-6), "evaluation has no key, and no noise"


@pytest.mark.slow
def test_how_strong_the_noise_is(llama):
    segments = jnp.asarray([[1] * 4 + [2] * 16 + [0] * 12, [1] * 25 + [0] * 7])
    head = llama.model.head(llama.params)
    noise = np.asarray(sft.neftune(jax.random.key(0), segments, head, alpha=5.0))
    assert noise.shape == (2, 32, tiny.TEXT["hidden_size"])
    for row, columns, length in ((0, slice(0, 4), 4), (0, slice(4, 20), 16), (1, slice(0, 25), 25)):
        bound = 5.0 / np.sqrt(length * tiny.TEXT["hidden_size"])
        largest = np.abs(noise[row, columns]).max()
        assert 0.8 * bound < largest <= bound and abs(noise[row, columns].mean()) < 0.2 * bound
        with jax.enable_x64(True):
            exact = sft.neftune(jax.random.key(0), segments, head._replace(weight=head.weight.astype(float)), alpha=5.0)
            drawn = jax.random.uniform(jax.random.key(0), noise.shape, jnp.float32, -1, 1)
            np.testing.assert_allclose(exact[row, columns], np.float64(drawn[row, columns]) * bound, rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_type="ntl"), r"loss_type 'ntl' is not known; did you mean 'nll'\?"),
        (dict(neftune_noise_alpha=-1.0), "neftune_noise_alpha is -1.0, but sft needs neftune_noise_alpha >= 0"),
        (dict(z_loss=-0.1), "z_loss is -0.1"),
    ],
)
def test_bad_settings(llama, changes, message):
    with pytest.raises(UserError, match=message):
        sft.make(config(**changes), llama.model)
