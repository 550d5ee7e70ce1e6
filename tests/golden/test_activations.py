"""Activations in bfloat16 against PyTorch's, which compute in float32 and round once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aligner.models.layers import ACTIVATIONS
from tests.models import tiny
from tests.torch_required import torch

F = torch.nn.functional
# the share of 100,000 results that may be off by a rounding: both libraries approximate erf and tanh themselves
CASES = {"silu": (F.silu, 0.0), "gelu": (F.gelu, 0.1), "gelu_pytorch_tanh": (lambda x: F.gelu(x, approximate="tanh"), 0.05)}


@pytest.mark.parametrize("name", CASES)
def test_rounded_as_pytorch_rounds(name):
    theirs, share = CASES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, 100_000), jnp.bfloat16)
    found = np.float32(jax.jit(ACTIVATIONS[name], compiler_options=tiny.FULL)(x))
    expected = theirs(torch.tensor(np.float32(x)).bfloat16()).float().numpy()
    assert np.mean(found != expected) <= share
