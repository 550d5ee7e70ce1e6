"""Training on rows of log-normal lengths, as chat data has them: aligner's packed rows against TRL's trainers on the same rows.

    python -m benchmarks.real_lengths --cases sft dpo kto reward --rounds 3

Llama as in benchmarks/dpo_step.py, float32. Prompts and answers have log-normal lengths with the medians and spreads of Anthropic's
hh-rlhf ("harmless", 1200 rows): 88 tokens and sigma 1.14 of a prompt, 37 and 0.88 of an answer; a prompt with its answer is at most 1024,
the `max_length` of TRL's trainers. What is timed is one pass over all rows by training steps alone: forward, reference in the step where
there is one, backward, clipping, AdamW; data loading lies outside on both sides. TRL pads each batch of 8 pairs, or 16 rows with a label,
to its longest (8 is its default); here about as many stand in two packed rows of 1024 columns. "sft" is TRL's packing (`packing=True`,
"bfd") against ours, two rows of 1024 a batch on both sides; "sft_8" is the same with eight, TRL's default. Tunix cannot pack: its batches
of 8 rows or pairs are padded to their longest, up to a multiple of 128 tokens, so that it compiles but a few shapes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aligner.allocator import restart_with_huge_pages
from benchmarks import machine, sides, torch_sides
from benchmarks.dpo_step import SHAPE
from benchmarks.tunix_step import ROPE_THETA

LONGEST, BATCH = 1024, 8  # columns; pairs of a batch
ROWS = {"sft": 2, "sft_8": 8, "dpo": 2, "kto": 2, "reward": 2}  # packed rows of a batch
PAIRS = {"sft": 51, "sft_8": 37, "dpo": 30, "kto": 26, "reward": 48}  # as many as fill whole batches of packed rows
PROMPT, ANSWER = (88, 1.14), (37, 0.88)  # medians and sigmas of lengths in tokens
CASES = ("sft", "dpo", "kto", "reward")
TUNIX = ("sft", "dpo")  # what Tunix has
SIDES = ("TRL", "Tunix", "aligner")


def rows_of(case: str) -> list[dict]:
    """Rows of strings in TRL's formats."""
    rng = np.random.default_rng(0)
    words = lambda n: " ".join(f"w{i}" for i in rng.integers(4, SHAPE["vocabulary"], n))
    length = lambda median, sigma: int(np.clip(median * np.exp(sigma * rng.standard_normal()), 4, LONGEST // 2 - 2))
    pair = lambda: {"prompt": words(length(*PROMPT)), "chosen": " " + words(length(*ANSWER)), "rejected": " " + words(length(*ANSWER))}
    pairs = [pair() for _ in range(PAIRS[case])]
    if case.startswith("sft"):
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
        "sft": (trl.SFTConfig, trl.SFTTrainer, dict(packing=True, max_length=LONGEST, per_device_train_batch_size=ROWS[case])),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, dict(max_length=None, beta=torch_sides.BETA, per_device_train_batch_size=BATCH)),
        "kto": (trl.KTOConfig, trl.KTOTrainer, dict(max_length=None, beta=torch_sides.BETA, per_device_train_batch_size=2 * BATCH)),
        "reward": (trl.RewardConfig, trl.RewardTrainer, dict(max_length=None, per_device_train_batch_size=BATCH)),
    }[case.removesuffix("_8")]
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


def tunix_batches(case: str) -> list[list[dict[str, list[int]]]]:
    """The rows as token ids, 8 a batch. Of a text the first token is the prompt, because nothing can predict it."""
    ids = lambda text: [int(word[1:]) for word in text.split()]
    texts = [{key: ids(text) for key, text in row.items()} for row in rows_of(case)]
    rows = [{"prompt": row["text"][:1], "completion": row["text"][1:]} for row in texts] if case == "sft" else texts
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def aligner_epoch(case: str, folder: Path) -> Callable[[], float]:
    """A function that makes one pass over the rows."""
    from aligner import algorithms, convert
    from aligner.data import loader
    from benchmarks.aligner_side import make_config, make_steps

    config = make_config("float32", case.removesuffix("_8"))
    config.data.train.path = str(folder / "rows.jsonl")
    config.data.max_length = LONGEST
    config.data.packing, config.data.packed_length, config.data.batch_size = True, LONGEST, ROWS[case]
    Path(config.data.train.path).write_text("".join(json.dumps(row) + "\n" for row in rows_of(case)))
    model, disk = convert.open_model(folder, score_head=case == "reward")
    params = convert.load_params(model, disk)
    algorithm = algorithms.make(config, model)
    dataset = loader.load_dataset(config, "train", model, algorithm.needs, progress=False)
    print(*dataset.report, sep="\n", flush=True)
    batches = [*loader.batches(dataset, config.data.batch_size, seed=0, shuffle=True, epochs=1)]
    return make_steps(config, model, params, batches, folder if case in ("dpo", "kto") else None)


def serve(name: str, case: str, folder: Path, turn: int) -> None:
    """The process of one side."""
    if name == "Tunix":
        from benchmarks import tunix_side

        return tunix_side.train(case, folder, tunix_batches(case), "float32", sides.answering(machine.resident_mib(), turn), multiple=128)
    if name == "aligner":
        restart_with_huge_pages()
        import benchmarks.aligner_side  # noqa: F401
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401
    answer = sides.answering(machine.resident_mib(), turn)
    if name == "TRL":
        trl_epochs(case, folder, answer)
    sides.serve(aligner_epoch(case, folder), answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=ROWS)
    parser.add_argument("--sides", nargs="+", default=("TRL",), choices=SIDES[:-1], help="beside aligner")
    parser.add_argument("--tunix-python", metavar="PATH", help="the interpreter of the environment that has Tunix 0.1.7")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=int, default=1, help="passes that a side makes in a turn")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # the process of one side
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.cases[0], options.folder, options.turn)
    if "Tunix" in options.sides and (not options.tunix_python or not {*options.cases} <= {*TUNIX}):
        parser.error(f"Tunix needs --tunix-python, and has {' and '.join(TUNIX)} of the cases")
    print(machine.cpu_name())
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            torch_sides.make_checkpoint(Path(folder), **SHAPE, rope_theta=ROPE_THETA)
            rest = ["--cases", case, "--folder", folder, "--turn", str(options.turn)]
            commands = {name: ["benchmarks.real_lengths", "--serve", name, *rest] for name in (*options.sides, "aligner")}
            found = sides.take_turns(commands, options.rounds, interpreters={"Tunix": options.tunix_python})
        memory = ", ".join(f"{name} {max(answer['net'] for answer in rounds):.0f} MiB" for name, rounds in found.items())
        for other in options.sides:
            wall, cpu = (sides.ratio(found, other, "aligner", key) for key in ("seconds", "cpu_seconds"))
            rounds = ", ".join(f"{a['seconds'] / b['seconds']:.2f}" for a, b in zip(found[other], found["aligner"]))
            print(f"{case}: time({other}) / time(aligner) {wall:.2f} ({rounds}), of CPU time {cpu:.2f}")
        print(f"{case}: net peak memory {memory}", flush=True)


if __name__ == "__main__":
    main()
