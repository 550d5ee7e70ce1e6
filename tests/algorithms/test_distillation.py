"""Distillation from a teacher of another width: its loss by hand, invariance of layout, learning, and what is refused."""

import functools

import jax
import numpy as np
import optax
import pytest

from aligner import algorithms, convert, metrics, sharding, state
from aligner.algorithms.distillation import distil
from aligner.data.layout import lay_out, shape_of
from aligner.data.templates import Encoded
from aligner.logprobs import dense_logits
from aligner.models import from_hf
from aligner.train_step import jit, make_train_step
from aligner.types import UserError
from configs import common
from scripts.make_tiny_checkpoint import make_llama
from tests.invariance.step import keep_gradient, put
from tests.models import tiny

BAR = 1e-5


@functools.cache
def pair(name: str):
    """(student, teacher, rows): each a model with parameters; the teacher is wider. One answer a row, some of its tokens scored."""
    wide = dict(hidden_size=20)
    config = tiny.llama_config() if name == "llama" else tiny.llava_config()
    other = tiny.llama_config(**wide) if name == "llama" else tiny.llava_config(text=wide)
    student, teacher = from_hf(config), from_hf(other)
    rows = []
    for number, group in enumerate(tiny.make_pairs(student, 8, np.random.default_rng(2))):
        answer = group.answers[0]
        scored = np.arange(len(answer)) % 3 != 1 if number % 2 else np.ones(len(answer), bool)
        rows.append(Encoded(group.prompt, (answer,), group.media, (scored,)))
    return (student, tiny.perturbed(student, 0.1)), (teacher, tiny.perturbed(teacher, 0.1, seed=5)), rows


def make_batch(name: str, more=0):
    (model, _), _, examples = pair(name)
    T, S, I = (max(sizes) + more for sizes in zip(*map(shape_of, examples)))
    made = []
    for number, example in enumerate(examples):
        one = lay_out([example], [number], T, S, I if model.media else 0, model.media)
        for place, (_, image) in enumerate(example.media):
            one["pixel_values"][place] = tiny.pixels(image, model)
        made.append(one)
    return {key: np.stack([row[key] for row in made]) for key in made[0]}


def config(**changes):
    made = common.base()
    made.model.dtype = "float32"
    made.algorithm = common.distillation()
    made.algorithm.update(changes)
    return made


def step(name: str, batch, mesh=None, accumulate=1, optimizer=None, steps=1, **changes):
    """(metrics of every step, the optimizer's last state: the gradients, with the default optimizer)."""
    (model, params), (teacher, teacher_params), _ = pair(name)
    mesh = sharding.make_mesh(mesh) if mesh else sharding.make_mesh({"data": 1}, jax.devices()[:1])
    optimizer = optimizer or keep_gradient()
    with jax.set_mesh(mesh):
        place = lambda model, params: jax.device_put(
            tiny.as_arrays(params, "float32"), sharding.param_shardings(params, model.sharding_rules, mesh)
        )
        algorithm = distil(config(**changes), model, teacher)
        now = state.create(place(model, params), optimizer, algorithm.carry, 0, mesh)
        function = jit(make_train_step(algorithm, optimizer, dtype="float32", accumulate=accumulate, max_grad_norm=0.0))
        found, placed, fixed = [], put(batch, mesh), {"base": {}, "teacher": place(teacher, teacher_params)}
        for _ in range(steps):
            now, one = function(now, fixed, placed)
            one.pop("example_ids")
            found.append(metrics.values(one))
    return found, now.opt_state


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta"), [("llama", 0.5), ("llava", 1.0)])
def test_loss_by_hand_and_however_it_is_laid_out(name, beta):
    batch = make_batch(name)
    [expected], gradients = step(name, batch, beta=beta, temperature=1.5)
    logs = []
    for model, params in pair(name)[:2]:
        logits = jax.jit(lambda p, b, m=model: dense_logits(m.apply(p, b, features=m.encode(p, b)).hidden, m.head(p)))(params, batch)
        logits = np.take_along_axis(np.asarray(logits), batch["score_from"][..., None], axis=1)
        logs.append(np.asarray(jax.nn.log_softmax(logits / 1.5), np.float64))
    (log_p, log_q), scored = logs, batch["score_segment"] > 0
    kl = lambda a, b: (np.exp(a) * (a - b)).sum(-1)
    log_m = np.logaddexp(log_q + np.log(0.5), log_p + np.log(0.5))
    value = {0.5: (kl(log_q, log_m) + kl(log_p, log_m)) / 2, 1.0: kl(log_p, log_q)}[beta]
    assert expected["loss"] == pytest.approx(value[scored].mean(), rel=1e-5)
    assert expected["agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1))[scored].mean())

    batch = make_batch(name, more=1)
    [found], others = step(name, batch, dict(data=2, fsdp=2, tensor=2), accumulate=2, beta=beta, temperature=1.5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=BAR)
    gradients, others = (jax.tree.map(np.asarray, sharding.tree_paths(tree)) for tree in (gradients, others))
    for path, gradient in gradients.items():
        if not path.endswith("k_proj/bias"):
            assert np.abs(others[path] - gradient).max() <= BAR * np.abs(gradient).max(), path


@pytest.mark.slow
def test_the_student_comes_to_agree():
    found, _ = step("llama", make_batch("llama"), optimizer=optax.adam(1e-2), steps=60)
    assert found[-1]["loss"] < 0.2 * found[0]["loss"] and found[-1]["agreement"] > found[0]["agreement"]


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    make_llama(tmp_path / "student", hidden_size=16, layers=1, heads=2, kv_heads=1)
    make_llama(tmp_path / "other", vocab_size=400, hidden_size=16, layers=1, heads=2, kv_heads=1)
    make_llama(tmp_path / "fits", seed=1, hidden_size=32, layers=1, heads=2, kv_heads=1)
    model, _ = convert.open_model(tmp_path / "student")
    assert algorithms.make(config(teacher=str(tmp_path / "fits")), model).others["teacher"][0].config.hidden_size == 32
    for changes, words in [
        (dict(), "teacher is empty"),
        (dict(teacher=str(tmp_path / "other")), "another vocabulary"),
        (dict(teacher=str(tmp_path / "fits"), beta=1.5), "in \\[0, 1\\]"),
        (dict(teacher=str(tmp_path / "fits"), temperature=0.0), "above 0"),
        (dict(teacher=str(tmp_path / "fits"), objective="iw-opd"), "did you mean 'iw_opd'"),
        (dict(teacher=str(tmp_path / "fits"), loss_top_k=3, loss_top_k_of="techer"), "did you mean 'teacher'"),
        (dict(teacher=str(tmp_path / "fits"), loss_top_k=100000), "loss_top_k is 100000, but the vocabulary has"),
    ]:
        with pytest.raises(UserError, match=words):
            algorithms.make(config(**changes), model)
