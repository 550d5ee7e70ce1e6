"""Meshes, and where parameters, optimizer state and activations lie on them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from aligner import optim, sharding, state
from aligner.models import from_hf
from aligner.types import UserError
from tests.models import text_configs, tiny, vision_configs

CUBE = dict(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def cube():
    return sharding.make_mesh(CUBE)


def specs(model, mesh, params):
    return {path: s.spec for path, s in sharding.tree_paths(sharding.param_shardings(params, model.sharding_rules, mesh)).items()}


DECODER = {
    "model/embed_tokens/embedding": P("tensor", "fsdp"),  # 62 rows: over tensor (2), not over tensor x fsdp (4)
    "model/layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
    "model/layers/self_attn/k_proj/kernel": P(None, "fsdp", "tensor"),
    "model/layers/self_attn/v_proj/bias": P(None, "tensor"),
    "model/layers/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
    "model/layers/mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
    "model/layers/mlp/up_proj/bias": P(None, "tensor"),
    "model/layers/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
    "lm_head/kernel": P("fsdp", "tensor"),
}
TOWER = {
    "encoder/layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
    "encoder/layers/self_attn/out_proj/kernel": P(None, "tensor", "fsdp"),
    "encoder/layers/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
    "encoder/layers/mlp/fc1/bias": P(None, "tensor"),
    "encoder/layers/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
}


def test_rules(family, cube):
    found = specs(family.model, cube, family.params)
    expected = {f"language_model/{path}" if family.model.media else path: spec for path, spec in DECODER.items()}
    if family.model.media:
        expected |= {f"vision_tower/vision_model/{path}": spec for path, spec in TOWER.items()}
        expected["multi_modal_projector/linear_1/kernel"] = P("fsdp", "tensor")
        expected["multi_modal_projector/linear_1/bias"] = P("tensor")
        expected["multi_modal_projector/linear_2/kernel"] = P("tensor", "fsdp")
    for path, spec in expected.items():
        assert found[path] == spec, path
    norms = [spec for path, spec in found.items() if path.endswith("scale")]
    assert norms and not any(axis for spec in norms for axis in spec)


def test_every_kernel_is_laid_out(family, cube):
    """A matrix that no rule names would be held whole by every device."""
    for path, spec in specs(family.model, cube, family.params).items():
        if path.endswith(("kernel", "/embedding")) and "position" not in path and "patch" not in path:
            assert "tensor" in spec and ("fsdp" in spec or "embedding" in path), path


# what any device may hold whole: small tables of places, convolutions over pixels and frames, routers, a pooling head that no loss reads
SMALL = r"posi\w+/embedding|tile_positional|patch_embedding|conv\d|/(shared_expert_)?gate/|vision_model/head/"
CONFIGS = {**text_configs.CASES, **vision_configs.CASES}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_of_every_family_is_laid_out(name):
    """As they are in sizes that every mesh divides."""
    configs = text_configs if name in text_configs.CASES else vision_configs
    first = CONFIGS[name][0]
    model = from_hf(configs.hf_config(name, **first) if configs is text_configs else configs.hf_config(name, first))
    wide = lambda leaf: jax.ShapeDtypeStruct(tuple(8 * size for size in leaf.shape), leaf.dtype)
    params = jax.tree.map(wide, jax.eval_shape(model.init, jax.random.key(0)))
    found = specs(model, sharding.make_mesh(dict(data=2, fsdp=4)), params)
    matrices = {path for path in found if re.search(r"(kernel|/embedding|weight)$", path) and not re.search(SMALL, path)}
    assert not [path for path in matrices if "fsdp" not in found[path]]


def test_a_dimension_that_does_not_divide_stays_whole(cube):
    assert sharding.spec_for(("embed", "heads"), (16, 7), cube) == P("fsdp", None)
    assert sharding.spec_for(("vocab", "embed"), (63, 15), cube) == P(None, None)
    assert sharding.spec_for(("batch",), (8,), cube) == P(("data", "fsdp"))
    assert sharding.spec_for(("batch",), (6,), cube) == P("data")  # over as many axes as divide it
    lying = sharding.make_mesh(dict(data=8))
    assert sharding.spec_for(("embed", "heads"), (16, 8), lying) == P(None, None)  # an axis of one device is no axis


def test_what_one_dimension_leaves_the_next_one_takes(cube):
    """No number of experts or tokens leaves a leaf whole, and no axis is used twice."""
    table, experts = ("rows", "embed"), ("expert", "embed", "mlp")
    assert [sharding.spec_for(table, (rows, 16), cube) for rows in (64, 62, 63)] == [P(("tensor", "fsdp"), None), P("tensor", "fsdp"), P(None, "fsdp")]
    assert [sharding.spec_for(experts, (count, 16, 24), cube) for count in (4, 5)] == [P("fsdp", None, "tensor"), P(None, "fsdp", "tensor")]
    rows_cut = sharding.make_mesh(dict(fsdp=4, sequence=2))
    assert [sharding.spec_for(experts, (count, 16, 24), rows_cut)[:2] for count in (8, 4)] == [(("fsdp", "sequence"), None), ("fsdp", "sequence")]


def test_one_rule_serves_stacked_and_single_leaves(cube):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {"layers": {"w": {"kernel": shape(3, 4, 6)}}, "w": {"kernel": shape(4, 6), "other": shape(4, 6)}}
    found = sharding.param_shardings(tree, ((r"w/kernel$", ("embed", "mlp")),), cube)
    assert found["layers"]["w"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert found["w"]["kernel"].spec == P("fsdp", "tensor") and not any(found["w"]["other"].spec)


FITTING = [dict(data=8), dict(data=-1), dict(data=-1, fsdp=2, tensor=2), dict(data=2, fsdp=-1, tensor=1), dict(data=1, fsdp=8)]


@pytest.mark.parametrize("sizes", FITTING, ids=str)
def test_make_mesh(sizes):
    mesh = sharding.make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor") and mesh.size == 8
    assert all(mesh.shape[axis] == size for axis, size in sizes.items() if size > 0)
    assert sharding.batch_parts(mesh) == mesh.shape["data"] * mesh.shape["fsdp"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.mark.parametrize(
    "sizes,cut",
    [
        (dict(data=2, fsdp=-1), "data"),
        (dict(data=-1), "data"),
        (dict(data=4, tensor=2), "data"),
        (dict(data=1, fsdp=-1), "fsdp"),  # weights go over the slow network then: there is no other axis
        (dict(data=1, fsdp=4, tensor=2), "fsdp"),
        (dict(data=1, tensor=8), "tensor"),
    ],
    ids=str,
)
def test_slices_are_cut_by_the_outermost_axis(sizes, cut):
    """Whatever the order of the devices: along every other axis, and along the parts of this one, lies one slice."""
    mesh = sharding.make_mesh(sizes, [Chip(i, i % 2) for i in range(8)])
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    first, second = np.split(slices, 2, axis=mesh.axis_names.index(cut))
    assert np.all(first == 0) and np.all(second == 1)


def test_six_slices_are_cut_by_several_axes_and_nodes_that_are_unlike_by_none():
    assert sharding.between_slices([4, 9, 1, 2], [Chip(i, i // 12) for i in range(72)]) == [2, 3, 1, 1]
    mesh = sharding.make_mesh(dict(data=-1), [Chip(i, i // 5) for i in range(8)])
    assert [chip.id for chip in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    "sizes,message",
    [
        (dict(data=3), "does not divide 8 devices"),
        (dict(data=2), "does not divide 8 devices"),
        (dict(data=-1, fsdp=3), "does not divide 8 devices"),
        (dict(data=-1, fsdp=-1), "at most one may be -1"),
        (dict(data=0), "each must be positive"),
        (dict(data=-2), "each must be positive"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message) as caught:
        sharding.make_mesh(sizes)
    assert "config.mesh" in str(caught.value) and "\n" not in str(caught.value)


def test_optimizer_state_is_laid_out_like_the_parameters(family, cube):
    config = tiny.config(optim__weight_decay=0.1, optim__groups=((".*", {"learning_rate": 0.5}),)).optim
    optimizer = optim.make_optimizer(config, optim.make_schedule(config, 10), family.model.trained_layers)
    shardings = sharding.param_shardings(family.params, family.model.sharding_rules, cube)
    params = jax.device_put(tiny.as_arrays(family.params), shardings)
    made = state.create(params, optimizer, {}, 0, cube)
    layout = {path: leaf.sharding for path, leaf in sharding.tree_paths(params).items()}
    [adam] = [part for part in made.opt_state if hasattr(part, "mu")]
    for moments in (adam.mu, adam.nu):
        for path, leaf in sharding.tree_paths(moments).items():
            assert leaf.sharding.is_equivalent_to(layout[path], leaf.ndim), path
    assert adam.count.sharding.is_fully_replicated and made.step.sharding.is_fully_replicated
    again = state.abstract(made)
    assert jax.tree.map(lambda leaf: leaf.sharding, again) == jax.tree.map(lambda leaf: leaf.sharding, made)


def test_constrain(cube):
    x = jnp.ones((8, 3, 6))
    assert sharding.constrain(x, "batch", None, "heads") is x  # without a mesh nothing is asked
    with jax.set_mesh(cube):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", None, "heads"))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(cube, P(("data", "fsdp"), None, "tensor")), 3)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("k", [3, 7])
def test_the_largest_of_a_row_that_is_cut(k):
    """As of a whole row: of equal ones the first, also where a part has fewer than are asked for."""
    x = jax.random.randint(jax.random.key(0), (4, 6, 10), 0, 4).astype(jnp.float32)
    at = jax.lax.top_k(x, k)[1]
    weights = jnp.arange(k, dtype=jnp.float32)
    total = lambda take: jax.jit(jax.grad(lambda x: jnp.sum(take(x) * weights)))
    with jax.set_mesh(sharding.make_mesh(dict(data=4, tensor=2))):
        np.testing.assert_array_equal(jax.jit(lambda x: sharding.largest(x, k, "vocab"))(x), at)
        np.testing.assert_array_equal(jax.jit(lambda x: sharding.taken(x, at, "vocab"))(x), jnp.take_along_axis(x, at, -1))
        found = total(lambda x: sharding.taken(x, at, "vocab"))(x)
    np.testing.assert_array_equal(found, total(lambda x: jnp.take_along_axis(x, at, -1))(x))
