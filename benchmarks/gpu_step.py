"""Training steps of Llamas of real size on one GPU: aligner beside TRL, the same rows, on the same card in the same run.

    python -m benchmarks.gpu_step --json gpu_step.json                              # SFT and DPO of 1 B in full
    python -m benchmarks.gpu_step --size 8b --lora 16 --remat full
    python -m benchmarks.gpu_step --size tiny --length 128 --rows 2 --attention auto    # tries the script on a CPU

bfloat16, rows of 4096 tokens: for SFT all of them learned, for DPO a prompt of half a row and two answers of a quarter each, the reference
computed in the step. A full fine-tune has float32 master weights and moments on both sides; with --lora the base is bfloat16. TRL runs
its own loop with flash attention (torch's, or flash-attn's where it is installed), its own head, and gradient checkpointing where aligner
recomputes. Each side is a process of its own that takes turns of a few steps; peak memory is the allocator's. Of a step's operations
all matrix products are counted once, attention's over the causal half: what is recomputed is not, and DPO counts the prompt once for each
answer and the reference's pass, for both sides alike, though aligner computes the prompt once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import sides, torch_sides

SHAPES = {
    "tiny": dict(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, vocabulary=1000),
    "1b": dict(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, rope_theta=5e5),
    "3b": dict(hidden=3072, layers=28, heads=24, kv_heads=8, intermediate=8192, vocabulary=128256, rope_theta=5e5),
    "8b": dict(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256, rope_theta=5e5),
}
CASES, SIDES = ("sft", "dpo"), ("TRL", "aligner")
PEAK = {"H100": 989, "H200": 989, "A100": 312}  # TFLOP/s of dense bfloat16 products, by the makers' data sheets


def rows_of(case: str, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Token ids: `prompt, completion`, or `prompt, chosen, rejected`; answers to a prompt end with EOS, as TRL appends it."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(4, SHAPES[options.size]["vocabulary"], n).tolist()
    if case == "sft":
        return [{"prompt": draw(1), "completion": draw(options.length - 1)} for _ in range(options.rows)]
    answer = lambda: [*draw(options.length // 4 - 1), 2]
    return [{"prompt": draw(options.length // 2), "chosen": answer(), "rejected": answer()} for _ in range(options.rows)]


def operations(case: str, options: argparse.Namespace) -> float:
    """TFLOP of a step: 2 a weight and token forwards, 4 backwards (2 where the weights are frozen), attention over the causal half."""
    s = SHAPES[options.size]
    width = s["hidden"] // s["heads"]
    layer = s["hidden"] * width * (2 * s["heads"] + 2 * s["kv_heads"]) + 3 * s["hidden"] * s["intermediate"]
    length, rows, answer = (options.length, 1, options.length) if case == "sft" else (options.length * 3 // 4, 2, options.length // 4)
    products = 2 * (s["layers"] * layer * length + s["hidden"] * s["vocabulary"] * answer)
    attention = s["layers"] * 2 * length * length * s["hidden"]  # twice 2 T^2 H, halved
    passes = (2 if options.lora else 3) * products + 3 * attention
    if case == "dpo":
        passes += products + attention
    return passes * rows * options.rows / 1e12


def make_folder(folder: Path, options: argparse.Namespace) -> None:
    """A random checkpoint in bfloat16."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    torch_sides.make_checkpoint(folder, **SHAPES[options.size])


