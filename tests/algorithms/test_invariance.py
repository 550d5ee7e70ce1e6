"""How a batch is laid out, ordered, split and computed changes nothing, for every algorithm: loss, metrics and the gradient of every
leaf, in float64, by the real training step. Every day on the smallest model, with everything changed at once; `-m slow` one by one on text
and on images."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from aligner import algorithms, sharding
from aligner.models import from_hf
from configs import common
from tests.algorithms import bigram, rows
from tests.everyday import everyday
from tests.invariance.step import Result, loss_and_gradients
from tests.invariance.test_layout import assert_same
from tests.models import tiny

BAR = 1e-9  # the project's is 1e-5
EXAMPLES = 8


def changed(config, **changes):
    config.update(changes)
    return config


SETTINGS = {
    "sft": lambda: changed(common.sft(), z_loss=0.1),
    "dft": lambda: changed(common.sft(), loss_type="dft"),
    "cpt": common.cpt,
    "distillation": common.distillation,
    "distillation, few tokens": lambda: changed(common.distillation(), loss_top_k=3, loss_top_k_of="both"),
    "iw_opd": lambda: changed(common.distillation(), objective="iw_opd", temperature=1.5),
    "reward": lambda: changed(common.reward(), center_rewards_coefficient=0.3, regularization=0.2),
    "plackett_luce": lambda: changed(common.reward(), loss_type="plackett_luce", answers=4, center_rewards_coefficient=0.1),
    "mse": lambda: changed(common.reward(), loss_type="mse", answers=4),
    "cost": lambda: changed(common.cost(), scale=0.7),
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
    "tpo": common.tpo,
    "tpo-l": lambda: changed(common.tpo(), loss_type="tpo-l", tpo_alpha=0.5, beta=2.0),
    "sso": common.sso,
}
EVERYDAY = ("sft", "distillation", "reward", "plackett_luce", "dpo", "dpo, mixed", "kto", "orpo", "cpo", "tpo", "sso")
ORDER = [5, 2, 7, 0, 1, 3, 6, 4]
CUBE = dict(data=2, fsdp=2, tensor=2)
# name -> (of the batch, of config.train, mesh)
AT_ONCE = {
    "packed": (dict(order=ORDER, per_row=2, more=3, empty_rows=4), dict(accumulate=4, remat="full"), dict(data=2)),
    "one a row": (dict(order=ORDER[::-1], more=1, empty_rows=4), dict(accumulate=3), None),
}
ONE_BY_ONE = {
    "accumulation": ({}, dict(accumulate=4), None),
    "padding": (dict(more=3, empty_rows=4), {}, None),
    "packing": (dict(per_row=2), {}, None),
    "shuffling": (dict(order=ORDER), {}, None),
    "remat": ({}, dict(remat="full"), None),
    "8 devices": ({}, {}, CUBE),
}


@functools.cache
def family(name: str, scores: bool, seed: int = 0, width: int = 16) -> tiny.Family:
    """A model and its parameters; `scores` gives it a score head."""
    if name == "bigram":
        model = bigram.make_model(scores)
        return tiny.Family(model, bigram.make_params(seed, model), [], None)
    small = dict(num_hidden_layers=1, hidden_size=width)
    config = tiny.llama_config(**small) if name == "llama" else tiny.llava_config(small, dict(num_hidden_layers=2))
    model = from_hf(config, score_head=scores)
    return tiny.Family(model, tiny.perturbed(model, seed=seed), [], None)


def compute(name: str, setting: str, batch=(), train=(), mesh=None) -> Result:
    config = tiny.config(model__dtype="float64", model__param_dtype="float64")
    config.algorithm = SETTINGS[setting]()
    config.train.update(dict(train))
    f = family(name, config.algorithm.name in algorithms.SCORING)
    teacher = family(name, False, seed=5, width=20) if config.algorithm.name == "distillation" else None
    needs = "supervised" if teacher else algorithms.make(config, f.model).needs
    examples = rows.make_examples(needs, EXAMPLES, model=f.model)
    reference = np.random.default_rng(5).normal(-22, 3, (EXAMPLES, max(len(example.answers) for example in examples)))
    made = rows.make_batch(examples, reference, needs, f.model, **dict(batch))
    with jax.enable_x64(True):
        devices = sharding.make_mesh(mesh or {"data": 1}, jax.devices()[: int(np.prod(list((mesh or {"data": 1}).values())))])
        return loss_and_gradients(f, made, config, devices, dtype="float64", teacher=teacher)


baseline = functools.cache(compute)


def check(name: str, setting: str, variant) -> None:
    expected, found = baseline(name, setting), compute(name, setting, *variant)
    assert found.metrics.keys() == expected.metrics.keys()
    assert all(gradient.dtype == np.float64 for gradient in found.gradients.values())
    assert sum(np.abs(gradient).max() > 1e-6 for gradient in expected.gradients.values()) >= 2
    assert_same(found, expected, bar=BAR)


def test_every_algorithm_is_here():
    offline = set(algorithms.FILES) - set(algorithms.ONLINE)
    assert {SETTINGS[setting]().name for setting in SETTINGS} == offline


@pytest.mark.parametrize("variant", ["packed", pytest.param("one a row", marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", everyday(SETTINGS, *EVERYDAY))
def test_all_at_once(setting, variant):
    check("bigram", setting, AT_ONCE[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ONE_BY_ONE)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_one_by_one(name, setting, variant):
    check(name, setting, ONE_BY_ONE[variant])


@pytest.mark.parametrize("setting", ["kto", "aot", "bco"])
def test_micro_batches_alone_would_show(setting, monkeypatch):
    """These objectives are of the whole batch: taken micro-batch by micro-batch they are others."""
    assert baseline("bigram", setting).metrics.get("kl", 1) > 0
    make = algorithms.make
    monkeypatch.setattr(algorithms, "make", lambda *args: dataclasses.replace(make(*args), whole_batch=False))
    found, expected = compute("bigram", setting, *AT_ONCE["packed"]), baseline("bigram", setting)
    path = "lm_head/kernel"
    assert np.abs(found.gradients[path] - expected.gradients[path]).max() > 1e-3 * np.abs(expected.gradients[path]).max()


@pytest.mark.slow
def test_the_examples_are_no_trivial_ones():
    assert len({round(baseline("bigram", setting).metrics["loss"], 6) for setting in SETTINGS}) == len(SETTINGS)
    assert 0 < baseline("bigram", "dpo").metrics["rewards/accuracies"] < 1
    assert jax.config.jax_enable_x64 is False
