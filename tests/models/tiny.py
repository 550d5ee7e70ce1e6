"""Tiny models from transformers' configs alone, every parameter perturbed, and batches of random pairs with ragged lengths."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aligner.data.layout import empty_row, lay_out, pair_row
from aligner.data.templates import Encoded
from aligner.models import from_hf
from aligner.models.families import register_configs
from aligner.types import Model, Params
from configs import common

IMAGE = 60
# Every width divides by two, so that a 2x2x2 mesh lays everything out; biases, llama3 rope and grouped heads are on.
TEXT = dict(
    vocab_size=62, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, attention_bias=True, mlp_bias=True, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 16},
)  # fmt: skip
VISION = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4)

# XLA's CPU backend without what it does for speed: programs as small as these compile in a fraction of the time and run no slower.
# Every day all are compiled so (see tests/conftest.py), but what is compiled with FULL: where a test looks into a user's program or at its
# single roundings.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,  # else every program is cut into 32 parts, which pays for large ones
}  # fmt: skip
FULL: dict[str, Any] = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
if jax.__version_info__ < (0, 11):  # an option that later ones no longer have
    QUICK["xla_cpu_use_fusion_emitters"], FULL["xla_cpu_use_fusion_emitters"] = False, True


class Family(NamedTuple):
    """A model, its parameters (NumPy, float32), pairs as token ids, and their reference log-probabilities [n, 2]."""

    model: Model
    params: Params
    pairs: list[Encoded]
    reference: np.ndarray


def llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(**{**TEXT, **changes})


def llava_config(text: Any = None, vision: Any = None, **changes):
    from transformers import CLIPVisionConfig, LlavaConfig

    return LlavaConfig(
        text_config=llama_config(**(text or {})), vision_config=CLIPVisionConfig(**{**VISION, **(vision or {})}),
        image_token_index=IMAGE, **changes,
    )  # fmt: skip


def mmca_config():
    """LLaVA's as of a model put together from parts, in which text reads text and images by two softmaxes."""
    from transformers import CONFIG_MAPPING

    register_configs()
    said = {name: value for name, value in llava_config().to_dict().items() if name != "model_type"}
    return CONFIG_MAPPING["vision_llm"](**said, projector="mlp", mmca=True)


@functools.cache
def family(name: str, pairs: int = 8) -> Family:
    """ "llama", "llava" or "mmca"."""
    model = from_hf({"llama": llama_config, "llava": llava_config, "mmca": mmca_config}[name]())
    rng = np.random.default_rng(1)
    return Family(model, perturbed(model), make_pairs(model, pairs, rng), rng.normal(-20, 5, (pairs, 2)).astype(np.float32))


def perturbed(model: Model, scale: float = 0.3, seed: int = 0) -> Params:
    """Noise on every leaf: at initialisation norms are 1 and biases 0, so that errors in them pass unseen."""
    rng = np.random.default_rng(seed)
    start = lambda path: np.float32(path[-1].key == "scale")
    noise = lambda path, leaf: start(path) + scale * rng.standard_normal(leaf.shape, np.float32)
    return jax.tree_util.tree_map_with_path(noise, jax.eval_shape(model.init, jax.random.key(0)))


def make_pairs(model: Model, count: int, rng: np.random.Generator) -> list[Encoded]:
    """Ragged prompts and answers; with media the rows hold no, one or two images in turn."""
    made = []
    for number in range(count):
        prompt = rng.integers(3, 60, rng.integers(3, 10))
        images = number % 3 if model.media else 0
        for _ in range(images):
            place = rng.integers(1, len(prompt))
            prompt = np.insert(prompt, place, [IMAGE] * model.media.features)
        answers = tuple(rng.integers(3, 60, rng.integers(1, 9)).astype(np.int32) for _ in range(2))
        made.append(Encoded(prompt.astype(np.int32), answers, tuple(("image", f"{number}.{i}") for i in range(images))))
    return made


def pixels(name: str, model: Model) -> np.ndarray:
    """The picture that a reference of `make_pairs` stands for: the same in every layout."""
    seed = [int(part) for part in name.split(".")]
    return np.random.default_rng(seed).standard_normal((model.media.height, model.media.width, 3)).astype(np.float32)


def make_batch(
    f: Family, *, shared: bool = True, per_row: int = 1, more: tuple[int, int, int] = (0, 0, 0), empty_rows: int = 0, columns: bool = True
) -> dict[str, np.ndarray]:
    """A batch as the loader gives it.

    Args:
        f: what `family` made.
        shared: one copy of the prompt for both answers.
        per_row: examples packed into a row (G).
        more: by how much T, S and I exceed what is needed.
        empty_rows: rows without an example, mixed in.
        columns: add `reference_logps`.
    """
    groups = [range(i, i + per_row) for i in range(0, len(f.pairs), per_row)]
    rows = [[f.pairs[i] for i in group] for group in groups]
    need = lambda size: max(sum(size(pair) for pair in row) for row in rows)
    scored = lambda pair: sum(map(len, pair.answers))
    T = need(lambda pair: (1 if shared else 2) * len(pair.prompt) + scored(pair)) + more[0]
    S, I = need(scored) + more[1], need(lambda pair: len(pair.media)) + more[2]
    media = f.model.media
    made = []
    for group, row in zip(groups, rows):
        ids = [10 + i for i in group]
        one = pair_row(row[0], T, S, I, media, shared, ids[0]) if per_row == 1 else lay_out(row, ids, T, S, I, media, shared)
        for place, name in enumerate(name for pair in row for _, name in pair.media):
            one["pixel_values"][place] = pixels(name, f.model)
        if columns:
            one["reference_logps"] = f.reference[list(group)]
        made.append(one)
    for number in range(empty_rows):
        blank = empty_row(T, S, I, media, per_row)
        if columns:
            blank["reference_logps"] = np.zeros((per_row, 2), np.float32)
        made.insert(2 * number + 1, blank)
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def config(**changes):
    """configs/common.py's defaults with changes by dotted name (written with two underscores)."""
    made = common.base()
    made.model.dtype = "float32"
    for name, value in changes.items():
        section, _, key = name.partition("__")
        made[section][key] = value
    return made


def quick(function: Any, **options: Any) -> Any:
    """`function`, jitted in a hurry."""
    return jax.jit(function, compiler_options=QUICK, **options)


def as_arrays(tree: Any, dtype: Any = None) -> Any:
    """NumPy leaves on the device, floating ones in `dtype`."""
    cast = lambda x: jnp.asarray(x, dtype if dtype and np.issubdtype(x.dtype, np.floating) else None)
    return jax.tree.map(cast, tree)