def trl_steps(case: str, folder: Path, options: argparse.Namespace, answer: Callable[..., None]) -> None:
    """TRL's own loop."""
    import importlib.util

    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    kernel = "flash_attention_2" if cuda and importlib.util.find_spec("flash_attn") else "sdpa"
    dtype = torch.bfloat16 if options.lora else torch.float32
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernel)
    wait = torch.cuda.synchronize if cuda else lambda: None

    peak = lambda: torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    clock = torch_sides.step_clock(lambda *spent: answer(*spent, dict(peak=peak(), kernel=kernel)), wait)
    rows = rows_of(case, options)
    if case == "sft":
        config, trainer, more = trl.SFTConfig, trl.SFTTrainer, dict(max_length=options.length)
        rows, models = [{"input_ids": row["prompt"] + row["completion"]} for row in rows], {}
    else:
        words = lambda ids: " ".join(f"w{i}" for i in ids if i != 2)
        rows = [{"prompt": words(r["prompt"]), **{key: " " + words(r[key]) for key in ("chosen", "rejected")}} for r in rows]
        config, trainer, more = trl.DPOConfig, trl.DPOTrainer, dict(max_length=None, beta=torch_sides.BETA)
        models = {} if options.lora else {"ref_model": load()}
    if options.lora:
        from peft import LoraConfig

        models["peft_config"] = LoraConfig(r=options.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        args = config(
            out, use_cpu=not cuda, bf16=True, gradient_checkpointing=options.remat != "none", per_device_train_batch_size=options.rows,
            max_steps=10**6, learning_rate=torch_sides.LEARNING_RATE, lr_scheduler_type="constant", report_to="none", save_strategy="no",
            max_grad_norm=torch_sides.MAX_GRAD_NORM, logging_strategy="no", disable_tqdm=True, **more,
        )  # fmt: skip
        models |= dict(model=load(), processing_class=AutoTokenizer.from_pretrained(folder))
        trainer(args=args, train_dataset=Dataset.from_list(rows), callbacks=[clock], **models).train()


def aligner_steps(case: str, folder: Path, options: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """A function that takes a step, as `aligner.run` builds it."""
    import jax

    from aligner import convert, lora
    from aligner.convert import peft
    from aligner.run import attach, load
    from benchmarks.aligner_side import make_batch, make_config, make_steps, one_device

    config = make_config("bfloat16", case)
    config.model.attention, config.train.remat, config.lora.rank = options.attention, options.remat, options.lora
    config.lora.targets = ("all-linear",) if options.lora else ()
    config.reference.kind = "base" if options.lora else "copy"
    mesh = one_device(config)
    model, disk = convert.open_model(folder)
    abstract = convert.abstract_params(model)
    adapters, start = peft.plan(config, model, abstract)
    if adapters:
        abstract = jax.eval_shape(lambda params: attach(config, model, params, adapters, start), abstract)
    params = load(config, model, disk, mesh, lora.split(abstract, config.optim.freeze, adapters)[0])
    if adapters:
        params = attach(config, model, params, adapters, start, mesh)
    batch = make_batch(rows_of(case, options), shared_prompt=True)
    step = make_steps(config, model, params, [batch], folder if case == "dpo" and not options.lora else None, adapters)
    del params

    def one() -> dict[str, Any]:
        loss = step()
        return dict(loss=loss, peak=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, kernel=options.attention)

    return one


def serve(name: str, case: str, folder: Path, options: argparse.Namespace) -> None:
    """The process of one side."""
    answer = sides.answering(0.0, options.turn)
    if name == "TRL":
        trl_steps(case, folder, options, answer)
    sides.serve(aligner_steps(case, folder, options), answer)


def card() -> str:
    """The GPU's name, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: what follows says that the script runs, and nothing else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--size", default="1b", choices=SHAPES)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="rows, or pairs, of a step")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains everything")
    parser.add_argument("--remat", default="none", help="config.train.remat; TRL checkpoints where this is not none")
    parser.add_argument("--attention", default="cudnn", help="config.model.attention")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=int, default=5, help="steps that a side takes in a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cases[0], options.folder, options)
    result = {"card": card(), "options": {key: value for key, value in vars(options).items() if isinstance(value, (int, str))}, "cases": {}}
    print(result["card"])
    peak = next((rate for name, rate in PEAK.items() if name in result["card"]), float("nan"))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the card is shared by both sides
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), options)
        kept = ("size", "length", "rows", "lora", "remat", "attention", "turn")
        rest = ["--folder", folder, *(word for key in kept for word in (f"--{key}", str(getattr(options, key))))]
        for case in options.cases:
            commands = {name: ["benchmarks.gpu_step", "--serve", name, "--cases", case, *rest] for name in SIDES}
            found = sides.take_turns(commands, options.rounds)
            work, tokens = operations(case, options), options.rows * options.length * (1 if case == "sft" else 1.5)
            print(f"\n{case}, {options.size}, {work:.1f} TFLOP and {tokens:.0f} tokens a step, median of {options.rounds} rounds")
            figures = result["cases"][case] = {}
            for name, rounds in found.items():
                seconds = sorted(answer["seconds"] for answer in rounds)[len(rounds) // 2]
                figures[name] = dict(
                    seconds=seconds, tokens_per_second=tokens / seconds, tflops=work / seconds, mfu=work / seconds / peak,
                    peak_gib=max(answer["result"]["peak"] for answer in rounds), attention=rounds[0]["result"]["kernel"],
                    faster=sides.ratio(found, "TRL", name), rounds=[answer["seconds"] for answer in rounds],
                )  # fmt: skip
                print("{:8} {seconds:8.3f} s  {tokens_per_second:9.0f} tokens/s  MFU {mfu:.1%}  peak {peak_gib:.1f} GiB  {attention}  "
                      "TRL / side {faster:.2f}".format(name, **figures[name]), flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
