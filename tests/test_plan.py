"""What `aligner.plan` says of a config is what a run of it holds, computes and sends."""

import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from aligner import ahead, convert, lora, plan, sharding
from aligner.models.layers import REMAT
from aligner.run import attach
from aligner.trees import flatten
from aligner.types import UserError
from configs import common
from scripts.make_tiny_checkpoint import make_llama
from tests.invariance.step import build, keep_gradient, put
from tests.models import tiny
from tests.resume.runs import ROOT
from tests.test_main import forget_flags

CUBE = dict(data=2, fsdp=2, tensor=2)


def step_of(f, devices=8, row=None, **changes):
    config = tiny.config(**{f"mesh__{axis}": size for axis, size in CUBE.items()} if devices == 8 else {}, **changes)
    batch = tiny.make_batch(f)
    sizes = ahead.Row(batch["tokens"].shape[1], batch["score_token"].shape[1], batch.get("image_mask", np.zeros((8, 0))).shape[1])
    return config, batch, ahead.make_step(config, f.model, jax.devices()[:devices], row or sizes)


def same(ours, real):
    """Shapes, dtypes and places of abstract leaves and of arrays."""
    assert jax.tree.structure(ours) == jax.tree.structure(real)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(real)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.sharding.is_equivalent_to(b.sharding, len(a.shape)), (path, a.sharding, b.sharding)


def test_arguments_are_those_of_a_run(family):
    config, batch, step = step_of(family, reference__kind="copy")
    with jax.set_mesh(step.mesh):
        _, real, fixed = build(family, config, keep_gradient(), step.mesh)
        same(step.state.trainable, real.trainable)
        same(step.fixed, fixed)
        placed = put(batch, step.mesh)
        placed.pop("reference_logps")  # of a copy in memory there is no column
        same(step.batch, placed)


def test_arguments_with_adapters_and_a_precomputed_reference(llama):
    config, batch, step = step_of(llama, lora__rank=2, lora__modules_to_save=("lm_head",), lora__dropout=0.1)
    with jax.set_mesh(step.mesh):
        place = sharding.param_shardings(llama.params, llama.model.sharding_rules, step.mesh)
        params = jax.device_put(tiny.as_arrays(llama.params), place)
        adapters = lora.plan(config, llama.model, params)
        trainable, base = lora.split(attach(config, llama.model, params, adapters, {}, step.mesh), (), adapters)
        same(step.state.trainable, trainable)
        same(step.fixed, {"base": base})
        same(step.batch, put(batch, step.mesh))


def test_a_quantised_base_counts_by_its_bits(llama):
    pytest.importorskip("qwix")
    options = dict(lora__rank=2, reference__kind="base", devices=1)
    _, _, dense = step_of(llama, **options)
    _, _, packed = step_of(llama, quant__base="int8", **options)
    kernels = lora.quantised_kernels(llama.model.conversion, llama.params)
    found = flatten(packed.fixed["base"])
    assert {path for path, leaf in found.items() if hasattr(leaf, "qvalue")} == kernels
    saved = sum(3 * found[path].qvalue.size - 4 * found[path].scale.size for path in kernels)
    assert ahead.local_bytes(dense.fixed) - ahead.local_bytes(packed.fixed) == saved


@pytest.mark.slow
def test_bytes_are_the_compilers(llama):
    """On eight devices the arguments of the compiled program are state, frozen parameters and batch, and nothing else."""
    _, _, step = step_of(llama)
    compiled = ahead.compile_step(step)
    assert ahead.local_bytes((step.state, step.fixed, step.batch)) == compiled.memory_analysis().argument_size_in_bytes
    found = ahead.figures(step)
    assert found["resident_bytes"] + found["temporary_bytes"] <= found["total_bytes"] < 1.05 * (found["resident_bytes"] + found["temporary_bytes"]) + 4096
    assert found["trainable"] == found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(llama.params))


KINDS = [pytest.param(name, marks=() if name in ("kto", "grpo") else pytest.mark.slow)
         for name in ("sft", "kto", "orpo", "simpo", "dpo_ranked", "sso", "tpo", "grpo")]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_algorithm_has_a_step(llama, name):
    config = tiny.config()
    config.algorithm = getattr(common, name)()
    if name == "grpo":
        config.algorithm.reward_funcs = ("math",)
    row = ahead.row_of(config, llama.model, 24, None, 0, None)
    step = ahead.make_step(config, llama.model, jax.devices()[:1], row)
    assert ahead.flops(step) > 0


