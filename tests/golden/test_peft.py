"""Adapters against `peft`: the same logits both ways, for LoRA, rsLoRA and DoRA, on Llama and LLaVA."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aligner
from aligner import convert, lora
from aligner.convert import peft as ours
from aligner.trees import flatten, unflatten
from aligner.types import UserError
from configs import common
from tests.everyday import everyday
from tests.golden import checkpoints
from tests.torch_required import torch


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": checkpoints.save_llama(root / "llama", attention_bias=True),
        "llava": checkpoints.save_llava(root / "llava"),
    }


def inputs_of(model):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 70, (2, 14))
    if model.media is None:
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ids[:, 2 : 2 + model.media.features] = model.media.placeholder
    pixels = rng.standard_normal((2, 3, model.media.height, model.media.width)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}


def our_logits(model, params, inputs):
    """`model.logits`, compiled."""
    batch = model.inputs(inputs)
    compiled = dataclasses.replace(model, inputs=lambda batch: batch)
    return np.asarray(jax.jit(compiled.logits)(params, batch))


def their_logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()


def lora_config(**settings):
    config = common.base()
    config.lora.update({"rank": 3, "alpha": 5.0, **settings})
    return config


def attached(folder, config, seed=1):
    """(model, adapters, the tree with its adapters), every trained leaf disturbed so that each one shows."""
    model, params = aligner.load(folder)
    adapters, start = ours.plan(config, model, params)
    params = lora.attach(params, adapters, start, key=jax.random.key(0), dtype="float32")
    if not start:
        trainable, base = lora.split(params, adapters=adapters)
        rng = np.random.default_rng(seed)
        trainable = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), trainable)
        params = lora.combine(trainable, base)
    return model, adapters, params


def assert_close(found, expected):
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


CASES = {
    "lora": ("llama", {}),
    "rslora": ("llama", dict(variant="rslora", targets=(".*(q|v)_proj",))),
    "dora": ("llama", dict(variant="dora", modules_to_save=("lm_head/.*", "model/norm/.*"))),
    "one_layer": ("llama", dict(variant="dora", layers_to_transform=(1,))),
    "llava": ("llava", {}),
    "llava_all": ("llava", dict(targets=("all-linear",), variant="dora")),
    "llava_projector": ("llava", dict(targets=(".*language_model.*q_proj",), modules_to_save=("multi_modal_projector/.*",))),
}


@pytest.mark.parametrize("case", everyday(CASES, "lora"))
def test_ours_in_peft(bases, tmp_path, case):
    from peft import PeftModel

    family, settings = CASES[case]
    model, adapters, params = attached(bases[family], lora_config(**settings))
    inputs = inputs_of(model)
    found = our_logits(model, params, inputs)
    plain = checkpoints.load_hf(bases[family])
    assert np.abs(found - their_logits(plain, inputs)).max() > 1e-2, "the adapter must show"

    trainable, _ = lora.split(params, adapters=adapters)
    ours.write(tmp_path / "adapter", model, adapters, trainable, str(bases[family]))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    names = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(names) == sum(np.count_nonzero(scale) for scale in adapters.scale.values())
    assert_close(found, their_logits(theirs, inputs))

    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(convert.abstract_params(model))
    assert_close(our_logits(model, merged, inputs), found)

    again, weights = ours.read(tmp_path / "adapter", model, convert.abstract_params(model))
    assert again.rank.keys() == adapters.rank.keys() and set(again.saved) == set(adapters.saved)
    kept = flatten(trainable)
    assert weights.keys() == kept.keys()
    for path, leaf in weights.items():
        module = path.rpartition("/")[0]
        used = np.asarray(adapters.scale.get(module, 1)) != 0  # a layer without an adapter is not written
        np.testing.assert_array_equal(leaf[used], np.asarray(kept[path])[used])
    for module, scale in again.scale.items():
        np.testing.assert_allclose(scale, adapters.scale[module], rtol=1e-12)


PATTERNS = dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 9})


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,settings",
    [
        ("llama", dict(target_modules="all-linear", use_dora=True)),
        ("llama", dict(target_modules=["q_proj", "down_proj"], use_rslora=True, modules_to_save=["lm_head"])),
        ("llama", dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], **PATTERNS)),
        ("llava", dict(target_modules="all-linear")),
        ("llava", dict(target_modules=r".*language_model.*(q|o)_proj", modules_to_save=["multi_modal_projector"])),
    ],
    ids=["dora", "rslora_head", "patterns", "llava", "llava_projector"],
)
def test_theirs_here(bases, tmp_path, family, settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(checkpoints.load_hf(bases[family]), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    variant = "dora" if settings.get("use_dora") else "rslora" if settings.get("use_rslora") else "lora"
    model, adapters, params = attached(bases[family], lora_config(rank=4, alpha=6.0, variant=variant, adapter=str(tmp_path)))
    inputs = inputs_of(model)
    expected = their_logits(theirs, inputs)
    assert_close(our_logits(model, params, inputs), expected)
    assert_close(our_logits(model, lora.merge(params), inputs), expected)
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    ranks_differ = "rank_pattern" in settings
    assert ranks_differ or trained == sum(leaf.size for leaf in jax.tree.leaves(lora.split(params, adapters=adapters)[0]))


FUSED = {"gpt2": ("dora", "model/layers/.*"), "gpt_neox": ("rslora", "model/layers/.*"), "bloom": ("dora", "model/layers/.*"),
         "phi3": ("lora", ".*(q|v|gate)_proj")}  # fmt: skip


@pytest.mark.parametrize("family", everyday(FUSED, "gpt2"))
def test_maps_that_are_one_there_and_several_here(tmp_path, family):
    """Theirs here: one of many heads could not be read, nor one that lies the other way round. Ours there: each part has a rank of its own."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from tests.golden.test_text_families import load_torch, save_checkpoint
    from tests.models.text_configs import CASES as CONFIGS

    base = save_checkpoint(tmp_path / "base", family, **CONFIGS[family][0])
    plain = lambda: load_torch(base, torch.float32)
    ids = np.random.default_rng(0).integers(5, 60, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    variant, targets = FUSED[family]
    flags = dict(use_dora=variant == "dora", use_rslora=variant == "rslora")
    theirs = get_peft_model(plain(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **flags))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.from_numpy(rng.standard_normal(parameter.shape)).float()
    theirs.save_pretrained(tmp_path / "theirs")
    model, _, params = attached(base, lora_config(rank=4, alpha=6.0, variant=variant, adapter=str(tmp_path / "theirs")))
    assert_close(our_logits(model, params, inputs), their_logits(theirs, inputs))

    model, adapters, params = attached(base, lora_config(variant=variant, targets=(targets,)))
    ours.write(tmp_path / "ours", model, adapters, lora.split(params, adapters=adapters)[0], str(base))
    for one in ("theirs", "ours"):  # PEFT puts it right, and warns
        assert json.loads((tmp_path / one / "adapter_config.json").read_text())["fan_in_fan_out"] == (family == "gpt2")
    expected = our_logits(model, params, inputs)
    assert_close(expected, their_logits(PeftModel.from_pretrained(plain(), tmp_path / "ours"), inputs))
    adapters, weights = ours.read(tmp_path / "ours", model, convert.abstract_params(model))
    again = lora.attach(aligner.load(base)[1], adapters, weights, key=jax.random.key(0), dtype="float32")
    assert_close(our_logits(model, again, inputs), expected)


def test_an_embedding_that_trained_apart_from_its_tied_head(tmp_path):
    """In PEFT the head stays as it was; here both moved, and nothing was said. Where PEFT trained both as one, both are."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = checkpoints.save_llama(tmp_path / "base", tie_word_embeddings=True)
    for tied in (False, True):
        settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=tied)
        theirs = get_peft_model(checkpoints.load_hf(base), settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape)
        theirs.save_pretrained(tmp_path / "adapter")
        config = lora_config(rank=4, alpha=6.0, adapter=str(tmp_path / "adapter"))
        if not tied:
            with pytest.raises(UserError, match=r"embed_tokens\.weight trained apart from what it is tied to"):
                attached(base, config)
            continue
        model, adapters, params = attached(base, config)
        assert adapters.saved == ("model/embed_tokens/embedding",)
        expected = their_logits(theirs, inputs_of(model))
        assert_close(our_logits(model, params, inputs_of(model)), expected)
        ours.write(tmp_path / "ours", model, adapters, lora.split(params, adapters=adapters)[0])
        again = PeftModel.from_pretrained(checkpoints.load_hf(base), tmp_path / "ours")
        assert_close(their_logits(again, inputs_of(model)), expected)


def test_a_map_that_is_called_by_a_number_is_named_in_full(tmp_path):
    """Qwen2-VL's merger ends in mlp.0 and mlp.2: PEFT took "0" for the first block of the tower too, and refused the adapter."""
    from aligner.models import from_hf
    from tests.models import vision_configs

    model = from_hf(vision_configs.hf_config("qwen2_vl", vision_configs.CASES["qwen2_vl"][0]))
    abstract = convert.abstract_params(model)
    adapters = lora.plan(lora_config(targets=("visual/.*",)), model, abstract)
    kernels = {module: flatten(abstract)[f"{module}/kernel"] for module in adapters.rank}
    ours.write(tmp_path / "adapter", model, adapters, unflatten(lora.new_leaves(adapters, kernels, jax.random.key(0), "float32")))
    named = json.loads((tmp_path / "adapter" / ours.CONFIG).read_text())["target_modules"]
    assert "model.visual.merger.mlp.0" in named and not any(name.isdigit() for name in named)


@pytest.mark.slow
def test_gradients_of_dora_and_lora(bases, tmp_path):
    """The gradient by each adapter leaf, DoRA's lengths held constant."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True)
    theirs = get_peft_model(checkpoints.load_hf(bases["llama"]), settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    model, adapters, params = attached(bases["llama"], lora_config(rank=4, alpha=6.0, variant="dora", adapter=str(tmp_path)))
    inputs = inputs_of(model)
    weights = np.random.default_rng(1).standard_normal((2, 14, 72)).astype(np.float32)
    logits = theirs(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
    (logits * torch.from_numpy(weights)).sum().backward()
    trainable, base = lora.split(params, adapters=adapters)
    gradients = jax.grad(lambda t: jnp.sum(model.logits(lora.combine(t, base), inputs) * weights))(trainable)
    layers = gradients["model"]["layers"]
    for i in range(2):
        for group, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
            module = theirs.get_submodule(f"base_model.model.model.layers.{i}.{group}.{name}")
            found = layers[group][name]
            pairs = [(found["lora_a"][i].T, module.lora_A.default.weight), (found["lora_b"][i].T, module.lora_B.default.weight)]
            pairs.append((found["magnitude"][i], module.lora_magnitude_vector.default.weight))
            for ours_, parameter in pairs:
                expected = parameter.grad.numpy()
                assert np.abs(np.asarray(ours_) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_adapters_that_do_not_fit(bases, tmp_path):
    from safetensors.numpy import load_file, save_file

    model, adapters, params = attached(bases["llama"], lora_config())
    folder = tmp_path / "adapter"
    ours.write(folder, model, adapters, lora.split(params, adapters=adapters)[0])
    abstract = convert.abstract_params(model)
    llava = convert.open_model(bases["llava"])[0]
    with pytest.raises(UserError, match=r"does not fit its base, a llava model: base_model\.model\.model\.layers\.0.*no linear map"):
        ours.read(folder, llava, convert.abstract_params(llava))
    wider = checkpoints.save_llama(tmp_path / "wide", hidden_size=24)
    wide = convert.open_model(wider)[0]
    with pytest.raises(UserError, match=r"does not fit its base.*where \[.*24.* needed|begin its shape"):
        ours.read(folder, wide, convert.abstract_params(wide))
    for key, value, words in (("rank", 8, "has rank 3"), ("alpha", 1.0, "has alpha 5"), ("variant", "dora", "has variant lora, not dora")):
        with pytest.raises(UserError, match=words):
            ours.plan(lora_config(**{"adapter": str(folder), key: value}), model, abstract)
    with pytest.raises(UserError, match="leave one of them out"):
        ours.plan(lora_config(adapter=str(folder), targets=(".*q_proj",)), model, abstract)
    with pytest.raises(UserError, match="no adapter folder"):
        ours.plan(lora_config(adapter=str(tmp_path / "absent")), model, abstract)
    with pytest.raises(UserError, match="exists and is no former adapter"):
        ours.write(bases["llama"], model, adapters, lora.split(params, adapters=adapters)[0])

    settings = json.loads((folder / ours.CONFIG).read_text())
    for changed, words in ((dict(peft_type="IA3"), "IA3"), (dict(bias="all"), "bias"), (dict(lora_bias=True), "lora_bias"),
                           (dict(init_lora_weights="pissa"), "pissa"), (dict(r=0), "r to 0, .* numbers above 0"),
                           (dict(r=None), "r to None"), (dict(lora_alpha="8"), "lora_alpha to '8'"),
                           (dict(alpha_pattern=["q_proj"]), r"alpha_pattern to \['q_proj'\]"),
                           (dict(alpha_pattern={"q_proj(": 4}), "for regular expressions")):  # fmt: skip
        (folder / ours.CONFIG).write_text(json.dumps({**settings, **changed}))
        with pytest.raises(UserError, match=words):
            ours.read(folder, model, abstract)
    for broken in (b"[1]", b"{", b"\xff\xfe{"):
        (folder / ours.CONFIG).write_bytes(broken)
        with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
            ours.read(folder, model, abstract)
    (folder / ours.CONFIG).write_text(json.dumps(settings))
    tensors = load_file(folder / ours.WEIGHTS)
    for name in ("lm_head.base_layer.weight", "lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A"):  # all that PEFT writes of such
        save_file(tensors | {ours.PREFIX + name: np.zeros((3, 4), np.float32)}, folder / ours.WEIGHTS)
        with pytest.raises(UserError, match=f"{name} is of an adapter on a head or an embedding, .*; merge it with PEFT"):
            ours.read(folder, model, abstract)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, folder / ours.WEIGHTS)
    with pytest.raises(UserError, match="not all of lora_a, lora_b"):
        ours.read(folder, model, abstract)
    (folder / ours.WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        ours.read(folder, model, abstract)
