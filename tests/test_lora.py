"""Splitting the tree into what trains and what is fixed, and joining it again."""

import jax
import numpy as np
import pytest

from aligner import lora, optim, sharding, state
from aligner.types import UserError
from tests.models import tiny


def test_round_trip(llava):
    freeze = ("vision_tower/.*", r"language_model/model/layers/self_attn/q_proj/bias")
    trainable, base = lora.split(llava.params, freeze)
    ours, theirs, all_paths = (set(sharding.tree_paths(tree)) for tree in (trainable, base, llava.params))
    assert ours | theirs == all_paths and not ours & theirs
    assert theirs == {p for p in all_paths if p.startswith("vision_tower/") or p == freeze[1]}
    joined = lora.combine(trainable, base)
    assert jax.tree.structure(joined) == jax.tree.structure(llava.params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(llava.params)))


def test_nothing_frozen(llama):
    trainable, base = lora.split(llama.params, ())
    assert base == {} and lora.combine(trainable, base).keys() == llama.params.keys()


def test_a_pattern_matches_from_the_start():
    params = {"a": {"kernel": 1}, "ba": {"kernel": 2}}
    assert lora.split(params, ("a/",)) == ({"ba": {"kernel": 2}}, {"a": {"kernel": 1}})


@pytest.mark.parametrize(
    "freeze,message",
    [(("vision_towr/.*",), "'vision_towr/.*', which matches no parameter"), ((".*",), "nothing would train")],
)
def test_errors(llava, freeze, message):
    with pytest.raises(UserError, match=message):
        lora.split(llava.params, freeze)


def test_frozen_leaves_get_no_optimizer_memory(llava):
    config = tiny.config(optim__freeze=("vision_tower/.*", "language_model/lm_head/.*"), optim__weight_decay=0.1)
    trainable, _ = lora.split(llava.params, config.optim.freeze)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    trainable = jax.device_put(trainable, sharding.replicated(mesh))
    made = state.create(trainable, optim.make_optimizer(config.optim, optim.make_schedule(config.optim, 10)), {}, 0, mesh)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(made.opt_state) <= 2 * size(trainable) + 16  # two moments, and two step counters
    assert size(trainable) < 0.8 * size(llava.params)
    paths = " ".join(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(made.opt_state)[0])
    assert "q_proj" in paths and "vision_tower" not in paths and "lm_head" not in paths
    np.testing.assert_array_equal(made.step, 0)
