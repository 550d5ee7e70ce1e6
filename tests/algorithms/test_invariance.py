"""Order, accumulation, packing and padding change nothing, for every algorithm: the whole-batch ones too. In float64, by the real step."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from aligner import algorithms
from aligner.data.kinds import ENCODERS
from configs import common
from tests.algorithms import bigram
from tests.invariance.step import Result, loss_and_gradients, one_device
from tests.models import tiny

BAR = 1e-9
EXAMPLES = 8
SETTINGS = {
    "dpo": common.dpo,
    "dpo, mixed": lambda: changed(common.dpo(), loss_type=("hinge", "sft"), loss_weights=(0.5, 2.0), f_divergence_type="js_divergence"),
    "dpo, ipo, weighted": lambda: changed(common.dpo(), loss_type=("ipo",), use_weighting=True),
    "dpo, long answers": lambda: changed(common.dpo(), ld_alpha=0.3),
    "aot": lambda: changed(common.dpo(), loss_type=("aot",)),
    "aot_unpaired": lambda: changed(common.dpo(), loss_type=("aot_unpaired", "sigmoid_norm")),
    "bco": lambda: changed(common.dpo(), loss_type=("bco",)),
    "dpo_ranked": common.dpo_ranked,
    "kto": lambda: changed(common.kto(), undesirable_weight=0.7),
    "apo_zero_unpaired": lambda: changed(common.kto(), loss_type="apo_zero_unpaired"),
    "bco, unpaired": lambda: changed(common.kto(), loss_type="bco"),
    "orpo": common.orpo,
    "orpo, completion": lambda: changed(common.orpo(), nll_over="completion"),
    "cpo": common.cpo,
    "simpo": common.simpo,
    "alphapo": common.alphapo,
    "sso": common.sso,
}
# everything at once, in two ways
VARIANTS = {
    "packed": dict(order=[5, 2, 7, 0, 1, 3, 6, 4], per_row=2, more=3, empty_rows=4, accumulate=4),
    "one a row": dict(order=[1, 0, 7, 6, 2, 3, 5, 4], empty_rows=4, accumulate=3),
}


def changed(config, **changes):
    config.update(changes)
    return config


@functools.cache
def compute(name: str, variant: str | None = None) -> Result:
    changes = dict(VARIANTS[variant]) if variant else {}
    config = tiny.config(model__dtype="float64", model__param_dtype="float64", train__accumulate=changes.pop("accumulate", 1))
    config.algorithm = SETTINGS[name]()
    model = bigram.make_model()
    with bigram.exact():
        needs = algorithms.make(config, model).needs
        answers = {"ranked": 4, "two_sided": 4, "unpaired_alone": 1}.get(needs, 2)
        reference = np.random.default_rng(5).normal(-22, 3, (EXAMPLES, answers))
        batch = bigram.make_batch(bigram.make_examples(needs, EXAMPLES), reference, prompt=ENCODERS[needs].prompt, **changes)
        family = tiny.Family(model, bigram.make_params(), [], reference)
        return loss_and_gradients(family, batch, config, one_device(), dtype="float64")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_same_loss_metrics_and_gradients(name, variant):
    expected, found = compute(name), compute(name, variant)
    assert found.metrics.keys() == expected.metrics.keys()
    for metric in expected.metrics.keys() - {"num_tokens"}:
        assert found.metrics[metric] == pytest.approx(expected.metrics[metric], rel=BAR), metric
    for path, gradient in expected.gradients.items():
        assert gradient.dtype == np.float64 and np.abs(gradient).max() > 1e-6, path
        assert np.abs(found.gradients[path] - gradient).max() <= BAR * np.abs(gradient).max(), path


@pytest.mark.parametrize("name", ["kto", "aot", "bco"])
def test_micro_batches_alone_would_show(name, monkeypatch):
    """These objectives are of the whole batch: taken micro-batch by micro-batch they are others."""
    assert compute(name).metrics.get("kl", 1) > 0
    make = algorithms.make
    monkeypatch.setattr(algorithms, "make", lambda *args: dataclasses.replace(make(*args), whole_batch=False))
    found, expected = compute.__wrapped__(name, "packed"), compute(name)
    path = "lm_head/kernel"
    assert np.abs(found.gradients[path] - expected.gradients[path]).max() > 1e-3 * np.abs(expected.gradients[path]).max()


def test_the_examples_are_no_trivial_ones():
    assert len({round(compute(name).metrics["loss"], 6) for name in SETTINGS}) == len(SETTINGS)
    assert 0 < compute("dpo").metrics["rewards/accuracies"] < 1
    assert jax.config.jax_enable_x64 is False
