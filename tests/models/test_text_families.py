"""Text families without PyTorch: what of a config is read, one DPO step on one and on eight devices, export, programs that do not grow."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aligner
from aligner import algorithms, sharding
from aligner.convert import model_from_folder
from aligner.convert.tables import by_tensor, read_leaf, table, write_tensor
from aligner.models import SUPPORTED, families, from_hf, moe
from aligner.run import check_shared_prompts
from aligner.trees import flatten
from aligner.types import UserError
from tests.invariance import step
from tests.models import tiny
from tests.models.text_configs import CASES, FIRST, hf_config

FAMILIES = list(CASES)


LONG = {"gpt2": dict(n_positions=64), "opt": dict(max_position_embeddings=64)}  # beyond their tables of positions lies NaN


def make_family(family: str, pairs: int = 8, **overrides) -> tiny.Family:
    """The family's first config with perturbed parameters, and pairs to train it on."""
    model = from_hf(hf_config(family, **{**FIRST[family], **LONG.get(family, {}), **overrides}))
    rng = np.random.default_rng(1)
    reference = rng.normal(-20, 5, (pairs, 2)).astype(np.float32)
    return tiny.Family(model, tiny.perturbed(model), tiny.make_pairs(model, pairs, rng), reference)


# ---- configs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_config_is_read_or_known_to_change_nothing(family):
    hf = hf_config(family, **FIRST[family])
    recorded = families.Recorded(hf)
    families._READERS[family](recorded)
    refused = {field.name for field in dataclasses.fields(hf)} - recorded.read - families.UNREAD
    assert refused == {"is_encoder_decoder"}, "what else is refused where it is set"


