"""A tiny checkpoint folder of every family that sees or hears, with what its rows need: tokenizer, chat template, processor. No PyTorch."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

import aligner
from aligner.convert import model_from_folder
from tests.models import tiny
from tests.models.vision_configs import CASES, END, IMG, PINPOINTS, QWEN, START, hf_config

_TILES = {f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)}
# Everything an image may be written with, and words.
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "<fake_token_around_image>", "<global-img>", *sorted(_TILES), "<img>", "</img>",
         "[IMG_BREAK]", "[IMG_END]"]  # fmt: skip
WORDS += [f"t{i}" for i in range(len(WORDS), 64)]
WORDS[START], WORDS[END], WORDS[IMG], WORDS[61] = "<start>", "<end>", "<image>", "<video>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'audio') %}MARK {% elif part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_SQUARE = dict(size={"height": 8, "width": 8})
_CLIP = dict(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
_QWEN = ("qwen2_vl", "Qwen2VL", dict(patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16, "longest_edge": 256}))
_IDEFICS = dict(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
# family -> (folder and prefix of the image processor's class, its settings)
PROCESSORS: dict[str, tuple[str, str, dict]] = {
    "llava": ("clip", "CLIP", _CLIP),
    "llava_next": ("llava_next", "LlavaNext", _CLIP | dict(image_grid_pinpoints=PINPOINTS)),
    "llava_next_video": ("llava_next", "LlavaNext", _CLIP | dict(image_grid_pinpoints=PINPOINTS)),
    "llava_onevision": ("llava_onevision", "LlavaOnevision", _SQUARE | dict(image_grid_pinpoints=PINPOINTS)),
    **dict.fromkeys(QWEN, _QWEN),
    "paligemma": ("siglip", "Siglip", _SQUARE),
    "gemma3": ("gemma3", "Gemma3", _SQUARE),
    "idefics3": ("idefics3", "Idefics3", _IDEFICS),
    "smolvlm": ("smolvlm", "SmolVLM", _IDEFICS),
    "idefics2": ("idefics2", "Idefics2", dict(size={"shortest_edge": 4, "longest_edge": 8}, do_image_splitting=False)),
    "mllama": ("mllama", "Mllama", _SQUARE | dict(max_image_tiles=2)),
    "internvl": ("got_ocr2", "GotOcr2", _SQUARE | dict(crop_to_patches=False, max_patches=4)),  # as on the Hub; the processor asks for tiles
}
# family -> settings of its video processor, of other sizes than its image processor's where the family has it so
VIDEO_PROCESSORS: dict[str, dict] = {
    "llava_next_video": _CLIP | dict(do_center_crop=True, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]),
    **{family: dict(size={"shortest_edge": 16, "longest_edge": 128}, image_mean=[0.4, 0.5, 0.6]) for family in QWEN},
}
EXTRACTOR = dict(feature_size=6, chunk_length=1, hop_length=800, n_fft=1600)  # a window of twenty frames
PIXTRAL = ("pixtral", "Pixtral", dict(patch_size=2, size={"longest_edge": 8}))


def tokenizer(family: str, image: str = "<image>") -> Any:
    """Words by white space; whatever an image may be written with is a special token."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [image if word == "<image>" else word for word in WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words if word[0] in "<["])
    named = {"image_token": image, "boi_token": "<start>", "eoi_token": "<end>", "start_image_token": "<img>", "end_image_token": "</img>",
             "video_token": "<video>", "context_image_token": image, "image_boundary_token": "<fake_token_around_image>",
             "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=TEMPLATE.replace("MARK", "<start>" if family == "gemma3" else image), extra_special_tokens=named, model_max_length=1024,
    )  # fmt: skip


def save(folder: Path, family: str, n: int = 0) -> Path:
    """Write the family's n-th case to `folder`, every weight perturbed."""
    model = model_from_folder(describe(folder, family, n))
    aligner.save(model, tiny.perturbed(model), folder / "hf")
    return folder / "hf"


def describe(folder: Path, family: str, n: int = 0) -> Path:
    """Write all of the family's n-th case but its weights to `folder`."""
    hf = hf_config(family, CASES[family][n])
    hf.save_pretrained(folder / "config")
    audio, pixtral = hasattr(hf, "audio_config"), hf.to_dict().get("vision_config", {}).get("model_type") == "pixtral"
    words = tokenizer(family, "[IMG]" if pixtral else "<|AUDIO|>" if audio else "<image>")
    if audio:
        from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

        Qwen2AudioProcessor(WhisperFeatureExtractor(**EXTRACTOR), words, words.chat_template).save_pretrained(folder / "config")
    else:
        module, prefix, settings = PIXTRAL if pixtral else PROCESSORS[family]
        words.save_pretrained(folder / "config")
        made = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        getattr(made, prefix + "ImageProcessorPil")(**settings).save_pretrained(folder / "config")
    if family in VIDEO_PROCESSORS:
        (folder / "config" / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSORS[family]))
    extra = dict(patch_size=2, vision_feature_select_strategy=getattr(hf, "vision_feature_select_strategy", "default"),
                 num_additional_image_tokens=1, image_token="[IMG]" if pixtral else "<image>") if family in ("llava", "llava_next") else {}  # fmt: skip
    if extra and not pixtral:
        processor = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}[family]
        (folder / "config" / "processor_config.json").write_text(json.dumps(extra | {"processor_class": processor}))
    return folder / "config"


def clip(frames: np.ndarray, rate: int = 10, form: str = "mp4", **options: str) -> bytes:
    """Frames [F,H,W,3] as an encoded file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def rows(folder: Path, count: int = 8, videos: bool = False, sounds: bool = False) -> Path:
    """Preference rows with no, one and two pictures of several sizes, as JSON lines with the pictures beside them.

    Where asked for, every second row also has a clip, before or after its pictures; or sounds of several lengths stand for the pictures.
    """
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        names = [f"{number}.{i}.{'wav' if sounds else 'png'}" for i in range(number % 3)]
        for name in names:
            if sounds:
                soundfile.write(folder / name, rng.normal(scale=0.1, size=rng.integers(1500, 8000)), 8000)
                continue
            height, width = rng.integers(6, 21, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        words = lambda n: " ".join(f"t{i}" for i in rng.integers(24, 58, n))
        content = [{"type": "audio" if sounds else "image"} for _ in names] + [{"type": "text", "text": words(4)}]
        seen = {"audios" if sounds else "images": names}
        if videos and number % 2:
            height, width = 2 * rng.integers(5, 11, 2)
            frames = np.repeat(rng.integers(0, 256, (5 + number, 1, 1, 3), dtype=np.uint8), height, axis=1).repeat(width, axis=2)
            (folder / f"{number}.mp4").write_bytes(clip(frames))
            seen["videos"] = [f"{number}.mp4"]
            content.insert(0 if number % 4 == 1 else len(content), {"type": "video"})
        lines.append({**seen, "prompt": [{"role": "user", "content": content}],
                      "chosen": [{"role": "assistant", "content": [{"type": "text", "text": words(3)}]}],
                      "rejected": [{"role": "assistant", "content": [{"type": "text", "text": words(5)}]}]})  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"