@pytest.mark.parametrize("changes,copies", [({}, 2), ({"algorithm__beta": 0.0}, 1), ({"generation__server": "vllm:http://there:8000", "lora__rank": 2}, 0)],
    ids=["reference", "alone", "server"])  # fmt: skip
def test_what_lies_beside_the_step_of_an_online_algorithm(llama, changes, copies):
    """The weights that write answers and the reference, in the dtype of the computation; a server writes with its own."""
    config = tiny.config(model__dtype="bfloat16", mesh__fsdp=8)
    config.algorithm = common.grpo()
    config.algorithm.reward_funcs, config.algorithm.beta = ("math",), 0.1
    with config.unlocked():
        for name, value in changes.items():
            section, key = name.split("__")
            config[section][key] = value
    step = ahead.make_step(config, llama.model, jax.devices(), ahead.row_of(config, llama.model, 24, None, 0, None))
    policy, adapters = (ahead.local_bytes(tree) for tree in (step.params, step.state.trainable))
    assert ahead.local_bytes(step.beside) == (adapters // 2 if "lora__rank" in changes else copies * policy // 2)
    assert step.fixed.keys() == {"base"}


def test_a_reference_in_memory_shares_what_does_not_train(llama):
    _, _, step = step_of(llama, reference__kind="copy", optim__freeze=("lm_head/.*",), devices=1)
    frozen = ahead.local_bytes(step.fixed["base"])
    assert frozen > 0
    assert ahead.local_bytes(ahead.once(step.fixed)) == frozen + ahead.local_bytes(step.state.trainable)


def test_flops(llama):
    """Three times two operations for each weight and token, the embedding apart; the head, and what is behind the last attention, for scored
    positions alone."""
    _, batch, step = step_of(llama, devices=1)
    rows, tokens = batch["tokens"].shape
    leaves = flatten(llama.params)
    size = lambda *names: sum(leaf.size for path, leaf in leaves.items() if path.endswith("kernel") and any(name in path for name in names))
    scored, config = batch["score_token"].shape[1], llama.model.config
    last = size("o_proj", "mlp") // config.num_hidden_layers
    linear = 6 * rows * (tokens * (size("layers") - last) + scored * (last + size("lm_head")))
    attention = 3 * 2 * 2 * rows * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2
    assert linear + attention <= ahead.flops(step) < 1.1 * (linear + attention)


def test_flops_count_a_loop_as_often_as_it_runs():
    w = jnp.ones((4, 4))
    looped = jax.make_jaxpr(lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0])(jnp.ones((3, 4)))
    assert ahead._flops(looped.jaxpr) == 7 * 2 * 3 * 4 * 4


