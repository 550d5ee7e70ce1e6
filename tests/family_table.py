"""The README's table of families, made from what the package and its tests hold: `python -m tests.family_table` writes it."""

from __future__ import annotations

from pathlib import Path

from aligner.models import SUPPORTED, WITH_MEDIA
from tests.models import text_configs, vision_configs

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: python -m tests.family_table -->", "<!-- end of families -->"

# What a family is called, its model types, and what else is to be known.
NAMES = [
    ("Llama 2, 3.x; Mistral", ("llama", "mistral"), ""),
    ("Qwen 2, 2.5, 3", ("qwen2", "qwen3"), ""),
    ("Gemma 1, 2, 3", ("gemma", "gemma2", "gemma3_text"), ""),
    ("Phi 1, 2, 3, 4", ("phi", "phi3"), ""),
    ("GLM-4", ("glm", "glm4"), ""),
    ("OLMo 2, SmolLM3, Granite", ("olmo2", "smollm3", "granite"), ""),
    ("GPT-2, OPT, GPT-NeoX, Pythia, Bloom", ("gpt2", "opt", "gpt_neox", "bloom"), ""),
    ("Baichuan 1, 2", ("baichuan",), "7B and 13B; compared with a Llama of the same numbers, there being no class in `transformers`"),
    ("mixture of experts", ("mixtral", "qwen2_moe", "qwen3_moe"),
     "every layer sparse; no token dropped; load-balance loss if the config has `output_router_logits`"),
    ("LLaVA-1.5; Pixtral", ("llava",), "CLIP, SigLIP, DINOv2 or Pixtral's tower, any text family above"),
    ("LLaVA-NeXT, LLaVA-NeXT-Video", ("llava_next", "llava_next_video"), "videos: LLaVA-NeXT-Video alone; `data.video_frames` frames of each"),
    ("LLaVA-OneVision", ("llava_onevision",), ""),
    ("Qwen2-VL, 2.5-VL, 3-VL", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "`data.video_frames` frames of each video"),
    ("Gemma 3; PaliGemma 1, 2", ("gemma3", "paligemma"), "each image, or the prompt, sees all of itself; no pan-and-scan"),
    ("Idefics2, Idefics3, SmolVLM", ("idefics2", "idefics3", "smolvlm"), ""),
    ("Llama 3.2 Vision", ("mllama",), ""),
    ("InternVL", ("internvl",), "the `-hf` checkpoints"),
    ("Qwen2-Audio", ("qwen2_audio",), "any number of sounds, each of up to 30 seconds"),
    ("put together from parts", ("vision_llm",), "`python -m aligner.convert build`; ours alone, with two layers between it is a `llava`"),
]  # fmt: skip


def table() -> str:
    """The table, with how many odd configs of each `model_type` are compared with `transformers`."""
    missing = set(SUPPORTED) - {kind for _, kinds, _ in NAMES for kind in kinds}
    assert not missing, f"say in NAMES what these are called: {sorted(missing)}"
    compared = {name: len(cases) for name, cases in {**text_configs.CASES, **vision_configs.CASES}.items()}
    lines = ["| family | `model_type` | takes | configs compared | notes |", "|---|---|---|---|---|"]
    for name, kinds, note in NAMES:
        hears, sees = set(kinds) <= {"qwen2_audio"}, set(kinds) <= set(WITH_MEDIA)
        videos = bool(set(kinds) & set(vision_configs.VIDEOS))
        takes = ", ".join(["sounds"] if hears else ["images"] * sees + ["videos"] * videos) or "text"
        counts = ", ".join(str(compared[kind]) if kind in compared else "-" for kind in kinds)
        lines.append(f"| {name} | {', '.join(f'`{kind}`' for kind in kinds)} | {takes} | {counts} | {note} |")
    return "\n".join(lines)


def smallest() -> str:
    """What the smallest vision-language family takes, in lines."""
    folder = README.parent / "aligner" / "models"
    lines, name = min((len((folder / f"{name}.py").read_text().splitlines()), name) for name in set(WITH_MEDIA.values()))
    return f"The smallest is `aligner/models/{name}.py` with {lines} lines."


def section() -> str:
    return f"{BEGIN}\n{table()}\n\n{smallest()}\n{END}"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    README.write_text(before + section() + rest.split(END)[1])


if __name__ == "__main__":
    main()
