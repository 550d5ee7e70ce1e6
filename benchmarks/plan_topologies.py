"""DPO of Llama 3 8B and LLaVA-1.5 7B planned for slices of v5e and v5p, 32 to 256 chips: compiled, in how long, and what each chip holds.

    python -m benchmarks.plan_topologies                        # all sixteen; needs jax[tpu], and no TPU
    python -m benchmarks.plan_topologies --only llava --chips 32

Every plan is `python -m aligner.plan` in a process of its own, on the configs in configs/ with a config.json of the public releases' sizes.
Only `config.data.batch_size` (a pair or more for each chip) and `config.mesh.fsdp` are set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLICES = {
    "v5e": {32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {32: "4x4x2", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
FSDP = 64  # at most; the rest of a slice holds further copies
LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5, max_position_embeddings=8192, rms_norm_eps=1e-5,
    torch_dtype="bfloat16",
)  # fmt: skip
VICUNA = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768, vocab_size=32000,
)  # fmt: skip
LLAVA = dict(
    architectures=["LlavaForConditionalGeneration"], model_type="llava", image_token_index=32000, image_seq_length=576,
    vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu", text_config=VICUNA, vision_config=CLIP,
    torch_dtype="float16",
)  # fmt: skip
MODELS = {"llama": ("configs/dpo_llama3.py", LLAMA), "llava": ("configs/dpo_llava.py", LLAVA)}


def plan(folder: Path, name: str, chip: str, chips: int) -> dict:
    """The figures of one plan, with the seconds of the whole command."""
    config, model = MODELS[name]
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(model))
    out = folder / f"{name}-{chip}-{chips}.json"
    command = [
        sys.executable, "-m", "aligner.plan", f"--config={config}", "--nosearch", f"--config.model.path={folder / name}", f"--json={out}",
        f"--topology={chip}:{SLICES[chip][chips]}", f"--config.mesh.fsdp={min(FSDP, chips)}", f"--config.data.batch_size={max(64, chips)}",
    ]  # fmt: skip
    started = time.monotonic()
    ran = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if not out.exists():
        raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
    return json.loads(out.read_text()) | {"seconds": time.monotonic() - started}


def line(found: dict) -> str:
    """A plan's figures in one line."""
    gib = lambda key: found[key] / 2**30
    sent = lambda kind: found.get("collectives", {}).get(kind, {"bytes": 0})["bytes"] / 2**30
    held = f"{gib('total_bytes'):7.2f} {gib('limit_bytes'):6.2f} {gib('resident_bytes'):6.2f} {found['flops'] / 1e12:6.1f}"
    moved = f"{sent('all-gather'):9.2f} {sent('reduce-scatter'):9.2f} {sent('all-reduce'):8.2f}"
    return f"{held} {moved} {found['compile_seconds']:9.0f} s" + ("" if found["fits"] else "  DOES NOT FIT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--chip", choices=SLICES)
    parser.add_argument("--chips", type=int, choices=SLICES["v5e"])
    parser.add_argument("--json", help="file to write all figures to")
    options = parser.parse_args()
    names = f"{'in all':>7} {'of':>6} {'state':>6} {'TFLOP':>6} {'gathered':>9} {'scattered':>9} {'reduced':>8}"
    print(f"{'GiB of each chip':20} {names} compiled in", flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else MODELS:
            for chip in [options.chip] if options.chip else SLICES:
                for chips in [options.chips] if options.chips else SLICES[chip]:
                    where = f"{name} {chip}:{SLICES[chip][chips]}"
                    figures[where] = plan(Path(folder), name, chip, chips)
                    print(f"{where:20} {line(figures[where])}", flush=True)
    slowest = max(found["compile_seconds"] for found in figures.values())
    print(f"all fit: {all(found['fits'] for found in figures.values())}; slowest {slowest:.0f} s; the bar is 180 s")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
