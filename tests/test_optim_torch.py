"""AdamW and clipping against torch's, five steps."""

from tests.torch_required import torch  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aligner import optim
from tests.models import tiny


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay):
    rng = np.random.default_rng(0)
    start = {"a": {"kernel": rng.standard_normal((3, 4))}, "b": {"bias": rng.standard_normal(5)}}
    gradients = [jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), start) for _ in range(5)]
    config = tiny.config(optim__learning_rate=0.01, optim__weight_decay=decay, optim__schedule="linear", optim__warmup=0.4).optim
    with jax.enable_x64(True):
        optimizer = optim.make_optimizer(config, optim.make_schedule(config, 5))
        params = jax.tree.map(jnp.asarray, start)
        opt_state = optimizer.init(params)
        for grads in gradients:
            updates, opt_state = optimizer.update(jax.tree.map(jnp.asarray, grads), opt_state, params)
            params = optax.apply_updates(params, updates)

    theirs = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(start)]
    groups = [{"params": [theirs[0]], "weight_decay": decay}, {"params": [theirs[1]], "weight_decay": 0.0}]  # as transformers' Trainer
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    linear = lambda step: step / 2 if step < 2 else (5 - step) / 3  # transformers' linear schedule with two steps of warm-up
    rates = torch.optim.lr_scheduler.LambdaLR(adamw, linear)
    for grads in gradients:
        for parameter, gradient in zip(theirs, jax.tree.leaves(grads)):
            parameter.grad = torch.tensor(gradient)
        adamw.step()
        rates.step()
    for ours, parameter, first in zip(jax.tree.leaves(params), theirs, jax.tree.leaves(start)):
        assert np.abs(np.asarray(ours) - first).max() > 0.01  # it moved
        np.testing.assert_allclose(ours, parameter.detach().numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("limit", [0.5, 1.0, 100.0])
def test_clipping(limit):
    """The step's formula as tests/test_train_step.py states it is torch's."""
    from tests.test_train_step import clipped

    gradients = [np.float32([3.0, -4.0]), np.float32([[12.0]])]
    parameters = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    ours, our_norm = clipped(gradients, limit)
    assert norm.item() == pytest.approx(our_norm, rel=1e-6)
    for a, parameter in zip(ours, parameters):
        np.testing.assert_allclose(a, parameter.grad.numpy(), rtol=1e-6)
