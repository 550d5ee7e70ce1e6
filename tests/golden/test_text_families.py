"""Every text family against PyTorch through saved folders: logits, gradients, checkpoints byte for byte. One entry of CASES a config.

Every day the first config of a family is run in float32; the rest, float64 and gradients are slow tests.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aligner
from aligner.convert.hf import canonical_name
from aligner.convert.verify import verify
from aligner.logprobs import dense_logits
from aligner.models import families
from aligner.models.moe import balance_loss
from tests.everyday import everyday
from tests.golden.checkpoints import perturb
from tests.golden.compare import by_name
from tests.models import tiny
from tests.models.text_configs import CASES, DYNAMIC, FIRST, LENGTH, LINEAR, LLAMA3, YARN, T, hf_config, longrope
from tests.torch_required import torch

ALL = [pytest.param(family, n, id=f"{family}-{n}") for family, configs in CASES.items() for n in range(len(configs))]


# ---- what is compared


def save_checkpoint(folder, family: str, **overrides):
    """Write a seeded model with every weight perturbed to `folder`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    perturb(AutoModelForCausalLM.from_config(hf_config(family, **overrides))).save_pretrained(folder)
    return folder


def load_torch(folder, dtype):
    from transformers import AutoModelForCausalLM

    plain = dict(attn_implementation="eager", experts_implementation="eager")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **plain)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Rows:
    """A full row, one padded on the left, one on the right, and two texts packed into a fourth."""

    tokens: np.ndarray  # [3, T]
    mask: np.ndarray
    packed: tuple[np.ndarray, np.ndarray]

    def batch(self, model, alone: bool):
        """Ours: all four rows. Positions as `transformers` counts them, or without the padding where they run alone in `theirs`."""
        inputs = dict(input_ids=self.tokens, attention_mask=self.mask)
        if alone:
            inputs["position_ids"] = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)
        fourth = dict(
            tokens=np.concatenate(self.packed),
            positions=np.concatenate([np.arange(len(text)) for text in self.packed]),
            segment_ids=np.repeat([1, 2], [len(text) for text in self.packed]),
            role=np.zeros(self.tokens.shape[1]),
        )
        return {name: jnp.concatenate([rows, jnp.asarray(fourth[name], rows.dtype)[None]]) for name, rows in model.inputs(inputs).items()}

    def theirs(self, model, alone: bool) -> torch.Tensor:
        """Theirs at the real positions of the four rows, one after another: [N, V]. The packed texts always run alone."""
        run = lambda tokens, **rest: model(input_ids=torch.tensor(tokens), use_cache=False, **rest).logits
        one = lambda tokens: run(tokens[None])[0]
        real = self.mask.astype(bool)
        if alone:  # the shortest first: with some rope types a longer text changes what follows it
            texts = [self.tokens[i][real[i]] for i in range(3)] + list(self.packed)
            found = {i: one(texts[i]) for i in sorted(range(5), key=lambda i: len(texts[i]))}
            return torch.cat([found[i] for i in range(5)])
        padded = run(self.tokens, attention_mask=torch.tensor(self.mask))
        return torch.cat([padded[torch.tensor(real)], *map(one, self.packed)])

    def ours(self, logits):
        """The same of ours, [4, T, V] -> [N, V]."""
        return jnp.concatenate([logits[:3][self.mask.astype(bool)], logits[3]])


@functools.cache
def rows(vocab_size: int) -> Rows:
    draw = np.random.default_rng(0).integers(3, vocab_size, size=(4, LENGTH))
    mask = np.ones((3, LENGTH), np.int64)
    mask[1, :5] = 0
    mask[2, 9:] = 0
    return Rows(draw[:3] * mask, mask, (draw[3, :7], draw[3, 7:]))


def must_run_alone(config, dtype: str) -> bool:
    """Whether padding changes what `transformers` says: where lengths matter, and in float64, whose mask is -inf in float32."""
    return dtype == "float64" or any((kind or {}).get("rope_type") in ("dynamic", "longrope") for kind in config.rope)


def logits_of(model, params, batch):
    return dense_logits(model.apply(params, batch).hidden, model.head(params))


def check_logits(folder, dtype: str, bar: float):
    model, params = aligner.load(folder, dtype=dtype)
    data = rows(model.config.vocab_size)
    alone = must_run_alone(model.config, dtype)
    with torch.no_grad():
        theirs = data.theirs(load_torch(folder, getattr(torch, dtype)), alone).numpy()
    ours = np.asarray(data.ours(tiny.quick(functools.partial(logits_of, model))(params, data.batch(model, alone))))
    assert ours.dtype == theirs.dtype == dtype
    assert np.abs(ours - theirs).max() <= bar * max(1, np.abs(theirs).max())


