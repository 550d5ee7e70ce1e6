"""Score a dataset offline: with a reward or cost model, or with a language model's log-probabilities.

    python -m aligner.score --model runs/reward_tiny/export --data rows.jsonl --out scored.jsonl
    python -m aligner.score --model DIR --data rows.jsonl --out scored.jsonl --kind logprob

Rows are those that are trained on, or what `python -m aligner.generate` writes. Every row of the dataset becomes one line of OUT, in its
order: the row itself, and

    rewards             the score of each of its answers (a pair's are chosen, rejected); --kind reward
    logps, lengths      the log-probability of each answer given the prompt, and its number of tokens; --kind logprob
    not_scored          why a row could not be used, where that is so

A killed run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aligner import by_row
from aligner.types import UserError

ROWS_PER_BLOCK = 256  # read, sorted by length, scored, and written together
COLUMNS = {"reward": ("rewards",), "logprob": ("logps", "lengths")}  # what is written of a row, one number for every answer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser("python -m aligner.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", required=True, help="checkpoint folder or Hub id; for rewards a *ForSequenceClassification folder")
    top.add_argument("--kind", choices=tuple(COLUMNS), default="reward", help="default: %(default)s")
    top.add_argument("--max-length", type=int, default=4096, help="rows longer than so many tokens are not scored (default: %(default)s)")
    by_row.add_arguments(top, "score", "rows")
    return top


def run(args: argparse.Namespace) -> Path:
    """Score a dataset.

    Args:
        args: as `parser` gives them.

    Returns:
        The file that was written.

    Raises:
        UserError: bad input, or a half-written file of another command stands in the way.
    """
    import jax

    from aligner import convert, sharding
    from aligner.console import bar, say
    from aligner.data import loader, sources
    from aligner.data.formatters import find_formatter
    from aligner.data.samples import Answers, Preference, Ranked, Supervised, Unpaired
    from aligner.models import attention

    out = Path(args.out)
    by_row.check(args, ("max_length",))
    model, disk = by_row.open_model(args)
    if model.has_score_head != (args.kind == "reward"):
        has, other = ("a score head", "reward") if model.has_score_head else ("no score head", "logprob")
        raise UserError(f"{args.model} has {has}: use --kind {other}, or another --model")
    rows = sources.open_rows(by_row.source(args), "data")
    kinds = (Answers, Preference, Ranked, Unpaired, Supervised)
    example = rows[0] if len(rows) else None
    name, to_sample = find_formatter(args.formatter, rows.columns(), "data", kinds, by_row.template_of(args), example)
    loader.check_assets(model)
    partial = out.with_name(out.name + ".partial")
    described = by_row.inputs(model, disk, rows, name) | settings(args)
    mesh = sharding.make_mesh({"data": -1, "fsdp": args.fsdp})
    size = -(-args.batch_size // mesh.size) * mesh.size
    with (
        by_row.going_on(partial, described, ROWS_PER_BLOCK) as done,
        jax.set_mesh(mesh),
        attention.BACKEND(attention.chosen(mesh)),
    ):
        say(f"{rows.description}, formatter {name}: {len(rows)} rows" + (f", {done} of them done before" if done else ""))
        shardings = sharding.param_shardings(convert.abstract_params(model), model.sharding_rules, mesh)
        params = convert.load_params(model, disk, args.dtype, shardings)
        score = make_score(model, args.kind)
        with bar(len(rows), "scoring", "row", done) as progress, partial.open("a", encoding="utf-8") as file:
            for start in range(done, len(rows), ROWS_PER_BLOCK):
                block = range(start, min(start + ROWS_PER_BLOCK, len(rows)))
                found: dict[int, dict] = {}
                for ids, batch in batches(block, rows, to_sample, model, args.max_length, size, args.video_frames, found):
                    found |= dict(zip(ids, score(params, jax.device_put(batch, sharding.batch_sharding(mesh)))))
                    progress.update(len(ids))
                progress.update(block[-1] + 1 - progress.n)  # those that could not be scored
                file.write("".join(line(rows[i], found[i], args.kind) for i in block))
                file.flush()
        os.replace(partial, out)
        partial.with_suffix(".settings").unlink()
    failed = [record["not_scored"] for record in by_row.records(out) if "not_scored" in record]
    say(*by_row.told(failed, len(rows), "scored"))
    return out


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers, so that a file is not continued with others."""
    return {name: getattr(args, name) for name in ("kind", "image_folder", "max_length", "dtype", "video_frames", "template")}


