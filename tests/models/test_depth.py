"""What depth costs a training step: the size of its program and the time to compile it, with 8 and with 32 layers.

`python -m tests.models.test_depth` prints the figures.
"""

from __future__ import annotations

import time

import jax
import numpy as np
import optax
import pytest

from aligner.models import from_hf
from tests.invariance import step
from tests.models import tiny

DEPTHS = (8, 32)
CONFIGS = {
    "llama": lambda depth: tiny.llama_config(num_hidden_layers=depth),
    "llava": lambda depth: tiny.llava_config(dict(num_hidden_layers=depth), dict(num_hidden_layers=depth)),  # tower and decoder
}


def lower(kind: str, depth: int):
    """A DPO step of a model so deep, as XLA gets it. What is computed again is a loop on a CPU, too."""
    model = from_hf(CONFIGS[kind](depth))
    f = tiny.Family(model, tiny.perturbed(model), tiny.make_pairs(model, 4, np.random.default_rng(1)), np.zeros((4, 2), np.float32))
    mesh = step.one_device()
    with jax.set_mesh(mesh):
        function, state, fixed = step.build(f, tiny.config(train__remat="full"), optax.adamw(1e-3), mesh)
        return function.lower(state, fixed, step.put(tiny.make_batch(f), mesh))


def size(kind: str, depth: int) -> int:
    """Lines of the program."""
    return len(lower(kind, depth).as_text().splitlines())


def seconds(kind: str, depth: int) -> float:
    """Processor time of the quicker of two compilations, neither from a cache."""
    cached, spent = jax.config.jax_enable_compilation_cache, []
    jax.config.update("jax_enable_compilation_cache", False)
    for _ in range(2):
        jax.clear_caches()
        lowered = lower(kind, depth)
        start = time.process_time()
        lowered.compile()
        spent.append(time.process_time() - start)
    jax.config.update("jax_enable_compilation_cache", cached)
    return min(spent)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("measure", [size, seconds])
def test_four_times_the_layers_take_a_fifth_more_at_most(kind, measure):
    shallow, deep = (measure(kind, depth) for depth in DEPTHS)
    assert deep <= 1.2 * shallow, (shallow, deep)


if __name__ == "__main__":
    print(f"| step of | layers | lines | ratio | seconds to compile | ratio |\n{'|---' * 6}|")
    for kind in CONFIGS:
        found = [(size(kind, depth), seconds(kind, depth)) for depth in DEPTHS]
        for depth, (lines, spent) in zip(DEPTHS, found):
            print(f"| {kind} | {depth} | {lines} | {lines / found[0][0]:.3f} | {spent:.2f} | {spent / found[0][1]:.2f} |")