def test_collectives_count_a_loop_as_often_as_it_runs():
    mesh = sharding.make_mesh(dict(data=1, fsdp=8))
    place = lambda *axes: jax.NamedSharding(mesh, P(*axes))

    def gather(stacked, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(body, x, stacked)[0]

    with jax.set_mesh(mesh):
        arguments = jax.device_put(jnp.ones((5, 16, 16)), place(None, "fsdp")), jax.device_put(jnp.ones((8, 16)), place("fsdp"))
        program = jax.jit(gather, out_shardings=place("fsdp")).lower(*arguments).compile().as_text()
    [one] = [c for c in ahead.find_collectives(program) if c.kind == "all-gather"]
    assert (one.shape, one.times, one.bytes) == ((16, 16), 5, 4 * 16 * 16)
    assert ahead.collectives(program)["all-gather"] == {"count": 1, "times": 5, "bytes": 5 * 4 * 16 * 16}


TPU_PROGRAM = """
%all-reduce-scatter.1 (input: f32[8,16]) -> f32[1,16] {
  %all-reduce.3 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=1, to_apply=%add
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %all-gather-start = (bf16[1,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %fusion = f32[1,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %started = (bf16[8,16]{1,0}) fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
}

%async_collective_fusion.1 (input: bf16[1,16]) -> bf16[8,16] {
  %all-gather.2 = bf16[8,16]{1,0} all-gather(%x), channel_id=2, dimensions={0}, frontend_attributes={chain_id="6"}
}

%cond.2 (p: (u32[], f32[8,16])) -> pred[] {
  %bound = u32[]{:T(128)} constant(16)
  ROOT %compare = pred[]{:T(512)} compare(%n, %bound), direction=LT
}

%body.2 (p: (u32[], f32[8,16])) -> (u32[], f32[8,16]) {
  %permute = bf16[1,16]{1,0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.2 = (u32[], f32[8,16]) while(%s), condition=%cond.2, body=%body.2
  %while.1 = (s32[], f32[8,16]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %all-reduce.9 = (f32[], f32[4]) all-reduce(%c, %d), channel_id=3, to_apply=%add
}
"""


def test_collectives_as_a_tpu_writes_them():
    found = ahead.collectives(TPU_PROGRAM)
    assert found["all-gather"] == {"count": 1, "times": 32, "bytes": 32 * 2 * 8 * 16}
    assert found["reduce-scatter"] == {"count": 1, "times": 32, "bytes": 32 * 4 * 16}
    assert found["all-reduce"] == {"count": 1, "times": 1, "bytes": 4 * 5}
    assert found["collective-permute"] == {"count": 1, "times": 16, "bytes": 16 * 2 * 16}


def test_remedies_cost_ever_more():
    config = tiny.config(data__batch_size=32, reference__kind="copy")
    told = [settings for settings, _ in plan.remedies(config, True, 8)]
    assert set(plan.REMAT) == set(REMAT)
    assert told[:3] == ["--config.train.remat=dots", "--config.train.remat=context", "--config.train.remat=full"]
    assert told[3:5] == ["--config.train.remat=full --config.train.accumulate=2", "--config.train.remat=full --config.train.accumulate=4"]
    assert [setting for setting in told[-1].split() if "lora" in setting or "fsdp" in setting] == ["--config.mesh.fsdp=8", "--config.lora.rank=16"]
    first = next(plan.remedies(config, False, 8))
    assert first[0] == "--config.mesh.fsdp=2" and first[1].mesh.data == -1
    assert config.train.remat == "none" and config.mesh.fsdp == 1  # the config itself stays


@pytest.mark.parametrize("mesh", [dict(sequence=4, data=1), dict(sequence=2), dict(data=1, tensor=-1), dict(fsdp=2, data=4)], ids=str)
def test_remedies_have_meshes_of_all_devices(mesh):
    config = tiny.config(data__batch_size=32, reference__kind="copy", **{f"mesh__{axis}": size for axis, size in mesh.items()})
    tried = [changed for _, changed in plan.remedies(config, False, 8)]
    assert tried
    for changed in tried:
        sharding.make_mesh(changed.mesh, jax.devices()[:8])


def test_what_cannot_be_is_passed_over(monkeypatch, capsys):
    """A reference that follows the policy is no model with its adapters off; the search goes on, or ends in its own words."""

    def figures(config, devices, **row):
        if config.lora.rank:
            raise UserError("config.algorithm.sync_ref_model=True needs a reference in memory")
        return {"too_large": False, "total_bytes": 10}

    monkeypatch.setattr(plan, "plan", figures)
    assert plan.find_remedy(tiny.config(data__batch_size=32), {"resident_bytes": 4}, 6, jax.devices()) is None
    assert "no: config.algorithm.sync_ref_model=True" in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "model"
    make_llama(folder, vocab_size=384, hidden_size=32, layers=2, heads=2, kv_heads=2)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # they are not read
    return folder


def test_a_teacher_is_planned_without_its_weights(checkpoint):
    config = tiny.config(reference__kind="precomputed")
    config.algorithm = common.distillation()
    config.algorithm.teacher = str(checkpoint)
    model = convert.model_from_folder(checkpoint)
    step = ahead.make_step(config, model, jax.devices()[:1], ahead.row_of(config, model, 24, None, 0, None))
    assert ahead.local_bytes(step.fixed["teacher"]) == ahead.local_bytes(step.params) > 0


def call(monkeypatch, tmp_path, *argv):
    """(status, figures) of the command line on this process's eight devices."""
    forget_flags()
    from absl import flags

    from aligner.commandline import parse

    for name in ("topology", "slices", "json", "tokens", "scored", "images", "examples", "search"):
        flags.FLAGS[name].unparse()
    monkeypatch.setattr(sys, "argv", ["plan", *argv, f"--json={tmp_path / 'plan.json'}"])  # where the config's own flags are read
    monkeypatch.chdir(ROOT)
    parse(sys.argv)
    monkeypatch.setattr(plan, "devices_of", lambda topology, slices: (jax.devices(), "small", False))
    status = plan.main([])
    return status, json.loads((tmp_path / "plan.json").read_text())


def test_the_first_that_fits_is_taken(monkeypatch, capsys):
    """Settings are tried in their order, and none after the first that fits."""
    tried = []

    def figures(config, devices, **row):
        tried.append((config.train.remat, config.train.accumulate))
        return {"too_large": False, "total_bytes": 10 if config.train.accumulate < 4 else 5}

    monkeypatch.setattr(plan, "plan", figures)
    config = tiny.config(data__batch_size=32)
    settings, found = plan.find_remedy(config, {"resident_bytes": 4}, 6, jax.devices())
    assert tried == [("dots", 1), ("context", 1), ("full", 1), ("full", 2), ("full", 4)]
    assert settings == "--config.train.remat=full --config.train.accumulate=4" and found["total_bytes"] == 5
    assert plan.find_remedy(config, {"resident_bytes": 4}, 4, jax.devices()) is None
    assert capsys.readouterr().out.count("trying --config.") >= 10


@pytest.mark.slow
def test_what_fits_after_a_change_is_found_by_compiling(checkpoint, monkeypatch, tmp_path, capsys):
    arguments = ["--config=configs/dpo_llama3.py", f"--config.model.path={checkpoint}", "--config.train.remat=none", "--tokens=16", "--config.data.batch_size=16"]
    status, whole = call(monkeypatch, tmp_path, *arguments)
    assert status == 0 and whole["fits"] and whole["limit_bytes"] is None and whole["devices"] == 8
    assert set(whole["collectives"]) and whole["flops"] > 0
    monkeypatch.setitem(plan.MEMORY, "small", (whole["resident_bytes"] + whole["gradient_bytes"]) / 2 / plan.GIB)
    status, found = call(monkeypatch, tmp_path, *arguments)
    assert status == 0 and not found["fits"]
    assert "mesh.fsdp" in found["remedy"]["settings"] and found["remedy"]["total_bytes"] <= found["limit_bytes"] < whole["total_bytes"]
    told = capsys.readouterr().out
    assert "DOES NOT FIT" in told and f"IT FITS WITH {found['remedy']['settings']}" in told
    monkeypatch.setitem(plan.MEMORY, "small", 1e-6)
    assert call(monkeypatch, tmp_path, *arguments, "--nosearch")[0] == 1


@pytest.mark.parametrize("topology,message", [("cpu:x", "a number of devices"), ("cuda:h300:8", "chip 'h300' is not known"), ("v9:2x2", "'v9' is not known"),
    ("cpu:h200:4", "a number of devices"), ("v5e", "such as v5e:4x8"), ("v5p:64", "such as v5e:4x8"), ("cuda:v5e:2", "chip 'v5e' is not known"), ("h200:8", "write cuda:h200:8")])  # fmt: skip
def test_unknown_topologies(topology, message):
    with pytest.raises(UserError, match=message):
        plan.devices_of(topology)


def test_a_machine_of_one_tpu(monkeypatch):
    """The compiler takes a host for four chips where nothing is said."""
    asked = []
    monkeypatch.setattr(os, "environ", dict(os.environ))  # where what it is told must not stay
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: asked.append(options) or types.SimpleNamespace(devices=["chip"]))
    assert plan.devices_of("v5e:1x1") == plan.devices_of("v5e:2x2") == (["chip"], "v5e", False)
    assert asked[0]["chips_per_host_bounds"] == [1, 1, 1] and "chips_per_host_bounds" not in asked[1]