def answers_of(sample: Any) -> tuple[Any, tuple]:
    """(prompt, answers) of a sample of any kind."""
    from aligner.data.samples import Answers, Bad, Preference, Ranked, Supervised, Unpaired, is_conversation

    match sample:
        case Preference():
            return sample.prompt, (sample.chosen, sample.rejected)
        case Ranked() | Answers():
            return sample.prompt, tuple(sample.completions)
        case Unpaired():
            return sample.prompt, (sample.completion,)
        case Supervised(conversation=text, prompt=prompt):
            if prompt:
                return prompt, (text,)
            if is_conversation(text) and len(text) > 1 and text[-1]["role"] == "assistant":
                return text[:-1], (text[-1:],)
    raise Bad("no answer", "the row does not end with the assistant's message")


def batches(block: range, rows: Any, to_sample: Any, model: Any, max_length: int, size: int, frames: int, found: dict) -> Iterator[tuple]:
    """(row numbers, batch of `size` rows) for the rows of a block, rows of like length together; what cannot be used goes into `found`."""
    from concurrent.futures import ThreadPoolExecutor

    from aligner.data import layout, modalities, templates
    from aligner.data.samples import Bad
    from aligner.models.decoder import outgrown
    from aligner.models.pictures import fill

    model = modalities.looking_in(model, rows.folder, frames)

    def encode(i: int):
        try:
            sample = to_sample(rows[i])
            prompt, answers = answers_of(sample)
            encoded = templates.encode_answers(prompt, answers, model.assets, model.media, sample.template, distinct=False)
            length = len(encoded.prompt) + max(map(len, encoded.answers))
            if length > max_length:
                raise Bad("too long", f"{length} tokens, --max-length is {max_length}")
            return i, encoded, modalities.load(encoded.media, model)
        except Bad as bad:
            found[i] = {"not_scored": str(bad)}

    def shares(one: templates.Encoded) -> bool:  # a prompt that a long answer would turn otherwise is each answer's own
        return outgrown(model, *np.array([[len(one.prompt)], [len(one.prompt) + max(map(len, one.answers))]])) is None

    shape = lambda one: layout.shape_of(one, shares(one))
    with ThreadPoolExecutor(8) as pool:
        encoded = sorted(filter(None, pool.map(encode, block)), key=lambda item: shape(item[1]))
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        # powers of two, so that few shapes are compiled
        T, S, I = (1 << int(most - 1).bit_length() if most else 0 for most in map(max, zip(*(shape(e) for _, e, _ in part))))
        made = []
        for i, one, seen in part:
            made.append(layout.pair_row(one, T, S, I, model.media, shares(one), example_id=i))
            fill(made[-1], seen, model.media)
        made += [layout.empty_row(T, S, I, model.media)] * (size - len(made))
        yield [i for i, *_ in part], {name: np.stack([row[name] for row in made]) for name in made[0]}


def make_score(model: Any, kind: str) -> Any:
    """(params, batch) -> for every row of the batch what is written of it."""
    from aligner.likelihood import make_likelihood, make_scorer
    from aligner.train_step import jit

    @functools.cache
    def compiled(answers: int):
        likelihood = (make_scorer if kind == "reward" else make_likelihood)(model, answers)
        return jit(lambda params, batch: likelihood(params, batch, None))

    def score(params: Any, batch: dict) -> list[dict]:
        most = int(batch["score_role"].max())
        scores = compiled(1 << (most - 1).bit_length())(params, batch)
        lengths = np.asarray(scores.lengths)[:, 0].astype(int)
        values = (scores.values,) if kind == "reward" else (scores.logps, lengths[:, None])
        columns = {name: np.asarray(value)[:, 0] for name, value in zip(COLUMNS[kind], values)}
        return [{name: column[b][: (n > 0).sum()].tolist() for name, column in columns.items()} for b, n in enumerate(lengths)]

    return score


def line(row: dict[str, Any], found: dict[str, Any], kind: str) -> str:
    """A line of the output: the row, without what an earlier scoring wrote of it, and what was found now."""
    kept = {name: value for name, value in by_row.json_able(row).items() if name not in (*COLUMNS[kind], "not_scored")}
    return json.dumps({**kept, **found}, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    return by_row.main(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
