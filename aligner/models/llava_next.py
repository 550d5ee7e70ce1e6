"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision (arXiv 2408.03326): an image is one small view and tiles of a large one, whose patches
are read line by line without the padding, each line ended by a learned feature. OneVision shrinks what has too many patches. Of a video's
frames neighbouring patches are pooled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aligner.models import clips, llava, towers, vision, vlm
from aligner.models.pictures import Clip, Picture, Row, Shown
from aligner.types import Batch, Media, Model, UserError

NEWLINE = -1  # in an index: the first of the features that stand before those of the tiles


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(llava.LlavaConfig):
    """LLaVA's, how images are cut, and how videos are pooled."""

    image_grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels that a large view may have
    most_tiles: int | None  # as many tiles' worth of patches as OneVision keeps; None keeps all
    video_token_index: int | None  # None takes no videos
    spatial_pool_mode: str  # of a video's patches: average or max
    spatial_pool_stride: int

    @property
    def frame_features(self) -> int:
        """Features of one frame of a video."""
        return (self.vision_config.image_size // self.vision_config.patch_size // self.spatial_pool_stride) ** 2


def config_from_hf(hf: Any) -> LlavaNextConfig:
    """Read a `LlavaNextConfig`, `LlavaNextVideoConfig` or `LlavaOnevisionConfig`."""
    base = llava.config_from_hf(hf)
    if base.features != base.vision_config.num_patches:
        raise UserError(
            f"vision_feature_select_strategy {base.vision_feature_select_strategy!r} of the {hf.model_type} config leaves {base.features} "
            f"features of {base.vision_config.num_patches} patches; tiles cannot be joined then"
        )
    aspect = getattr(hf, "vision_aspect_ratio", None)
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    pinpoints = tuple(tuple(pair) for pair in hf.image_grid_pinpoints)
    mode, videos = getattr(hf, "spatial_pool_mode", "average"), hf.model_type == "llava_next_video"
    if mode not in ("average", "max"):
        raise UserError(f"spatial_pool_mode {mode!r} of the {hf.model_type} config is not implemented; average and max are")
    return LlavaNextConfig(
        **values,
        image_grid_pinpoints=pinpoints,
        most_tiles=int(aspect.removeprefix("anyres_max_")) if aspect else None,
        video_token_index=hf.video_token_index if videos else None,
        spatial_pool_mode=mode,
        spatial_pool_stride=getattr(hf, "spatial_pool_stride", 1),
    )


def best_view(height: int, width: int, views: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of the views allowed, that which shows most of an image's pixels, and of those the smallest."""

    def key(view: tuple[int, int]) -> tuple[int, int]:
        scale = min(view[1] / width, view[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - view[0] * view[1]

    return max(views, key=key)  # the first of equals


def lines(config: LlavaNextConfig, height: int, width: int) -> tuple[tuple[int, int], np.ndarray]:
    """((tile rows, tile columns) of the large view, number of the feature at every patch of it that is not padding [h, w])."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = (pixels // config.vision_config.image_size for pixels in best_view(height, width, config.image_grid_pinpoints))
    tile, inside = np.arange(1, 1 + rows * columns).reshape(rows, 1, columns, 1), np.arange(side**2).reshape(1, side, 1, side)
    grid = (tile * side**2 + inside).reshape(rows * side, columns * side)
    high, wide = grid.shape
    if width / height > wide / high:
        cut = (high - int(round(height * (wide / width), 7))) // 2
        return (rows, columns), grid[cut : high - cut]
    cut = (wide - int(round(width * (high / height), 7))) // 2
    return (rows, columns), grid[:, cut : wide - cut]


def shrunk(config: LlavaNextConfig, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features around every place of a grid, after it is shrunk if it is too large, and their weights: [h, w, 4] each."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    high, wide = grid.shape
    ratio = math.sqrt(high * wide / (config.most_tiles * side**2)) if config.most_tiles else 0
    if ratio <= 1.1:
        return np.repeat(grid[..., None], 4, axis=-1), np.broadcast_to(np.eye(4, dtype=np.float32)[0], (*grid.shape, 4))
    near, far, share = zip(*(between(n, int(n // ratio)) for n in grid.shape))
    taps = np.stack([grid[np.ix_(r, c)] for r in (near[0], far[0]) for c in (near[1], far[1])], axis=-1)
    weights = [np.multiply.outer(r, c) for r in (1 - share[0], share[0]) for c in (1 - share[1], share[1])]
    return taps, np.stack(weights, axis=-1).astype(np.float32)


def between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation of `old` values to `new`, pixel centres aligned: the values on both sides and the share of the second."""
    spot = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    near = np.minimum(spot.astype(int), old - 1)
    return near, np.minimum(near + 1, old - 1), spot - near


def placeholders(config: LlavaNextConfig, size: tuple[int, int], tiled: bool) -> tuple[int, np.ndarray, np.ndarray]:
    """(tiles, features around every placeholder [n,4], their weights [n,4]) of an image of (height, width)."""
    ends = lambda taps, weights: (
        np.concatenate([taps, np.full((len(taps), 1, 4), NEWLINE)], axis=1).reshape(-1, 4),
        np.concatenate([weights, np.broadcast_to(np.eye(4, dtype=np.float32)[0], (len(taps), 1, 4))], axis=1).reshape(-1, 4),
    )
    base = np.arange(config.features)
    small = np.repeat(base[:, None], 4, axis=1), np.broadcast_to(np.eye(4, dtype=np.float32)[0], (len(base), 4))
    if not tiled:
        taps, weights = ends(small[0][None], small[1][None])
        return 1, taps, weights
    (rows, columns), grid = lines(config, *size)
    taps, weights = ends(*shrunk(config, grid))
    return 1 + rows * columns, np.concatenate([small[0], taps]), np.concatenate([small[1], weights])


def media(config: LlavaNextConfig) -> Media:
    """A slot is a tile, or a frame."""
    size, mixed = config.vision_config.image_size, config.most_tiles is not None

    def show(wide: tuple[int, int], assets: Any, count: int) -> Shown:
        tiles, index, _ = placeholders(config, wide[::-1], tiled=not mixed or count == 1)
        return Shown(tiles, (len(index),))

    def pictures(processed: Mapping[str, Any]) -> list[Picture]:
        counts = [n for n in processed["batch_num_images"] for _ in range(n)] if "batch_num_images" in processed else None
        made = []
        for number, (tiles, shape) in enumerate(zip(processed.get("pixel_values", ()), processed.get("image_sizes", ()))):
            used, index, weights = placeholders(config, tuple(map(int, shape)), tiled=counts is None or counts[number] == 1)
            pixels = np.asarray(tiles)[:used].transpose(0, 2, 3, 1)
            made.append(Picture({"pixel_values": pixels}, index[:, 0], taps=(index, weights) if mixed else None))
        return made + [video(np.asarray(frames)) for frames in processed.get("pixel_values_videos", ())]

    def video(frames: np.ndarray) -> Picture:
        index = np.arange(len(frames))[:, None] * config.features + np.arange(config.frame_features)
        arrays = {"pixel_values": frames.transpose(0, 2, 3, 1), "pooled": np.ones(len(frames), bool)}
        return Picture(arrays, index.reshape(-1), kind="video")

    def show_clip(clip: Clip, assets: Any) -> Shown:
        return Shown(len(clip.times), (len(clip.times) * config.frame_features,), kind="video")

    def process_clip(clip: Clip, assets: Any) -> Mapping[str, Any]:
        return {"pixel_values_videos": clips.square(clip.frames, assets.video_settings)[None]}

    def arrange(row: Row, pictures: Sequence[Picture]) -> Row:
        """Every placeholder's own mixture of features stands at its column."""
        taps, weights = (np.zeros((len(row["tokens"]), 4), dtype) for dtype in (np.int32, np.float32))
        columns = np.flatnonzero(row["media_index"] >= 0)
        start, every = 0, []
        for picture in pictures:
            index = picture.taps[0]
            every.append(np.where(index < 0, -1 - index, 1 + start * config.features + index))
            start += len(picture.arrays["pixel_values"])
        if len(columns):
            number = row["media_index"][columns]
            taps[columns] = np.concatenate(every)[number]
            weights[columns] = np.concatenate([picture.taps[1] for picture in pictures])[number]
        return {"media_taps": taps, "media_weights": weights, "media_index": np.where(row["media_index"] >= 0, np.arange(len(taps)), -1)}

    per_token = {"media_taps": ((4,), np.int32), "media_weights": ((4,), np.float32)} if mixed else {}
    slot = {} if config.video_token_index is None else {"pooled": ((), np.bool_)}
    return Media(config.image_token_index, config.features, size, size, lead=1, slot=slot, per_token=per_token, show=show,
                 pictures=pictures, arrange=arrange if mixed else None, together=mixed, video=config.video_token_index,
                 show_clip=show_clip, process_clip=process_clip)  # fmt: skip


def pool(config: LlavaNextConfig, states: Float[Array, "N P V"]) -> Float[Array, "N P V"]:
    """Neighbouring patches of each frame as one, before the first of the places they leave empty."""
    side, stride = config.vision_config.image_size // config.vision_config.patch_size, config.spatial_pool_stride
    whole = side // stride * stride
    blocks = vision.cut(states.reshape(len(states), side, side, -1)[:, :whole, :whole], stride)
    blocks = blocks.reshape(len(states), config.frame_features, stride**2, -1)
    found = jnp.mean(blocks, axis=2) if config.spatial_pool_mode == "average" else jnp.max(blocks, axis=2)
    return jnp.pad(found, ((0, 0), (0, states.shape[1] - config.frame_features), (0, 0)))


def make(hf: Any) -> Model:
    """A LLaVA-NeXT or LLaVA-OneVision model from its Hugging Face config."""
    config, path = config_from_hf(hf), llava.tower_path(hf)
    disk, width = path.replace("/", ".") + ".", config.text_config.hidden_size

    def encode(params, batch: Batch, rngs, remat) -> Float[Array, "B F D"]:
        states = llava.select(config, params, vlm.flat_images(batch, llava.dtype_of(params)), path, rngs, remat)
        if "pooled" in batch:
            states = jnp.where(batch["pooled"].reshape(-1, 1, 1), pool(config, states), states)
        features = llava.Projector(config).apply({"params": params["multi_modal_projector"]}, states, rngs=rngs)
        features = features.reshape(len(batch["pixel_values"]), -1, width)
        line_end = jnp.broadcast_to(params["image_newline"].astype(features.dtype), (len(features), 1, width))
        features = jnp.concatenate([line_end, features], axis=1)
        if config.most_tiles is None:
            return features
        around = jax.vmap(lambda rows, taps: rows[taps])(features, batch["media_taps"])
        return jnp.sum(around * batch["media_weights"][..., None].astype(features.dtype), axis=2)

    newline = lambda key: jax.random.normal(key, (width,)) * width**-0.5
    return vlm.assemble(
        hf,
        config,
        parts={**llava.parts(config, path), "image_newline": newline},
        encode=encode,
        conversion=vlm.conversion(hf, config.text_config, vlm.llava_names, [towers.names(hf.vision_config.model_type, path + "/", disk)],
                                  **vlm.llava_renames(disk, "multi_modal_projector|image_newline")),
        media=media(config),
        trained_layers=vlm.tower_layers(path, config.vision_config, config.vision_feature_layer),
    )  # fmt: skip
