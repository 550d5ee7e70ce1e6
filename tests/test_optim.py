"""Schedules, groups and weight decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner import optim
from aligner.types import UserError
from tests.models import tiny


def schedule(steps=100, **changes):
    changes = dict(learning_rate=2.0, warmup=0.0) | changes
    return optim.make_schedule(tiny.config(**{f"optim__{key}": value for key, value in changes.items()}).optim, steps)


@pytest.mark.parametrize("warmup", [0.1, 10.0])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules(name, warmup):
    """As transformers' get_scheduler has them: up over 10 steps from zero, then down to zero at step 100."""
    found = schedule(schedule=name, warmup=warmup)
    after = {
        "constant": lambda part: 1.0,
        "linear": lambda part: 1 - part,
        "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    }[name]
    for step in (0, 1, 5, 10, 11, 50, 99, 100):
        expected = step / 10 if step < 10 else after((step - 10) / 90)
        np.testing.assert_allclose(float(found(step)), 2.0 * expected, atol=1e-6, err_msg=str(step))


def test_a_part_of_a_step_of_warmup_is_a_whole_one():
    """As transformers rounds: a tenth of 25 steps are three."""
    found = schedule(steps=25, schedule="constant", warmup=0.1)
    np.testing.assert_allclose([float(found(step)) for step in range(4)], [0, 2 / 3, 4 / 3, 2], rtol=1e-6)


def test_without_warmup_the_first_step_is_at_the_peak():
    for name in optim.SCHEDULES:
        assert float(schedule(schedule=name)(0)) == 2.0


def test_a_wrong_schedule_names_the_nearest():
    with pytest.raises(UserError, match=r"'cosin' is not a schedule; did you mean 'cosine'\?"):
        schedule(schedule="cosin")


PARAMS = {"tower": {"layers": {"kernel": jnp.full((3, 2), 2.0)}, "norm": {"scale": jnp.full(2, 2.0)}}, "head": {"kernel": jnp.full(2, 2.0)}}


def moved(gradient, trained_layers=None, steps=1, **changes):
    """How far AdamW at a constant rate of 0.1 moves PARAMS, by path."""
    changes = dict(learning_rate=0.1, schedule="constant", warmup=0.0) | changes
    config = tiny.config(**{f"optim__{key}": value for key, value in changes.items()}).optim
    optimizer = optim.make_optimizer(config, optim.make_schedule(config, 10), trained_layers)
    grads, params = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), PARAMS), PARAMS
    opt_state = optimizer.init(params)
    for _ in range(steps):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), params, PARAMS)


def test_first_step_is_the_learning_rate_in_the_direction_of_the_sign():
    for leaf in jax.tree.leaves(moved(gradient=-3.0)):
        np.testing.assert_allclose(leaf, 0.1, rtol=1e-5)


def test_moments_of_bfloat16_parameters_fall_too():
    """After gradients of 1 ever smaller ones: as with float32 parameters."""
    config = tiny.config(optim__learning_rate=1.0, optim__schedule="constant", optim__warmup=0.0).optim
    optimizer, found = optim.make_optimizer(config, optim.make_schedule(config, 10)), []
    for dtype in ("bfloat16", "float32"):
        params = {"w": jnp.zeros(2, dtype)}
        gradients = jnp.where(jnp.arange(1500) < 300, 1.0, 2.0**-6).astype(dtype)
        step = lambda opt_state, g, params=params: optimizer.update({"w": jnp.full_like(params["w"], g)}, opt_state, params)[::-1]
        found.append(jax.lax.scan(step, optimizer.init(params), gradients)[1]["w"][-1])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_weight_decay_is_decoupled():
    """AdamW: lr * decay * parameter, whatever the gradient; of norms and biases only where a group says so."""
    found = moved(gradient=0.0, weight_decay=0.5)
    for leaf in (found["tower"]["layers"]["kernel"], found["head"]["kernel"]):
        np.testing.assert_allclose(leaf, -0.1 * 0.5 * 2.0, rtol=1e-5)
    np.testing.assert_array_equal(found["tower"]["norm"]["scale"], 0)
    found = moved(gradient=0.0, weight_decay=0.5, groups=((".*/norm", {"weight_decay": 1.0}),))
    np.testing.assert_allclose(found["tower"]["norm"]["scale"], -0.1 * 0.5 * 2.0, rtol=1e-5)


def test_no_weight_decay_where_no_gradient_reaches():
    everywhere = (("", {"weight_decay": 1.0}),)
    found = moved(gradient=0.0, weight_decay=0.5, trained_layers={"tower/layers": 2, "tower/norm": 0}, groups=everywhere)
    np.testing.assert_allclose(found["tower"]["layers"]["kernel"], [[-0.1] * 2, [-0.1] * 2, [0.0] * 2], rtol=1e-5)
    np.testing.assert_array_equal(found["tower"]["norm"]["scale"], 0)
    np.testing.assert_allclose(found["head"]["kernel"], -0.1, rtol=1e-5)


def test_groups_the_first_match_wins():
    groups = (("tower/layers", {"learning_rate": 0.5}), ("tower", {"learning_rate": 0.0}), (".*/norm", {"learning_rate": 9.0}))
    found = moved(gradient=1.0, groups=groups)
    np.testing.assert_allclose(found["tower"]["layers"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(found["tower"]["norm"]["scale"], 0)
    np.testing.assert_allclose(found["head"]["kernel"], -0.1, rtol=1e-5)
    decayed = moved(gradient=0.0, weight_decay=0.5, groups=(("tower", {"weight_decay": 0.2}),))
    np.testing.assert_allclose(decayed["tower"]["layers"]["kernel"], -0.1 * 0.5 * 0.2 * 2.0, rtol=1e-5)
    np.testing.assert_allclose(decayed["head"]["kernel"], -0.1, rtol=1e-5)


def test_a_group_with_an_unknown_setting_is_refused():
    with pytest.raises(UserError, match="'tower' sets 'lr'; a group may set learning_rate and weight_decay"):
        moved(gradient=1.0, groups=(("tower", {"lr": 0.5}),))


def test_a_group_that_matches_nothing_is_refused():
    optim.check_groups((("tower/layers", {}), ("head", {})), PARAMS)
    with pytest.raises(UserError, match=r"'towr/.*', which matches no parameter that trains; their tree begins with tower/..., head/..."):
        optim.check_groups((("head", {}), ("towr/.*", {})), PARAMS)


def test_decay_stops_where_gradients_stop(llava):
    """`trained_layers` of LLaVA says the same as its gradients: the tower's last layer and its post-norm are not reached."""
    assert llava.model.trained_layers == {
        "vision_tower/vision_model/encoder/layers": 2,
        "vision_tower/vision_model/post_layernorm": 0,
    }