REFUSED = {
    "act": ("llama", dict(hidden_act="mish"), "hidden_act 'mish'"),
    "rope": ("llama", dict(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}), "rope_type 'proportional'"),
    "scale": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    "cross": ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    "affine": ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine=False"),
    "residual": ("bloom", dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm=True"),
    "sparse": ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    "dense": ("qwen2_moe", dict(mlp_only_layers=[0]), r"mlp_only_layers=\[0\]"),
    "jitter": ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
    "encoder": ("llama", dict(is_encoder_decoder=True), "is_encoder_decoder=True"),
    "both_ways": ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "layer": ("qwen2", dict(layer_types=["full_attention"] * 2 + ["linear_attention"]), "'linear_attention'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name):
    family, overrides, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        from_hf(hf_config(family, **{**FIRST[family], **overrides}))


def test_a_field_that_only_another_release_knows_is_refused():
    @dataclasses.dataclass
    class Newer:
        model_type = "llama"
        attribute_map = {}  # noqa: RUF012
        attention_twist: float = 0.0

    class Older:
        pass

    reader = lambda hf: None
    families.read(reader, Newer())
    with pytest.raises(UserError, match=r"attention_twist=0.5"):
        families.read(reader, Newer(attention_twist=0.5))


# ---- the whole way: import, a DPO step, export


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_import_a_dpo_step_on_eight_devices_and_export(family, tmp_path):
    """Eight devices, tensor 2 x fsdp 4, give what one gives."""
    hf_config(family, **FIRST[family] | LONG.get(family, {})).save_pretrained(tmp_path / "config")
    model = model_from_folder(tmp_path / "config")
    aligner.save(model, tiny.perturbed(model), tmp_path / "hf")
    model, params = aligner.load(tmp_path / "hf")
    f = make_family(family)._replace(model=model, params=jax.tree.map(np.asarray, params))
    config = tiny.config()
    one = step.loss_and_gradients(f, tiny.make_batch(f), config, step.one_device())
    eight = step.loss_and_gradients(f, tiny.make_batch(f), config, sharding.make_mesh({"tensor": 2, "fsdp": 4}))
    assert abs(one.metrics["loss"] - eight.metrics["loss"]) <= 1e-5 * abs(one.metrics["loss"])
    largest = max(np.abs(g).max() for g in one.gradients.values())
    for path, gradient in one.gradients.items():
        assert np.abs(gradient - eight.gradients[path]).max() <= 1e-5 * largest, path
    still = [path for path, g in one.gradients.items() if not np.abs(g).max() > 0]
    assert not still, "these leaves get no gradient"
    aligner.save(model, params, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "hf").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_gives_what_two_copies_give(family):
    turned_alike = {"original_max_position_embeddings": 64} if family == "phi3" else {}  # beyond it a text's length turns all of it
    f = make_family(family, pairs=3, **turned_alike)
    score = jax.jit(algorithms.make(tiny.config(), f.model).score, compiler_options={"xla_backend_optimization_level": 0})
    logps = [score(f.params, {}, tiny.as_arrays(tiny.make_batch(f, shared=shared)), None).logps for shared in (True, False)]
    np.testing.assert_allclose(*logps, rtol=1e-4, atol=1e-4)


def test_answers_do_not_share_a_prompt_that_one_of_them_would_turn_otherwise():
    phi3, llama = (from_hf(hf_config(family, **FIRST[family])) for family in ("phi3", "llama"))
    of = lambda *texts: SimpleNamespace(name="data.train", answers=2, texts=np.array(texts))
    for shared, model, dataset in [(True, phi3, of((3, 8), (9, 20))), (False, phi3, of((3, 9))), (True, llama, of((3, 900)))]:
        check_shared_prompts(tiny.config(data__shared_prompt=shared), model, dataset)
    with pytest.raises(UserError, match="beyond 8 tokens this phi3"):
        check_shared_prompts(tiny.config(data__shared_prompt=True), phi3, of((3, 8), (7, 9)))


def test_the_readme_lists_the_families():
    rows = re.findall(r"^\| .*?\| (`.*?`) \|", Path("README.md").read_text(), flags=re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(SUPPORTED) <= listed


# ---- layouts on disk


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mixtral"])
def test_parts_of_a_leaf_are_read_alone(family):
    """A slice over layers, experts, inputs and outputs, as a device of a mesh asks for it."""
    model = from_hf(hf_config(family, **FIRST[family]))
    params = {path: np.asarray(leaf) for path, leaf in flatten(tiny.perturbed(model)).items()}
    entries = table(model.conversion, jax.eval_shape(model.init, jax.random.key(0)))
    disk = {name: write_tensor(parts, lambda path, index: params[path][index]) for name, parts in by_tensor(entries).items()}
    for entry in entries:
        index = tuple(slice(n // 3, n - n // 4) for n in entry.shape)
        found = read_leaf(entry, index, lambda name, part: disk[name][part], np.float32)
        assert np.array_equal(found, params[entry.path][index]), entry.path


def test_heads_of_a_fused_projection_lie_one_after_another():
    """GPT-NeoX: query, key and value of the first head, then of the second."""
    model = from_hf(hf_config("gpt_neox", **FIRST["gpt_neox"]))
    params = {path: np.asarray(leaf) for path, leaf in flatten(tiny.perturbed(model)).items()}
    entries = table(model.conversion, jax.eval_shape(model.init, jax.random.key(0)))
    disk = {name: write_tensor(parts, lambda path, index: params[path][index]) for name, parts in by_tensor(entries).items()}
    c = model.config
    fused = disk["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(c.num_attention_heads, 3, c.head_dim, c.hidden_size)
    for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
        ours = params[f"model/layers/self_attn/{name}/kernel"][1]
        assert np.array_equal(fused[2, place], ours.T.reshape(c.num_attention_heads, c.head_dim, c.hidden_size)[2])


# ---- mixture of experts


def test_grouped_experts_are_the_sum_over_all_of_them():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, gate, up, down = draw(2, 7, 6), draw(5, 6, 4), draw(5, 6, 4), draw(5, 4, 6)
    chosen = jnp.asarray(np.stack([rng.permutation(4)[:2] for _ in range(14)]).reshape(2, 7, 2))  # the last expert gets nothing
    weights = draw(2, 7, 2)

    def dense(x, gate, up, down):
        every = jnp.einsum("btef,efd->bted", jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up), down)
        return jnp.sum(jnp.take_along_axis(every, chosen[..., None], axis=2) * weights[..., None], axis=2)

    grouped = lambda x, *kernels: moe.grouped_mlp("silu", x, weights, chosen, *kernels)
    by_all = lambda function: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=(0, 1, 2, 3)))(x, gate, up, down)
    np.testing.assert_allclose(grouped(x, gate, up, down), dense(x, gate, up, down), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(by_all(grouped), by_all(dense)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def balanced() -> tiny.Family:
    return make_family("mixtral", pairs=4, output_router_logits=True, router_aux_loss_coef=50.0)


def test_the_load_balance_loss_is_there_where_the_config_asks_for_router_logits():
    """As in transformers and TRL."""
    f = balanced()
    for model, asked in ((f.model, True), (make_family("mixtral").model, False)):
        algorithm = algorithms.make(tiny.config(), model)
        batch = tiny.as_arrays(tiny.make_batch(f))
        scores = jax.eval_shape(algorithm.score, f.params, {}, batch, None)
        terms, metrics, _ = jax.eval_shape(algorithm.objective, scores, batch, algorithm.carry)
        assert ("router" in terms, "aux_loss" in metrics, algorithm.whole_batch) == (asked, asked, asked)


@pytest.mark.slow
def test_the_load_balance_loss_does_not_depend_on_accumulation():
    f = balanced()
    batch = tiny.make_batch(f)
    whole = step.loss_and_gradients(f, batch, tiny.config(), step.one_device())
    parts = step.loss_and_gradients(f, batch, tiny.config(train__accumulate=2), step.one_device())
    assert whole.metrics["loss"] > 50, "an even load gives per_token = 2"
    assert np.abs(whole.gradients["model/layers/mlp/gate/kernel"]).max() > 1e-2
    for name in ("loss", "aux_loss"):
        np.testing.assert_allclose(whole.metrics[name], parts.metrics[name], rtol=1e-5)
    for path, gradient in whole.gradients.items():
        np.testing.assert_allclose(gradient, parts.gradients[path], atol=1e-4 * np.abs(gradient).max() + 1e-5, err_msg=path)


def test_adapters_on_experts_are_refused():
    f = make_family("mixtral")
    params = tiny.as_arrays(f.params)
    kernel = params["model"]["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    params["model"]["layers"]["mlp"]["experts"]["up_proj"]["lora_a"] = kernel[..., :2]
    batch = f.model.inputs({"input_ids": np.ones((1, 3), int)})
    with pytest.raises(UserError, match=r"adapters on the experts .*up_proj"):
        f.model.apply(params, batch)


# ---- depth


def test_the_program_does_not_grow_with_depth():
    """Layers that differ too: the program is one layer's, the difference is data."""
    kinds = lambda n: ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * (n // 4)
    lines = []
    for depth in (8, 32):
        model = from_hf(hf_config("gemma3_text", **{**FIRST["gemma3_text"], "num_hidden_layers": depth, "layer_types": kinds(depth)}))
        params = jax.eval_shape(model.init, jax.random.key(0))
        batch = model.inputs({"input_ids": np.ones((1, 4), int)})
        loss = lambda params, model=model, batch=batch: jnp.sum(model.apply(params, batch).hidden)
        lines.append(len(jax.jit(jax.grad(loss)).lower(params).as_text().splitlines()))
    assert lines[1] <= 1.05 * lines[0]


def test_old_names_of_gpt2_are_read(tmp_path):
    """The first checkpoints on the Hub lack the outermost module and carry the causal mask as a buffer."""
    from safetensors.numpy import load_file, save_file

    hf_config("gpt2", **FIRST["gpt2"]).save_pretrained(tmp_path / "config")
    model = model_from_folder(tmp_path / "config")
    aligner.save(model, tiny.perturbed(model), tmp_path / "new")
    tensors = {name.removeprefix("transformer."): array for name, array in load_file(tmp_path / "new" / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "config.json").write_text(json.dumps(model.assets.config_dict))
    (_, new), (_, old) = aligner.load(tmp_path / "new"), aligner.load(tmp_path / "old")
    assert jax.tree.all(jax.tree.map(np.array_equal, new, old))
