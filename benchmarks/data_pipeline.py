"""The text pipeline, rows per second and memory: `aligner.data` against TRL's preprocessing of the same rows, in turns, in one run.

    python -m benchmarks.data_pipeline                 # conversations with masks (SFT) and pairs (DPO)
    python -m benchmarks.data_pipeline --memory 5      # a 5 GB JSONL of the same rows: resident memory while it is read

aligner's time is from the file to the last batch of an epoch: census (format, render, tokenise, mask), token ids on disk, and all batches
as padded arrays. TRL's is loading the same file and its trainer's `_prepare_dataset`, without collating. Both have the same tokenizer, a
byte-level BPE trained on the rows, and the same chat template with {% generation %} marks. A round runs all sides one after another.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.machine import cpu_name, forget_peak, resident_mib

VOCABULARY = 8000


def write_rows(path: Path, kind: str, count: int, turns: int = 3, seed: int = 0) -> None:
    """Conversations of up to so many turns, or pairs, of words whose frequencies fall as in a language; about 0.5 kB a turn."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "on")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    pool = draw.choices(words, weights, k=1 << 20)

    def text(length: int) -> str:
        start = draw.randrange(len(pool) - length)
        return " ".join(pool[start : start + length]).capitalize() + ".\n"

    def said(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": text(draw.randint(least, most))}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            talk = [message for _ in range(draw.randint(1, turns)) for message in (said("user", 5, 40), said("assistant", 20, 160))]
            row = {"messages": talk}
            if kind == "dpo":
                row = {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [said("assistant", 20, 160)]}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(path: Path):
    """A byte-level BPE tokenizer trained on the rows, with a ChatML template that marks what the assistant writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from aligner.data.catalogue import template

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with path.open(encoding="utf-8") as lines:
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator((line for line, _ in zip(lines, range(500))), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = template("chatml")
    return made


def config_of(path: Path):
    from configs import common

    config = common.base()
    config.data.train.path = str(path)
    config.data.max_length = 1 << 20
    return config


Seconds = tuple[float, float]  # by the clock on the wall, by the processor (all threads)


def clock() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    return time.perf_counter() - start[0], time.process_time() - start[1]


def aligner_side(path: Path, kind: str, tokenizer, folder: Path, batch: int = 16) -> Seconds:
    """The census and an epoch of batches."""
    from aligner.data.loader import eval_batches, load_dataset

    model = SimpleNamespace(family="llama", media=None, assets=SimpleNamespace(tokenizer=tokenizer, processor=None))
    start = clock()
    needs = {"sft": "supervised", "dpo": "preference"}[kind]
    dataset = load_dataset(config_of(path), "train", model, needs, cache_dir=folder, progress=False)
    for made in eval_batches(dataset, batch):
        assert len(made["tokens"]) == batch
    return since(start)


def trl_side(path: Path, kind: str, tokenizer, folder: Path) -> Seconds:
    """Loading and preprocessing."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = dict(output_dir=str(folder), use_cpu=True, bf16=False, max_length=None, report_to="none")
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    start = clock()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
    if kind == "sft":
        SFTTrainer._prepare_dataset(trainer, rows, tokenizer, SFTConfig(assistant_only_loss=True, **options), False, None, "train")
    else:
        DPOTrainer._prepare_dataset(trainer, rows, tokenizer, DPOConfig(**options), "train")
    return since(start)


def compare(kind: str, count: int, rounds: int) -> dict[str, object]:
    """Rows per second of both sides, the median over rounds, and how many times TRL's time aligner's goes into, in each round."""
    import datasets

    datasets.disable_progress_bars()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.jsonl"
        write_rows(path, kind, count)
        tokenizer = make_tokenizer(path)
        write_rows(folder / "few.jsonl", kind, 30)  # imports and compiled templates are no side's work
        aligner_side(folder / "few.jsonl", kind, tokenizer, folder / "ours")
        trl_side(folder / "few.jsonl", kind, tokenizer, folder / "trl")
        for number in range(rounds):
            ours.append(aligner_side(path, kind, tokenizer, folder / f"ours{number}"))
            theirs.append(trl_side(path, kind, tokenizer, folder / f"trl{number}"))
    rate = lambda times: round(count / statistics.median(wall for wall, _ in times), 1)
    ratios = lambda which: [round(b[which] / a[which], 2) for a, b in zip(ours, theirs)]
    return {"aligner, rows/s": rate(ours), "TRL, rows/s": rate(theirs), "ratio by the wall": ratios(0), "ratio by the processor": ratios(1)}


def memory(gigabytes: float, take: int) -> dict[str, float]:
    """Resident MiB at its highest while a JSONL of this size is opened, a census taken of every row, and rows from everywhere are encoded.

    The census reads, formats, counts and stores each row; only tokenising, which keeps nothing from row to row, is left to `take` rows.
    """
    from aligner.data import census, mixture
    from aligner.data.kinds import ENCODERS

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        write_rows(path, "sft", 1000)
        tokenizer = make_tokenizer(path)
        block = path.read_bytes()
        with path.open("wb") as file:
            for _ in range(max(1, int(gigabytes * 1e9 / len(block)))):
                file.write(block)
        model = SimpleNamespace(family="llama", media=None, assets=SimpleNamespace(tokenizer=tokenizer, processor=None))
        config, kind = config_of(path), ENCODERS["supervised"]
        forget_peak()
        before, start = resident_mib(), time.perf_counter()
        rows = mixture.open_samples(config.data.train, "data.train", kind, seed=0)
        opened = time.perf_counter() - start
        example = kind.encode(rows.read(0), model, config.data)
        example = example._replace(answers=(example.answers[0][:8],), scored=(example.scored[0][:8],))

        def steps(index: int):
            rows.read(index)
            return example
            yield

        found = census.take_census(steps, rows, model, None, "data.train", cache_dir=Path(name) / "cache", workers=1, progress=False)
        seconds = time.perf_counter() - start - opened
        for index in random.Random(0).sample(range(len(rows)), take):
            kind.encode(rows.read(index), model, config.data)
        return {
            "file, GB": round(path.stat().st_size / 1e9, 2),
            "rows": len(found.row_ids),
            "before, MiB": round(before),
            "peak, MiB": round(resident_mib(peak=True)),
            "opened, s": round(opened),
            "census, s": round(seconds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0, help="gigabytes of a file to read instead; its memory is measured")
    parser.add_argument("--take", type=int, default=1000, help="rows to encode after the census, with --memory")
    args = parser.parse_args()
    print(cpu_name())
    if args.memory:
        print(json.dumps(memory(args.memory, args.take)))
        return
    for kind in ("sft", "dpo"):
        print(kind, json.dumps(compare(kind, args.rows, args.rounds)))


if __name__ == "__main__":
    main()