# ---- the tests


@pytest.mark.parametrize("family", CASES)
def test_float32_logits_and_bytes(family, tmp_path):
    save_checkpoint(tmp_path, family, **FIRST[family])
    check_logits(tmp_path, "float32", 1e-4)
    assert verify(tmp_path).different == ()


def test_every_text_family_has_three_odd_configs():
    assert CASES.keys() | {"baichuan"} == families.FAMILIES.keys()
    assert all(len(configs) >= 3 for configs in CASES.values())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "n"), ALL)
def test_logits_and_round_trip(family, n, tmp_path):
    folder, copy = save_checkpoint(tmp_path / "hf", family, **CASES[family][n]), tmp_path / "copy"
    check_logits(folder, "float32", 1e-4)
    with jax.enable_x64(True):
        check_logits(folder, "float64", 1e-5)
    aligner.save(*aligner.load(folder, dtype=None), copy)
    before, after = (load_torch(where, torch.float32).state_dict() for where in (folder, copy))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_gradients(family, tmp_path):
    """Of a random linear function of all logits, by every tensor that has the same name in a checkpoint and in PyTorch's memory."""
    folder = save_checkpoint(tmp_path, family, **FIRST[family])
    theirs = load_torch(folder, torch.float64)
    with jax.enable_x64(True):
        model, params = aligner.load(folder, dtype="float64")
        data = rows(model.config.vocab_size)
        logits = data.theirs(theirs, alone=True)
        weight = np.random.default_rng(1).normal(size=logits.shape)
        (logits * torch.tensor(weight)).sum().backward()
        loss = lambda params, batch: jnp.sum(data.ours(logits_of(model, params, batch)) * weight)
        grads = tiny.quick(jax.grad(loss))(params, data.batch(model, alone=True))
        grads = by_name(model, grads)
    expected = {canonical_name(model.conversion, name): p.grad.numpy() for name, p in theirs.named_parameters()}
    shared = grads.keys() & expected.keys()
    assert len(shared) >= 3
    noise = 1e-6 * max(np.abs(grads[name]).max() for name in shared)  # a key's bias has none, but torch takes softmax in float32
    for name in shared:
        assert np.abs(grads[name] - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max() + noise, name


def test_load_balance_loss(tmp_path):
    """Of all real tokens and all layers together."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    save_checkpoint(tmp_path, "mixtral", **FIRST["mixtral"])
    model, params = aligner.load(tmp_path)
    data = rows(T["vocab_size"])
    inputs = dict(input_ids=data.tokens, attention_mask=data.mask)
    batch = model.inputs(inputs)
    ours = tiny.quick(lambda p, b: balance_loss(model.apply(p, b).aux, b, T["num_hidden_layers"]))(params, batch)
    c = model.config.experts
    with torch.no_grad():
        tensors = {name: torch.tensor(value) for name, value in inputs.items()}
        logits = load_torch(tmp_path, torch.float32)(**tensors, output_router_logits=True).router_logits
        expected = load_balancing_loss_func(logits, c.num_experts, c.per_token, tensors["attention_mask"])
    assert abs(float(ours) - float(expected)) <= 1e-5 * float(expected)


# Baichuan is code on the Hub; what stands in for it here is a Llama with the same numbers.
BAICHUAN = {
    "7b": dict(max_position_embeddings=64),
    "2_7b": dict(max_position_embeddings=64, model_max_length=64, z_loss_weight=0),
    "13b": dict(model_max_length=64),
    "2_13b": dict(model_max_length=64, z_loss_weight=0),
}


@pytest.mark.parametrize("name", everyday(BAICHUAN, "2_13b"))
def test_baichuan(name, tmp_path):
    from safetensors.torch import load_file, save_file

    from aligner.models.attention import alibi_slopes

    save_checkpoint(tmp_path, "llama", num_key_value_heads=4)
    theirs = load_torch(tmp_path, torch.float32)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(file)
    for layer in (f"model.layers.{i}.self_attn." for i in range(2)):
        tensors[layer + "W_pack.weight"] = torch.cat([tensors.pop(f"{layer}{which}_proj.weight") for which in "qkv"])
    save_file(tensors, file, metadata={"format": "pt"})
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "hidden_act",
              "initializer_range", "tie_word_embeddings")  # fmt: skip
    auto_map = {"AutoConfig": "configuration_baichuan.BaichuanConfig"}
    values = dict(model_type="baichuan", auto_map=auto_map, **{key: config[key] for key in shared}, **BAICHUAN[name])
    (tmp_path / "config.json").write_text(json.dumps(values))

    model, params = aligner.load(tmp_path)
    data = rows(T["vocab_size"])
    ours = data.ours(tiny.quick(functools.partial(logits_of, model))(params, data.batch(model, alone=True)))
    if "z_loss_weight" in values:
        theirs.lm_head.weight.data = torch.nn.functional.normalize(theirs.lm_head.weight.data)
    if "max_position_embeddings" not in values:  # no rotation, and a mask that falls off
        theirs.model.rotary_emb.forward = lambda x, position_ids: (torch.ones(*position_ids.shape, 4), torch.zeros(*position_ids.shape, 4))
        slopes, plain = torch.tensor(alibi_slopes(4)), theirs.forward

        def forward(input_ids, **rest):
            place = torch.arange(input_ids.shape[1], dtype=torch.float32)
            distance = place[:, None] - place
            mask = torch.where(distance < 0, torch.finfo(torch.float32).min, -slopes[:, None, None] * distance)
            return plain(input_ids=input_ids, attention_mask=mask[None], **rest)

        theirs.forward = forward
    with torch.no_grad():
        expected = data.theirs(theirs, alone=True).numpy()
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    assert verify(tmp_path).different == ()


# Fields as releases of `transformers` before 5 wrote them.
LEGACY = {
    "llama3": ("llama", dict(rope_parameters=LLAMA3),
               dict(rope_theta=5e3, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})),
    "yarn": ("qwen2", dict(rope_parameters=YARN),
             dict(rope_theta=1e4, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=5))),
    "linear": ("llama", dict(rope_parameters=LINEAR), dict(rope_scaling=dict(type="linear", factor=2.5))),
    "dynamic": ("llama", dict(rope_parameters=DYNAMIC), dict(rope_theta=1e4, rope_scaling=dict(type="dynamic", factor=2.0))),
    "theta": ("mistral", dict(rope_parameters=dict(rope_type="default", rope_theta=123.0)), dict(rope_theta=123.0)),
    "longrope": ("phi3", dict(original_max_position_embeddings=8, rope_parameters=longrope(4)),
                 dict(rope_theta=1e4, original_max_position_embeddings=8,
                      rope_scaling={**{k: v for k, v in longrope(4).items() if k.endswith("_factor")}, "type": "longrope"})),
    "partial": ("phi", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)),
                dict(rope_theta=1e4, partial_rotary_factor=0.25)),
    "local": ("gemma3_text", dict(sliding_window=3, rope_parameters={
                  "sliding_attention": dict(rope_type="default", rope_theta=50.0),
                  "full_attention": dict(rope_type="linear", rope_theta=1e5, factor=8.0)}),
              dict(rope_theta=1e5, rope_local_base_freq=50.0, rope_scaling=dict(rope_type="linear", factor=8.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGACY)
def test_earlier_rope_fields_say_the_same(name, tmp_path):
    """The same flags are the same computation; that they are read rightly the other tests show."""
    from aligner.convert import model_from_folder

    family, now, before = LEGACY[name]
    hf_config(family, **now).save_pretrained(tmp_path / "now")
    values = json.loads((tmp_path / "now" / "config.json").read_text())
    del values["rope_parameters"], values["transformers_version"]
    values = {key: value for key, value in values.items() if key != "partial_rotary_factor"} | before
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "config.json").write_text(json.dumps(values))
    assert same_rope(model_from_folder(tmp_path / "before").config, model_from_folder(tmp_path / "now").config)


def same_rope(one, other) -> bool:
    """Equal but for how a rope parameter is spelled: the frequencies are compared by value."""
    from aligner.models import rope

    positions, segments = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
    width = int(one.head_dim * one.rotary_fraction)
    for ours, theirs in zip(one.rope, other.rope, strict=True):
        found = [rope.tables(kind, width, one.max_position_embeddings, positions, segments, jnp.float32) for kind in (ours, theirs)]
        if not all(np.array_equal(a, b) for a, b in zip(*found)):
            return False
    return dataclasses.replace(one, rope=()) == dataclasses.replace(other, rope=())
