"""Look at a dataset, filter it, and write what is kept.

    python -m aligner.data rows.jsonl --stats
    python -m aligner.data rows.jsonl --out kept.jsonl --exact --near 0.8 --against HumanEval.jsonl.gz --against TruthfulQA.csv
    python -m aligner.data scored.jsonl --out pairs.jsonl --pairs

Filters are applied in the order of `--help`; each says how many rows it takes out, and which was the first. Rows are written as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligner import arrays
from aligner.commandline import arguments, as_options, check_out, ended, split_of
from aligner.console import counted
from aligner.data import filters, formatters, sources
from aligner.data.samples import TOLD, Bad, Document, Preference, Prompt, Ranked, Stepwise, Supervised, Triple, TwoSided, Unpaired
from aligner.types import UserError

TAKES = (Preference, Ranked, Unpaired, Supervised, Prompt, Document, Stepwise, Triple, TwoSided)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m aligner.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", help="a file, folder or Hub dataset, as config.data.train.path")
    made.add_argument("--out", help="JSONL file to write")
    made.add_argument("--split", help="split of a folder or Hub dataset (default: train)")
    made.add_argument("--subset", help="subset of a Hub dataset")
    made.add_argument("--size", type=int, help="only the first rows")
    made.add_argument("--formatter", default="auto", help="as config.data.train.formatter")
    made.add_argument("--exact", action="store_true", help="the first of rows with the same words")
    made.add_argument("--prompts", action="store_true", help="the first of rows with the same prompt")
    made.add_argument("--near", type=float, help="the first of rows whose 5-grams of words overlap by this share, such as 0.8")
    made.add_argument("--without", action="append", default=[], metavar="WORD", help="rows without this word or phrase; may be repeated")
    made.add_argument("--ascii", type=float, help="rows with at most this share of characters beyond ASCII, such as 0.05")
    made.add_argument("--against", action="append", default=[], metavar="FILE", help="rows that share no run of words with this benchmark")
    made.add_argument("--ngram", type=int, default=13, help="words of such a run")
    made.add_argument("--pairs", action="store_true", help="write the best and the worst of scored answers as chosen and rejected")
    made.add_argument("--stats", action="store_true", help="print how many samples there are and how long they are")
    return made


def section(path: str, **changes: Any) -> Any:
    """A dataset as a config section."""
    from ml_collections import ConfigDict

    given = dict(path=path, split="train", subset=None, image_folder="", sample_by="paragraph", size=None)
    return ConfigDict(given | changes, type_safe=False)


def strings(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def benchmark(paths: list[str], size: int) -> Iterator[str]:
    """The texts of benchmark files that are long enough to know again."""
    for path in paths:
        rows = sources.open_rows(section(path), "against")
        yield from (text for i in range(len(rows)) for text in strings(rows[i]) if len(filters.words_of(text)) >= min(size, 8))


def watched(items: Sequence[Any], title: str) -> Iterator[Any]:
    """The items; where they take their time, how many have been taken is told."""
    with counted(len(items), title) as update:
        for item in items:
            yield item
            update()


def run(args: argparse.Namespace) -> list[str]:
    """Do what the command says; lines for people.

    Raises:
        UserError: bad input, or nothing to do.
    """
    if not (args.out or args.stats):
        raise UserError("nothing to do: give --out FILE for what is kept, or --stats")
    if args.out:
        if Path(args.out).exists():
            raise UserError(f"{args.out} is there already; name another file with --out, or remove it")
        check_out(args.out)
    for option, value, least, most in (("near", args.near, 0.01, 1), ("ascii", args.ascii, 0, 1), ("ngram", args.ngram, 1, 1000)):
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} is {value}; it must be from {least} to {most}")
    split = split_of(args.split, args.data)
    rows = sources.open_rows(section(args.data, split=split, subset=args.subset, size=args.size), "data")
    takes, example = (Ranked,) if args.pairs else TAKES, rows[0] if len(rows) else None
    name, to_sample = formatters.find_formatter(args.formatter, rows.columns(), "data", takes, example=example)
    lines, numbers, samples, dropped = [f"{rows.description}, formatter {name}: {len(rows)} rows"], [], [], {}
    for index in watched(range(len(rows)), f"reading {args.data}"):
        try:
            samples.append(to_sample(rows[index]))
            numbers.append(index)
        except Bad as bad:
            dropped.setdefault(bad.reason, []).append((index, bad.detail))
    why = [f"{reason}: {len(found)} (first row {found[0][0]}: {found[0][1]})" for reason, found in dropped.items()]
    if not samples:
        raise UserError(f"none of the {len(rows)} rows of {rows.description} can be read by the formatter {name}: {'; '.join(why)}")
    lines += [f"  cannot be read, {one}" for one in why]
    asked, whole = zip(*((asked, f"{asked}\n{answered}") for asked, answered in map(filters.texts_of, samples)))
    steps = {
        "--exact": (args.exact, lambda: filters.first_of_equals(watched(whole, "--exact"))),
        "--prompts": (args.prompts, lambda: filters.first_of_equals(watched(asked, "--prompts"))),
        "--near": (args.near, lambda: filters.first_of_similar(watched(whole, "--near"), args.near)),
        "--without": (args.without, lambda: filters.without_words(watched(whole, "--without"), args.without)),
        "--ascii": (args.ascii is not None, lambda: filters.mostly_ascii(watched(whole, "--ascii"), args.ascii)),
        "--against": (args.against, lambda: filters.not_in(watched(whole, "--against"), benchmark(args.against, args.ngram), args.ngram)),
    }
    pairs = [filters.pair_of(sample) for sample in samples] if args.pairs else samples
    steps["--pairs"] = (args.pairs, lambda: np.array([pair is not None for pair in pairs], bool))
    for option, (wanted, keeps) in steps.items():
        if wanted and samples:
            keep = keeps()
            out = np.flatnonzero(~keep)
            lines.append(f"  taken out by {option}: {len(out)}" + (f" (first row {numbers[out[0]]})" if len(out) else ""))
            pick = lambda values, keep=keep: [value for value, kept in zip(values, keep) if kept]
            numbers, samples, asked, whole, pairs = map(pick, (numbers, samples, asked, whole, pairs))
    if args.stats:
        lines += [f"  {key}: {json.dumps(value)}" for key, value in filters.statistics(watched(pairs, "--stats")).items()]
    if args.out:
        with arrays.whole(args.out) as part, part.open("w", encoding="utf-8") as file:
            for place in watched(range(len(numbers)), f"writing {args.out}"):
                file.write(line(rows[numbers[place]], numbers[place], pairs[place] if args.pairs else None))
        lines.append(f"  written: {len(numbers)} rows, {args.out}")
    return lines


def line(row: dict[str, Any], number: int, pair: Preference | None) -> str:
    """A line of the output: the row as it is, or the pair."""
    if pair is not None:
        told = {name: row[name] for name in TOLD if name in row}
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin, **told}
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise UserError(f"row {number} cannot be written as JSON ({error}); filter rows without embedded media") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 2 bad input, 130 Ctrl-C."""
    made = parser()
    args = arguments(made, argv)
    return ended(lambda: print(*run(args), sep="\n"), lambda message: as_options(message, made))


if __name__ == "__main__":
    sys.exit(main())
