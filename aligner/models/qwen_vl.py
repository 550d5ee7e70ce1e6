"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (arXiv 2409.12191, 2502.13923): images and videos of all sizes as patches of a row, merged four to a
token; positions in time, rows and columns (M-RoPE).

2.5: most layers of the tower attend within windows; positions in time go by seconds. 3: learned positions interpolated to each image's
grid; features of earlier layers are added after the decoder's first ones (deepstack); the time of a video's frames is written before them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aligner.models import clips, decoder, families, towers, vision, vlm
from aligner.models.layers import ACTIVATIONS, Linear
from aligner.models.pictures import Clip, Picture, Shown, turned, turning_positions
from aligner.types import Batch, Media, Model, UserError

_MANY = 1 << 16  # more windows than an image has
_EDGES = (("min", "shortest_edge"), ("max", "longest_edge"))  # two names of an image's least and most pixels


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """What changes the computation; names are Hugging Face's."""

    text_config: decoder.DecoderConfig
    vision_config: vision.VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    spatial_merge_size: int
    tokens_per_second: float | None  # how far positions in time go on in a second of a video; None: one for each group of frames
    window: int  # side of the tower's windows in merged patches; 0 has none
    deepstack: tuple[int, ...]  # layers of the tower whose features are added later; () has none
    third: bool  # Qwen3-VL's layout of names


def config_from_hf(hf: Any) -> QwenVLConfig:
    """Read a Qwen-VL config."""
    tower, third = hf.vision_config, hf.model_type == "qwen3_vl"
    deepstack = tuple(getattr(tower, "deepstack_visual_indexes", ()))
    kind = hf.text_config.rope_parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(f"rope_type {kind!r} of the {hf.model_type} config is not implemented with positions in rows and columns")
    reader = (lambda text: families.common(text, qk_norm="head")) if third else families.qwen2
    return QwenVLConfig(
        text_config=vlm.read_text(hf, reader, deepstack=len(deepstack)),
        vision_config=towers.read(tower),
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        vision_start_token_id=hf.vision_start_token_id,
        vision_end_token_id=hf.vision_end_token_id,
        spatial_merge_size=tower.spatial_merge_size,
        tokens_per_second=getattr(tower, "tokens_per_second", None),
        window=tower.window_size // tower.spatial_merge_size // tower.patch_size if hasattr(tower, "window_size") else 0,
        deepstack=deepstack,
        third=third,
    )


class Merger(nn.Module):
    """Neighbouring patches joined into one feature; the norm is of each patch, or of what is joined."""

    config: QwenVLConfig
    norm_joined: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... M V"]) -> Float[Array, "... D"]:
        c, norm = self.config, vision.make_norm(self.config.vision_config, "norm")
        joined = (*x.shape[:-2], x.shape[-2] * x.shape[-1])
        x = norm(x.reshape(joined)) if self.norm_joined else norm(x).reshape(joined)
        x = ACTIVATIONS["gelu"](Linear(joined[-1], True, name="linear_fc1")(x))
        return Linear(c.text_config.hidden_size, True, name="linear_fc2")(x)


def encode(config: QwenVLConfig, params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
    """A feature for every merged patch; with deepstack those of the earlier layers beside it, [B, F, (1 + K) D]."""
    tree = params["visual"]
    layers = (-1, *(layer + 1 for layer in config.deepstack))
    with jax.named_scope("vision_tower"):
        states = vision.hidden_states(config.vision_config, tree, patches(config, batch, tree), layers, remat, rngs)
    units = [state.reshape(*batch["pixel_values"].shape[:3], -1) for state in states]
    features = [Merger(config).apply({"params": tree["merger"]}, units[0], rngs=rngs)]
    for number, unit in enumerate(units[1:]):
        merger = jax.tree.map(lambda leaf, number=number: leaf[number], tree["deepstack_merger_list"])
        own = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}  # all have the same path, and would drop the same
        features.append(Merger(config, norm_joined=True).apply({"params": merger}, unit, rngs=own))
    return jnp.concatenate(features, axis=-1)


def patches(config: QwenVLConfig, batch: Batch, tree) -> vision.Patches:
    """The units of a row as patches one after another."""
    flat = lambda name: batch[name].reshape(len(batch[name]), -1, *batch[name].shape[3:])
    ids, per_unit = batch["image_ids"], config.spatial_merge_size**2
    groups = [ids]
    if config.window:
        groups.append(jnp.where(ids > 0, ids * _MANY + batch["patch_window"], 0))
    interpolated = bool(config.vision_config.positions)
    return vision.Patches(
        flat("pixel_values").astype(tree["embeddings"]["patch_embedding"]["kernel"].dtype),
        tuple(jnp.repeat(group, per_unit, axis=1) for group in groups),
        flat("patch_grid"),
        flat("patch_places") if interpolated else None,
        flat("patch_weights") if interpolated else None,
    )


