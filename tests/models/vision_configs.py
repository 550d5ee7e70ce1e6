"""Odd tiny configs of every family that sees or hears, three or more each, and what their processors would give for random pictures and
sounds."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tests.models.text_configs import LINEAR, LLAMA3, YARN

IMG, VID, START, END = 60, 61, 58, 59
T = dict(vocab_size=64, hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
         max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
V = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3, image_size=8, patch_size=2)
NO_HEAD = dict(vision_use_head=False)


class Case(NamedTuple):
    """A config by its parts: names of `transformers` classes' model types, and fields."""

    text: tuple[str, dict]
    vision: tuple[str, dict]
    more: dict = MappingProxyType({})


def mrope(*sections: int, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


PINPOINTS = [[8, 16], [16, 8], [16, 16], [8, 24]]
_PIX = {k: v for k, v in V.items()} | dict(num_attention_heads=1, head_dim=12)
_NEXT = dict(image_grid_pinpoints=PINPOINTS)
_ONE = dict(image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="full")
_Q2 = dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=2, spatial_merge_size=2, temporal_patch_size=2)
_Q25 = dict(depth=3, hidden_size=16, out_hidden_size=16, intermediate_size=24, num_heads=2, patch_size=2, spatial_merge_size=2,
            temporal_patch_size=2, window_size=8, fullatt_block_indexes=[1])  # fmt: skip
_Q3 = dict(depth=3, hidden_size=16, out_hidden_size=16, intermediate_size=24, num_heads=2, patch_size=2, spatial_merge_size=2,
           temporal_patch_size=2, num_position_embeddings=25, deepstack_visual_indexes=[0, 1])  # fmt: skip
_Q3T = mrope(2, 1, 1, mrope_interleaved=True) | dict(head_dim=8)
_G3 = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
_INTERN = {k: v for k, v in V.items() if k not in ("image_size", "patch_size")} | dict(image_size=[8, 8], patch_size=[2, 2])
_MLLAMA = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_global_layers=1, attention_heads=3, image_size=8, patch_size=4,
               max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]], intermediate_layers_indices=[0, 2], vision_output_dim=36)
_PERCEIVER = dict(hidden_size=16, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=6, num_key_value_heads=1)
_WHISPER = dict(num_mel_bins=6, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=20, d_model=12, max_source_positions=10)

