"""Whole steps against TRL's trainers: same weights, same rows; loss, metrics and the gradient of every tensor."""

import jax
import numpy as np
import pytest

import aligner
from aligner import algorithms
from aligner.data.kinds import ENCODERS
from aligner.data.layout import lay_out, shape_of
from aligner.metrics import values
from configs import common
from tests.everyday import everyday
from tests.golden import trl_dpo, trl_others
from tests.golden.checkpoints import LLAMA, load_hf, perturb, save_llama
from tests.golden.compare import by_name, relative
from tests.golden.test_dpo_step import batch_of, text_rows
from tests.models import tiny
from tests.torch_required import torch

BAR = 1e-5  # the project's bar is 1e-4
JUDGED = [
    {"prompt": "t8 t9 t10", "completion": " t11 t12", "label": True},
    {"prompt": "t8 t9 t10 t15 t20", "completion": " t13", "label": False},
    {"prompt": "t33", "completion": " t34 t35 t36 t37", "label": True},
    {"prompt": "t40 t41", "completion": " t42 t60 t61", "label": True},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(policy, reference): the policy is the reference with every weight moved a little."""
    policy, reference = (tmp_path_factory.mktemp(name) for name in ("policy", "reference"))
    for folder in (policy, reference):
        save_llama(folder, **LLAMA["biases"])
    perturb(load_hf(policy), scale=0.05, seed=7).save_pretrained(policy)
    return policy, reference


def our_step(config, policy, reference, batch):
    """(loss, metrics, gradients by name) with the reference in memory, reduced as the training step does."""
    config.reference.kind = "copy"
    model, params = aligner.load(policy)
    algorithm = algorithms.make(config, model)
    fixed = {"reference": aligner.load(reference)[1]}

    def loss_of(params):
        terms, metrics, _ = algorithm.objective(algorithm.score(params, fixed, batch, None), batch, algorithm.carry)
        return sum(term.weight * term.sum / term.count for term in terms.values()), metrics

    (loss, metrics), gradients = tiny.quick(jax.value_and_grad(loss_of, has_aux=True))(params)
    return float(loss), values(metrics), by_name(model, gradients)


def lay_rows(examples, prompt: bool):
    """One example a row, a column and a slot left over."""
    T, S, _ = (max(sizes) for sizes in zip(*map(shape_of, examples)))
    S += max(len(example.prompt) for example in examples) if prompt else 0
    rows = [lay_out([example], [i], T + 1, S + 1, 0, prompt=prompt) for i, example in enumerate(examples)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    labels = [(example.values or {}).get("label", 0) for example in examples]
    return batch | {"label": np.array(labels, np.float32)[:, None]}


def compare(ours, theirs, skipped=()) -> None:
    loss, metrics, gradients = ours
    assert loss == pytest.approx(theirs.loss, rel=BAR)
    for name, value in theirs.metrics.items():
        if name not in ("num_tokens", *skipped):
            assert metrics[name] == pytest.approx(value, rel=BAR, abs=BAR), name
    assert set(gradients) == set(theirs.gradients)
    for name, expected in theirs.gradients.items():
        assert relative(gradients[name], expected) <= BAR, name


def setting(make, **changes):
    config = common.base()
    config.algorithm = make()
    config.algorithm.update(changes)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(loss_type=("aot_unpaired", "sft"), loss_weights=(0.7, 0.4)), marks=pytest.mark.slow),
        pytest.param(dict(loss_type=("ipo",), ld_alpha=0.4), marks=pytest.mark.slow),
        dict(loss_type=("sigmoid",), use_weighting=True, f_divergence_type="js_divergence"),
    ],
    ids=["sorted and sft", "long answers", "weighted"],
)
def test_dpo(folders, changes):
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}
    theirs = trl_dpo.step(*folders, text_rows(), dtype=torch.float64, beta=0.3, **arguments)
    batch = batch_of(aligner.load(folders[0])[0], theirs.inputs, shared=True)
    compare(our_step(setting(common.dpo, beta=0.3, **changes), *folders, batch), theirs)


@pytest.mark.parametrize("loss_type", everyday(["kto", "apo_zero_unpaired"], "kto"))
def test_kto(folders, loss_type):
    changes = dict(loss_type=loss_type, beta=0.3, undesirable_weight=0.6)
    theirs = trl_others.kto(*folders, JUDGED, **changes)
    ours = our_step(setting(common.kto, **changes), *folders, lay_rows(theirs.examples, prompt=False))
    compare(ours, theirs, skipped=() if loss_type == "kto" else ("kl",))
    assert loss_type != "kto" or ours[1]["kl"] > 0.01  # else the reference point would not be seen


@pytest.mark.parametrize(
    "changes",
    [
        dict(label_smoothing=0.1),
        pytest.param(dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0), marks=pytest.mark.slow),
        pytest.param(dict(loss_type="simpo", alpha=0.2, cpo_alpha=0.3), marks=pytest.mark.slow),
    ],
    ids=["cpo", "simpo", "alphapo"],
)
def test_cpo(folders, changes):
    theirs = trl_others.cpo(folders[0], text_rows(), **changes)
    ours = our_step(setting(common.cpo, **changes), *folders, lay_rows(theirs.examples, prompt=False))
    skipped = ("logits/chosen", "logits/rejected", *(() if changes.get("cpo_alpha", 1) else ("nll_loss",)))  # ours: of answers alone
    compare(ours, theirs, skipped)


def test_orpo(folders):
    theirs = trl_others.orpo(folders[0], text_rows(), beta=0.4)
    config = setting(common.orpo, beta=0.4)
    kind = ENCODERS[algorithms.make(config, aligner.load(folders[0])[0]).needs]
    compare(our_step(config, *folders, lay_rows(theirs.examples, kind.prompt)), theirs, ("logits/chosen", "logits/rejected"))