def test_only_tpus_have_slices():
    with pytest.raises(UserError, match="--slices 2: only TPUs have slices"):
        plan.devices_of("cuda:h200:8", slices=2)


def test_rows_that_cannot_be_are_refused(family):
    """Before anything is compiled for them."""
    sizes = lambda tokens, scored=None, images=1: ahead.row_of(tiny.config(), family.model, tokens, scored, images, None)
    with pytest.raises(UserError, match="a row of 24 columns has no 25 scored positions"):
        sizes(24, scored=25)
    if family.model.media is None:
        assert sizes(24).images == 0
        return
    features = family.model.media.features
    assert sizes(2 * features, images=2).images == 2 and sizes(1, images=0).images == 0
    with pytest.raises(UserError, match=f"no room for {3 * features} tokens of images; give --tokens={6 * features}"):
        sizes(2 * features, images=3)


def test_memory_that_the_compiler_refuses(llama, monkeypatch):
    _, _, step = step_of(llama, devices=1)

    class Refuses:
        def lower(self, *arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.50G of 15.75G hbm. Exceeded")

        def trace(self, *arguments):
            return step.program.trace(*arguments)

    found = ahead.figures(step._replace(program=Refuses()))
    assert found["too_large"] and found["total_bytes"] == int(31.5 * 2**30) and found["chip_bytes"] == int(15.75 * 2**30)
    assert not plan.fits(found, None)
    beside = {"writer": step.params}  # of which the compiler does not know
    found = ahead.figures(step._replace(program=Refuses(), beside=beside))
    assert found["total_bytes"] - int(31.5 * 2**30) == ahead.local_bytes(beside) > 0
