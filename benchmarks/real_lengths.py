"""Training on rows of log-normal lengths, as chat data has them: aligner's packed rows against TRL's trainers on the same rows.

    python -m benchmarks.real_lengths --cases sft dpo kto reward --rounds 3

Llama as in benchmarks/dpo_step.py, float32. Prompts and answers have log-normal lengths (medians 60 and 110 tokens, sigma 0.7), at most 512
together. What is timed is one pass over all rows by training steps alone: forward, reference in the step where there is one, backward,
clipping, AdamW; data loading lies outside on both sides. TRL pads each batch of 4 pairs, or 8 rows, to its longest; "sft" is TRL's packing
(`packing=True`, "bfd") against ours, in rows of 512. KTO's rows cannot be packed here, and are padded to the longest of all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aligner.hugepages import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides
from benchmarks.dpo_step import SHAPE

PAIRS, LONGEST, BATCH = 24, 512, 4
CASES = ("sft", "dpo", "kto", "reward")
SIDES = ("TRL", "aligner")


def rows_of(case: str) -> list[dict]:
    """Rows of strings in TRL's formats."""
    rng = np.random.default_rng(0)
    words = lambda n: " ".join(f"w{i}" for i in rng.integers(4, SHAPE["vocabulary"], n))
    length = lambda median: int(np.clip(median * np.exp(0.7 * rng.standard_normal()), 4, LONGEST // 2 - 2))
    pairs = [{"prompt": words(length(60)), "chosen": " " + words(length(110)), "rejected": " " + words(length(110))} for _ in range(PAIRS)]
    if case == "sft":
        return [{"text": pair["prompt"] + pair[answer]} for pair in pairs for answer in ("chosen", "rejected")]
    if case == "kto":
        answers = [("chosen", True), ("rejected", False)]
        return [{"prompt": pair["prompt"], "completion": pair[answer], "label": label} for pair in pairs for answer, label in answers]
    return pairs


def trl_epochs(case: str, folder: Path, answer: Callable[..., None]) -> None:
    """Train for ever; `answer` is called after each pass over the rows with its seconds and CPU seconds."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        spent, start = np.zeros(2), None
        now = staticmethod(lambda: np.array([time.perf_counter(), time.process_time()]))

        def on_epoch_begin(self, *args, **kwargs):
            self.spent = np.zeros(2)

        def on_step_begin(self, *args, **kwargs):
            self.start = self.now()

        def on_step_end(self, *args, **kwargs):
            self.spent = self.spent + self.now() - self.start

        def on_epoch_end(self, *args, **kwargs):
            answer(*self.spent)

    rows = rows_of(case)
    config, trainer, more = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, dict(packing=True, max_length=LONGEST, per_device_train_batch_size=BATCH)),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, dict(max_length=None, beta=torch_sides.BETA, per_device_train_batch_size=BATCH)),
        "kto": (trl.KTOConfig, trl.KTOTrainer, dict(max_length=None, beta=torch_sides.BETA, per_device_train_batch_size=2 * BATCH)),
        "reward": (trl.RewardConfig, trl.RewardTrainer, dict(max_length=None, per_device_train_batch_size=BATCH)),
    }[case]
    load = AutoModelForCausalLM.from_pretrained
    models = dict(model=load(folder))
    if case in ("dpo", "kto"):
        models["ref_model"] = load(folder)
    if case == "reward":
        models["model"] = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with tempfile.TemporaryDirectory() as out:
        args = config(
            out, use_cpu=True, bf16=False, gradient_checkpointing=False, num_train_epochs=10**6, lr_scheduler_type="constant",
            learning_rate=torch_sides.LEARNING_RATE, max_grad_norm=torch_sides.MAX_GRAD_NORM, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, **more,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer(**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]).train()


def aligner_epoch(case: str, folder: Path) -> Callable[[], float]:
    """A function that makes one pass over the rows."""
    from aligner import algorithms, convert
    from aligner.data import loader
    from benchmarks.aligner_side import make_config, make_steps

    config = make_config("float32", case)
    config.data.train.path = str(folder / "rows.jsonl")
    config.data.max_length = LONGEST
    config.data.packing = case != "kto"
    config.data.packed_length = {"sft": LONGEST, "dpo": 1024, "reward": 1024}.get(case)
    config.data.batch_size = {"sft": BATCH, "kto": 2 * BATCH}.get(case, 1)
    Path(config.data.train.path).write_text("".join(json.dumps(row) + "\n" for row in rows_of(case)))
    model, disk = convert.open_model(folder, score_head=case == "reward")
    params = convert.load_params(model, disk)
    algorithm = algorithms.make(config, model)
    dataset = loader.load_dataset(config, "train", model, algorithm.needs, progress=False)
    print(*dataset.report, sep="\n", flush=True)
    batches = [*loader.batches(dataset, config.data.batch_size, seed=0, shuffle=True, epochs=1)]
    return make_steps(config, model, params, batches, folder if case in ("dpo", "kto") else None)


def serve(name: str, case: str, folder: Path) -> None:
    """The process of one side."""
    if name == "aligner":
        restart_with_huge_pages()
        import benchmarks.aligner_side  # noqa: F401
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401
    answer = sides.answering(machine.resident_mib())
    if name == "TRL":
        trl_epochs(case, folder, answer)
    sides.serve(aligner_epoch(case, folder), answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cases[0], options.folder)
    print(machine.cpu_name())
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            torch_sides.make_checkpoint(Path(folder), **SHAPE)
            rest = ["--cases", case, "--folder", folder]
            found = sides.take_turns({name: ["benchmarks.real_lengths", "--serve", name, *rest] for name in SIDES}, options.rounds)
        wall, cpu = (sides.ratio(found, "TRL", "aligner", key) for key in ("seconds", "cpu_seconds"))
        memory = ", ".join(f"{name} {max(answer['net'] for answer in rounds):.0f} MiB" for name, rounds in found.items())
        print(f"{case}: time(TRL) / time(aligner) {wall:.2f}, of CPU time {cpu:.2f}; net peak memory {memory}", flush=True)


if __name__ == "__main__":
    main()