CASES: dict[str, list[Case]] = {
    "llava": [
        Case(("llama", {}), ("clip_vision_model", V)),
        Case(("gemma2", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4)), ("siglip_vision_model", V),
             dict(vision_feature_select_strategy="full", vision_feature_layer=-1)),
        Case(("phi3", {}), ("dinov2", dict(V, mlp_ratio=2, use_swiglu_ffn=True)), dict(vision_feature_layer=[-2, -1])),
        Case(("qwen2", {}), ("dinov2_with_registers", dict(V, mlp_ratio=2, num_register_tokens=2)), dict(vision_feature_layer=-1)),
        Case(("mistral", {}), ("pixtral", _PIX), dict(vision_feature_select_strategy="full", vision_feature_layer=-1)),
        Case(("mixtral", dict(num_local_experts=4)), ("pixtral", {**_PIX, "hidden_size": 16, "head_dim": 16}),
             dict(vision_feature_select_strategy="full", vision_feature_layer=1)),
        Case(("granite", dict(embedding_multiplier=3.0, residual_multiplier=0.5)), ("clip_vision_model", V)),
    ],
    "llava_next": [
        Case(("mistral", {}), ("clip_vision_model", V), _NEXT),
        Case(("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)), ("clip_vision_model", V), _NEXT | dict(vision_feature_layer=[1, -1])),
        Case(("qwen2", {}), ("siglip_vision_model", V | NO_HEAD), _ONE),
    ],
    "llava_next_video": [
        Case(("mistral", {}), ("clip_vision_model", V), _NEXT | dict(video_token_index=VID)),
        Case(("llama", dict(rope_parameters=LINEAR)), ("clip_vision_model", V), _NEXT | dict(video_token_index=VID, vision_feature_layer=[0, -1], spatial_pool_mode="max", spatial_pool_stride=3)),
        Case(("qwen2", dict(tie_word_embeddings=True)), ("siglip_vision_model", V | NO_HEAD),
             _ONE | dict(video_token_index=VID, multimodal_projector_bias=False, projector_hidden_act="relu")),
    ],
    "llava_onevision": [
        Case(("qwen2", {}), ("siglip_vision_model", V | NO_HEAD), _ONE | dict(vision_aspect_ratio="anyres_max_2")),
        Case(("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)), ("siglip_vision_model", V | NO_HEAD), _ONE),
        Case(("llama", {}), ("siglip_vision_model", V), _ONE | dict(vision_feature_layer=-2, vision_aspect_ratio="anyres_max_1")),
    ],
    "qwen2_vl": [
        Case(("", mrope(1, 1, 0)), ("", _Q2)),
        Case(("", mrope(0, 1, 1) | dict(tie_word_embeddings=True)), ("", dict(_Q2, depth=3, hidden_act="gelu"))),
        Case(("", mrope(2, 1, 1, **YARN) | dict(num_attention_heads=2, num_key_value_heads=1)), ("", dict(_Q2, patch_size=4))),
    ],
    "qwen2_5_vl": [
        Case(("", mrope(1, 1, 0)), ("", _Q25)),
        Case(("", mrope(1, 0, 1)), ("", dict(_Q25, fullatt_block_indexes=[0, 2], window_size=4))),
        Case(("", mrope(2, 1, 1, **YARN) | dict(num_attention_heads=2)), ("", dict(_Q25, depth=2, window_size=12, fullatt_block_indexes=[]))),
    ],
    "qwen3_vl": [
        Case(("", _Q3T), ("", _Q3)),
        Case(("", _Q3T | dict(tie_word_embeddings=True)), ("", dict(_Q3, num_position_embeddings=9, deepstack_visual_indexes=[2]))),
        Case(("", mrope(4, 2, 2, mrope_interleaved=True) | dict(head_dim=16)), ("", dict(_Q3, depth=2, deepstack_visual_indexes=[1]))),
    ],
    "paligemma": [
        Case(("gemma", dict(head_dim=8)), ("siglip_vision_model", dict(V, projection_dim=16) | NO_HEAD)),
        Case(("gemma", dict(head_dim=8, num_key_value_heads=4)), ("siglip_vision_model", dict(V, projection_dim=16) | NO_HEAD)),
        Case(("gemma", dict(head_dim=6, num_key_value_heads=1, rope_parameters=LINEAR)),
             ("siglip_vision_model", dict(V, projection_dim=16, patch_size=4) | NO_HEAD)),
        # PaliGemma 2: the prompt is longer than the window
        Case(("gemma2", dict(head_dim=8, query_pre_attn_scalar=10, sliding_window=5, final_logit_softcapping=2.0)),
             ("siglip_vision_model", dict(V, projection_dim=16) | NO_HEAD)),
    ],
    "gemma3": [
        Case(("gemma3_text", _G3), ("siglip_vision_model", V | NO_HEAD), dict(mm_tokens_per_image=4)),
        Case(("gemma3_text", dict(_G3, sliding_window=3)), ("siglip_vision_model", dict(V, patch_size=4) | NO_HEAD), dict(mm_tokens_per_image=4)),
        Case(("gemma3_text", _G3 | dict(rope_parameters={"sliding_attention": mrope()["rope_parameters"], "full_attention": LINEAR})),
             ("siglip_vision_model", V), dict(mm_tokens_per_image=16)),
    ],
    "idefics2": [
        Case(("mistral", {}), ("", V), dict(perceiver_config=_PERCEIVER)),
        Case(("mistral", dict(sliding_window=5)), ("", dict(V, image_size=14)), dict(perceiver_config=dict(_PERCEIVER, resampler_depth=2))),
        Case(("llama", dict(rope_parameters=LINEAR)), ("", V),
             dict(perceiver_config=dict(_PERCEIVER, resampler_n_latents=3, num_key_value_heads=2))),
    ],
    "idefics3": [
        Case(("llama", {}), ("", V), dict(scale_factor=2)),
        Case(("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)), ("", dict(V, image_size=12)), dict(scale_factor=3)),
        Case(("mistral", {}), ("", dict(V, image_size=14)), dict(scale_factor=1)),
    ],
    "smolvlm": [
        Case(("llama", dict(tie_word_embeddings=True)), ("", V), dict(scale_factor=4)),
        Case(("llama", dict(rope_parameters=YARN, head_dim=6)), ("", dict(V, image_size=12)), dict(scale_factor=2)),
        Case(("smollm3", dict(no_rope_layers=[1, 0])), ("", dict(V, patch_size=4)), dict(scale_factor=1)),
    ],
    "mllama": [
        Case(("", dict(num_hidden_layers=4, cross_attention_layers=[1])), ("", _MLLAMA)),
        Case(("", dict(num_hidden_layers=5, cross_attention_layers=[0, 3])), ("", dict(_MLLAMA, intermediate_layers_indices=[2, 0, 1], vision_output_dim=48))),
        Case(("", dict(num_hidden_layers=5, cross_attention_layers=[1, 3], rope_parameters=LLAMA3)), ("", dict(_MLLAMA, num_global_layers=2))),
    ],
    "internvl": [
        Case(("qwen2", {}), ("", _INTERN), dict(tie_word_embeddings=False)),
        Case(("qwen3", dict(head_dim=8)), ("", dict(_INTERN, norm_type="rms_norm", use_qk_norm=True, attention_bias=True))),
        Case(("llama", dict(rope_parameters=YARN)), ("", dict(_INTERN, use_mean_pooling=False)), dict(vision_feature_layer=-2, downsample_ratio=0.25)),
    ],
    "qwen2_audio": [
        Case(("qwen2", {}), ("qwen2_audio_encoder", _WHISPER)),
        Case(("qwen2", dict(rope_parameters=YARN)),
             ("qwen2_audio_encoder", dict(_WHISPER, encoder_layers=3, max_source_positions=13, activation_function="gelu_pytorch_tanh"))),
        Case(("llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
             ("qwen2_audio_encoder", dict(_WHISPER, encoder_layers=1, encoder_attention_heads=1, d_model=10, num_mel_bins=5))),
    ],
}  # fmt: skip
INDEXED = ("mllama", "llava", "llava_next", "llava_next_video", "llava_onevision", "paligemma", "gemma3")  # image_token_index, not image_token_id


def hf_config(family: str, case: Case) -> Any:
    """The case as a config of `transformers`."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    (text, text_fields), (vision, vision_fields) = copy.deepcopy((case.text, case.vision))
    if "sliding_window" in text_fields and "layer_types" not in text_fields and text == "gemma2":
        text_fields["layer_types"] = ["sliding_attention", "full_attention"]
    tied = text_fields.get("tie_word_embeddings")
    sense = "audio" if family == "qwen2_audio" else "vision"
    parts = {"text_config": T | text_fields, f"{sense}_config": vision_fields}
    if text:
        parts["text_config"] = CONFIG_MAPPING[text](**parts["text_config"])
    if vision:
        parts[f"{sense}_config"] = CONFIG_MAPPING[vision](**vision_fields)
    ids = {"audio_token_index" if sense == "audio" else "image_token_index" if family in INDEXED else "image_token_id": IMG}
    if family in QWEN:
        ids |= dict(video_token_id=VID, vision_start_token_id=START, vision_end_token_id=END)
    if family == "gemma3":
        ids |= dict(boi_token_index=START, eoi_token_index=END)
    if family == "paligemma":
        ids |= dict(projection_dim=16, hidden_size=16)
    if tied is not None:
        ids["tie_word_embeddings"] = tied
    return cls(**parts, **ids, **copy.deepcopy(dict(case.more)))


SIZES = [(13, 20), (9, 6), (6, 17)]  # (height, width) of the pictures; the first row has one, the second none, the third two
ROWS = [[0], [], [1, 2]]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# which of the pictures are videos, and of how many (groups of) frames
VIDEOS: dict[str, dict[int, int]] = {family: {2: 3} for family in ("llava_next_video", *QWEN)}


def processed(family: str, hf: Any, rows: list[int], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """What an image processor gives for the pictures of these rows, and for each row how many placeholders each picture takes."""
    numbers = [n for row in rows for n in ROWS[row]]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    pixels = {n: np.random.default_rng(n) for n in range(3)}  # a picture is the same in every batch
    one = lambda n, *shape: pixels[n].standard_normal(shape).astype(np.float32)
    by_row = lambda count: [[count[n] for n in ROWS[row]] for row in rows]
    if family == "qwen2_audio":
        window = 2 * hf.audio_config.max_source_positions
        frames = {0: window, 1: 9, 2: window - 3}
        noise = [one(n, hf.audio_config.num_mel_bins, window) for n in numbers]
        made = dict(input_features=np.array(noise), feature_attention_mask=np.array([np.arange(window) < frames[n] for n in numbers], int))
        return made, by_row({n: ((count - 1) // 2 + 1 - 2) // 2 + 1 for n, count in frames.items()})
    tower = hf.vision_config
    if family in QWEN:
        unit = tower.patch_size * tower.spatial_merge_size
        grids = {n: (1, *(max(unit, side // unit * unit) // tower.patch_size for side in SIZES[n])) for n in range(3)}
        grids[0] = (1, 3 * tower.spatial_merge_size, 5 * tower.spatial_merge_size)
        grids |= {n: (groups, *grids[n][1:]) for n, groups in VIDEOS[family].items()}
        width, made = 3 * tower.temporal_patch_size * tower.patch_size**2, {}
        for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            of_kind = [n for n in numbers if (n in VIDEOS[family]) == (kind == "video")]
            if of_kind:
                made[values] = np.concatenate([one(n, int(np.prod(grids[n])), width) for n in of_kind])
                made[f"{kind}_grid_thw"] = np.array([grids[n] for n in of_kind])
        if family == "qwen2_5_vl" and "pixel_values_videos" in made:
            made["second_per_grid_ts"] = np.full(len(made["video_grid_thw"]), 0.7)
        return made, by_row({n: int(np.prod(grid)) // tower.spatial_merge_size**2 for n, grid in grids.items()})
    if getattr(tower, "model_type", "") == "pixtral":
        patch = tower.patch_size
        sizes = {n: tuple(min(8, side // patch * patch) for side in SIZES[n]) for n in range(3)}
        canvas = np.zeros((len(numbers), 3, 8, 8), np.float32)
        for place, n in enumerate(numbers):
            h, w = sizes[n]
            canvas[place, :, :h, :w] = one(n, 3, h, w)
        made = dict(pixel_values=canvas, image_sizes=np.array([sizes[n] for n in numbers]))
        return made, by_row({n: h * w // patch**2 for n, (h, w) in sizes.items()})
    size = tower.image_size[0] if isinstance(tower.image_size, (list, tuple)) else tower.image_size
    patch = tower.patch_size[0] if isinstance(tower.patch_size, (list, tuple)) else tower.patch_size
    if family in ("llava_next", "llava_next_video", "llava_onevision"):
        from aligner.models import llava_next

        config = llava_next.config_from_hf(hf)
        images = [n for n in numbers if n not in VIDEOS.get(family, {})]
        alone = {n: family != "llava_onevision" or n == 0 for n in range(3)}
        counted = {n: llava_next.placeholders(config, SIZES[n], alone[n]) for n in range(3)}
        most = max(tiles for tiles, *_ in counted.values())
        canvas = np.zeros((len(images), most, 3, size, size), np.float32)
        for place, n in enumerate(images):
            canvas[place, : counted[n][0]] = one(n, counted[n][0], 3, size, size)
        made = dict(pixel_values=canvas, image_sizes=np.array([SIZES[n] for n in images]))
        if family == "llava_onevision":
            made["batch_num_images"] = np.array([len(ROWS[row]) for row in rows if ROWS[row]])
        frames = VIDEOS.get(family, {})
        if any(n in frames for n in numbers):
            made["pixel_values_videos"] = np.stack([one(n, frames[n], 3, size, size) for n in numbers if n in frames])
        takes = {n: frames[n] * config.frame_features if n in frames else len(index) for n, (_, index, _) in counted.items()}
        return made, by_row(takes)
    tiles = {0: 3, 1: 1, 2: 2} if family in ("idefics3", "smolvlm", "internvl") else dict.fromkeys(range(3), 1)
    stack = np.concatenate([one(n, tiles[n], 3, size, size) for n in numbers] or [draw(0, 3, size, size)])
    side = (size // patch) ** 2
    if family in ("idefics3", "smolvlm"):
        each, most = side // hf.scale_factor**2, max([sum(tiles[n] for n in ROWS[row]) for row in rows] + [1])
        canvas = np.zeros((len(rows), most, 3, size, size), np.float32)
        for place, row in enumerate(rows):
            used = [one(n, tiles[n], 3, size, size) for n in ROWS[row]]
            if used:
                canvas[place, : sum(map(len, used))] = np.concatenate(used)
        mask = (canvas != 0).any(axis=2).astype(np.int64)
        return dict(pixel_values=canvas, pixel_attention_mask=mask), by_row({n: each * count for n, count in tiles.items()})
    if family == "mllama":
        most = max(1, *(len(ROWS[row]) for row in rows))
        canvas, ratios = np.zeros((len(rows), most, 2, 3, size, size), np.float32), np.zeros((len(rows), most), np.int64)
        mask, kinds = np.zeros((len(rows), most, 2), np.int64), {0: 2, 1: 1, 2: 3}
        mask[..., 0] = 1
        for place, row in enumerate(rows):
            for slot, n in enumerate(ROWS[row]):
                used = 1 + (kinds[n] > 1)
                canvas[place, slot, :used], ratios[place, slot], mask[place, slot, :used] = one(n, used, 3, size, size), kinds[n], 1
        return dict(pixel_values=canvas, aspect_ratio_ids=ratios, aspect_ratio_mask=mask), by_row(dict.fromkeys(range(3), 1))
    if family == "idefics2":
        canvas = np.zeros((len(rows), max(1, *(len(ROWS[row]) for row in rows)), 3, size, size), np.float32)
        mask = np.zeros((*canvas.shape[:2], size, size), np.int64)
        for place, row in enumerate(rows):
            for slot, n in enumerate(ROWS[row]):
                h, w = (min(size, side) // patch * patch for side in SIZES[n])
                canvas[place, slot, :, :h, :w], mask[place, slot, :h, :w] = one(n, 3, h, w), 1
        latents = hf.perceiver_config.resampler_n_latents
        return dict(pixel_values=canvas, pixel_attention_mask=mask), by_row(dict.fromkeys(range(3), latents))
    if family == "internvl":
        each = int(side * hf.downsample_ratio**2)
    elif family == "gemma3":
        each = hf.mm_tokens_per_image
    else:
        full = getattr(hf, "vision_feature_select_strategy", "full") == "full"
        cls = tower.model_type in ("clip_vision_model", "dinov2", "dinov2_with_registers")
        each = side + (cls if full else 0) + getattr(tower, "num_register_tokens", 0)
    return dict(pixel_values=stack), by_row({n: each * count for n, count in tiles.items()})


def batch(family: str, hf: Any, rows: list[int], padding: str = "right") -> dict[str, np.ndarray]:
    """What a processor gives for these rows: text around pictures, padded to the longest."""
    made, counts = processed(family, hf, rows, np.random.default_rng(9))
    texts = []
    for row, runs in zip(rows, counts):
        words = np.random.default_rng(row + 50)
        text = [1, *words.integers(3, 57, 2)]
        for n, run in zip(ROWS[row], runs):
            groups = VIDEOS.get(family, {}).get(n)
            if groups and family == "qwen3_vl":  # which writes the time before each group of frames
                for _ in range(groups):
                    text += [VID] * (run // groups) + list(words.integers(3, 57, 2))
            else:
                text += [VID if groups else IMG] * run + list(words.integers(3, 57, 2))
        texts.append(text + list(words.integers(3, 57, 3 + 2 * row)))
    longest = max(map(len, texts))
    fill = [[0] * (longest - len(text)) for text in texts]
    left = padding == "left"
    ids = np.array([f + text if left else text + f for text, f in zip(texts, fill)])
    mask = np.array([f + [1] * len(text) if left else [1] * len(text) + f for text, f in zip(texts, fill)])
    out = {"input_ids": ids, "attention_mask": mask}
    if family in QWEN:
        out["mm_token_type_ids"] = np.select([ids == IMG, ids == VID], [1, 2], 0)
    if family == "gemma3":
        out["token_type_ids"] = (ids == IMG).astype(np.int64)
    if family == "paligemma":  # the last three are the answer
        at = np.arange(longest)
        ends = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
        out["token_type_ids"] = (at >= ends[:, None] - 3).astype(np.int64)
    if any(ROWS[row] for row in rows):
        out |= made
    if family == "mllama" and "pixel_values" in out:
        seen = np.zeros((*ids.shape, *out["aspect_ratio_mask"].shape[1:]), np.int64)
        for place in range(len(rows)):
            starts = [*np.flatnonzero(ids[place] == IMG), longest]
            for slot, (start, end) in enumerate(pairwise(starts)):
                seen[place, start:end, slot] = out["aspect_ratio_mask"][place, slot]
        out["cross_attention_mask"] = seen
    return out