def media(config: QwenVLConfig) -> Media:
    """A slot is a unit of merged patches, and stands for one token."""
    tower, merge = config.vision_config, config.spatial_merge_size
    width = tower.frames * tower.num_channels * tower.patch_size**2

    def show(size: tuple[int, int], assets: Any, count: int) -> Shown:
        units = assets.processor.image_processor.get_number_of_image_patches(size[1], size[0]) // merge**2
        return Shown(units, (units,))

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        return [*of_kind(processed, "image", "pixel_values"), *of_kind(processed, "video", "pixel_values_videos")]

    def of_kind(processed: Mapping[str, Any], kind: str, values: str) -> Iterator[Picture]:
        if processed.get(values) is None:
            return
        grids = np.asarray(processed[f"{kind}_grid_thw"])
        parts = np.split(np.asarray(processed[values]), np.cumsum(grids.prod(axis=1))[:-1])
        steps = np.ones(len(grids))
        if kind == "video" and config.tokens_per_second is not None:
            steps = config.tokens_per_second * np.asarray(processed.get("second_per_grid_ts", steps))
        for part, grid, step in zip(parts, grids, steps):
            yield picture(kind, part, *map(int, grid), step)

    def picture(kind: str, values: np.ndarray, times: int, rows: int, columns: int, step: float) -> Picture:
        rows, columns = rows // merge, columns // merge
        unit = np.indices((rows, columns)).reshape(2, -1).T  # [n,2]
        inside = np.indices((merge, merge)).reshape(2, -1).T
        grid = unit[:, None] * merge + inside
        # the processor puts channels first, our kernel last
        values = values.reshape(-1, tower.num_channels, tower.frames, tower.patch_size**2).transpose(0, 2, 3, 1)
        arrays = {"patch_grid": grid}
        if config.window:
            across = -(-columns // config.window)
            arrays["patch_window"] = unit[:, 0] // config.window * across + unit[:, 1] // config.window
        if tower.positions:
            side = int(tower.num_positions**0.5)
            arrays["patch_places"], arrays["patch_weights"] = taps(grid, (rows * merge, columns * merge), side)
        arrays = {name: np.concatenate([array] * times) for name, array in arrays.items()}  # each group of frames is an image to the tower
        arrays["pixel_values"] = values.reshape(times * len(unit), merge**2, width)
        if config.third:  # each group of frames stands for itself in the text
            places = tuple(np.concatenate([part] * times) for part in turned(rows, columns))
        else:
            places = turned(rows, columns, (np.arange(times, dtype=np.float32) * np.float32(step)).astype(int))
        return Picture(arrays, np.arange(times * len(unit)), places, kind=kind, stills=times)

    slot = {"pixel_values": ((merge**2, width), np.float32), "patch_grid": ((merge**2, 2), np.int32), "image_ids": ((), np.int32)}
    if config.window:
        slot["patch_window"] = ((), np.int32)
    if tower.positions:
        slot |= {"patch_places": ((merge**2, 4), np.int32), "patch_weights": ((merge**2, 4), np.float32)}
    return Media(
        config.image_token_id, 1, tower.patch_size, tower.patch_size, slot=slot, per_token={"rope_positions": ((3,), np.int32)},
        show=show, pictures=pictures, arrange=turning_positions,
        video=config.video_token_id, show_clip=functools.partial(show_clip, config), process_clip=functools.partial(process_clip, config),
    )  # fmt: skip


def show_clip(config: QwenVLConfig, clip: Clip, assets: Any) -> Shown:
    """A group of frames after the other: 3 writes its time before each, the mean of its first and its last frame's."""
    tower = config.vision_config
    units = math.prod(clip_size(config, clip, assets.video_settings)) // (tower.patch_size * config.spatial_merge_size) ** 2
    times = np.append(clip.times, [clip.times[-1]] * (-len(clip.times) % tower.frames)).reshape(-1, tower.frames)
    if not config.third:
        return Shown(len(times) * units, (len(times) * units,), kind="video")
    ids = config.vision_start_token_id, config.video_token_id, config.vision_end_token_id
    group = "".join(map(assets.tokenizer.convert_ids_to_tokens, ids))
    text = "".join(f"<{(inside[0] + inside[-1]) / 2:.1f} seconds>{group}" for inside in times)
    return Shown(len(times) * units, (units,) * len(times), text, kind="video")


def process_clip(config: QwenVLConfig, clip: Clip, assets: Any) -> Mapping[str, Any]:
    """What Hugging Face's video processor returns."""
    tower, size = config.vision_config, clip_size(config, clip, assets.video_settings)
    pixels = clips.pixels(clip.frames, size, assets.video_settings)
    values = clips.patches(pixels, tower.patch_size, config.spatial_merge_size, tower.frames)
    grid = -(-len(clip.times) // tower.frames), *(side // tower.patch_size for side in size)
    return {"pixel_values_videos": values, "video_grid_thw": [grid], "second_per_grid_ts": [tower.frames * clip.seconds / len(clip.times)]}


def clip_size(config: QwenVLConfig, clip: Clip, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) that frames are resized to: 2 and 2.5 bound the pixels of each frame, 3 those of all together."""
    tower, frames, (height, width) = config.vision_config, len(clip.times), clip.size
    unit = tower.patch_size * config.spatial_merge_size
    least, most = (settings.get(f"{name}_pixels") or settings["size"][edge] for name, edge in _EDGES)
    budget = settings.get("max_video_tokens") or (768 if config.third else 128_000)
    capped = budget * unit**2 if settings.get("cap_pixels_per_frame") else None
    if not config.third:
        if capped:
            most = max(min(most, int(capped * 0.9) * tower.frames // frames), int(least * 1.05))
        return clips.fitted(clip.size, unit, least, most)
    if capped:
        most = max(min(capped, most // frames), int(least * 1.05)) * frames
    grow = max(1, unit / height, unit / width)
    return clips.fitted((int(height * grow), int(width * grow)), unit, least, most, frames, tower.frames)


def taps(grid: np.ndarray, size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation of a square table of `side` rows, corners on corners: for each place of a grid of `size` the four rows of the
    table around it and their weights, [..., 4] each."""
    spots = [np.linspace(0, side - 1, n, dtype=np.float32)[grid[..., axis]] for axis, n in enumerate(size)]
    low = [np.floor(spot).astype(np.int32) for spot in spots]
    high = [np.minimum(floor + 1, side - 1) for floor in low]
    far = [spot - floor for spot, floor in zip(spots, low)]
    places = np.stack([r * side + c for r in (low[0], high[0]) for c in (low[1], high[1])], axis=-1)
    weights = np.stack([r * c for r in (1 - far[0], far[0]) for c in (1 - far[1], far[1])], axis=-1)
    return places, weights


def make(hf: Any) -> Model:
    """A Qwen-VL model from its Hugging Face config."""
    config = config_from_hf(hf)
    tower, disk = config.vision_config, "model.visual." if config.third else "visual."
    merged = (1, config.spatial_merge_size**2, tower.hidden_size)
    parts = {"visual": vlm.tower_params(tower, dummy(config)), "visual/merger": vlm.module_params(Merger(config), merged)}
    more = {}
    if config.deepstack:
        one = vlm.module_params(Merger(config, norm_joined=True), merged)
        parts["visual/deepstack_merger_list"] = lambda key: jax.vmap(one)(jax.random.split(key, len(config.deepstack)))
        more = {"visual/deepstack_merger_list": disk + "deepstack_merger_list.{k}"}
    if config.third:
        names = vlm.inner_names("language_model")
        layouts = dict(renames=(), modules=())
    else:
        names = str
        more = {"visual/merger/norm": "visual.merger.ln_q", "visual/merger/linear_fc1": "visual.merger.mlp.0",
                "visual/merger/linear_fc2": "visual.merger.mlp.2"}  # fmt: skip
        layouts = dict(
            renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
            modules=((r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")),
        )
    return vlm.assemble(
        hf,
        config,
        parts=parts,
        encode=lambda params, batch, rngs, remat: encode(config, params, batch, rngs, remat),
        conversion=vlm.conversion(
            hf, config.text_config, names, [towers.names(hf.vision_config.model_type, "visual/", disk), (more, ())], **layouts
        ),
        media=media(config),
    )


def dummy(config: QwenVLConfig) -> vision.Patches:
    """The smallest input of the tower."""
    tower = config.vision_config
    values = np.zeros((1, 1, max(tower.frames, 1) * tower.patch_size**2 * tower.num_channels), np.float32)
    one = np.ones((1, 1), np.int32)
    return vision.Patches(values, (one, one) if config.window else (one,), np.zeros((1, 1, 2), np.int32),
                          np.zeros((1, 1, 4), np.int32), np.zeros((1, 1, 4), np.float32))  # fmt: skip
