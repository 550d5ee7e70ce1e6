"""What the commands share that write a line for every row of a dataset (`aligner.score`, `aligner.generate`): arguments, and going on."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aligner import locks
from aligner.commandline import arguments, as_options, check_named, ended, split_of
from aligner.data.samples import MEDIA, TOLD
from aligner.types import Model, UserError


def add_arguments(top: argparse.ArgumentParser, doing: str, batch: str) -> None:
    """The arguments that say where rows come from and how they are computed.

    Args:
        doing: what happens to a row, in an imperative: "score".
        batch: what --batch-size counts.
    """
    add = top.add_argument
    add("--data", required=True, help="file of rows (JSON, JSONL, CSV, Parquet, Arrow, text), a folder of them, or a Hub dataset id")
    add("--out", required=True, help="file to write, .jsonl; must not exist yet")
    add("--split", help="split of a folder or Hub dataset (default: train)")
    add("--revision", help="of the model on the Hub")
    add("--chat-template", default="", help="a .jinja file, Jinja text or a name, as config.data.chat_template (default: the model's own)")
    add("--template", default="{}", help="JSON object: arguments for the chat template of all rows, as config.data.train.template")
    add("--formatter", default="auto", help="how a row is read, as in configs (default: %(default)s)")
    add("--image-folder", default="", help="images, clips and sounds named in rows are looked up here (default: the folder of the file)")
    add("--video-frames", type=int, default=8, help="frames taken of a video, evenly (default: %(default)s)")
    add("--size", type=int, help=f"{doing} only the first rows")
    add("--batch-size", type=int, default=16, help=f"{batch} at once on all devices (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation (default: %(default)s)")
    add("--fsdp", type=int, default=1, help="devices over which the parameters are split (default: %(default)s)")


def check(args: argparse.Namespace, counts: Sequence[str]) -> None:
    """Raises UserError where the output is there already, or one of the `counts` is below 1."""
    check_named(args.out)
    if Path(args.out).exists():
        raise UserError(f"{args.out} is there already; name another file with --out, or remove it")
    for name in ("batch_size", "fsdp", "video_frames", *counts):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def open_model(args: argparse.Namespace) -> tuple[Model, Any]:
    """The model, with the chat template that was asked for, and its checkpoint."""
    from ml_collections import ConfigDict

    from aligner import convert
    from aligner.data.catalogue import with_template

    model, disk = convert.open_model(args.model, args.revision)
    return with_template(model, ConfigDict({"chat_template": args.chat_template})), disk


def template_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the chat template of all rows.

    Raises:
        UserError: they are no JSON object.
    """
    try:
        found = json.loads(args.template)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--template is {args.template!r}; it must be a JSON object, such as '{{\"enable_thinking\": false}}'")
    return found


def source(args: argparse.Namespace) -> Any:
    """The dataset as a config section."""
    from ml_collections import ConfigDict

    split = split_of(args.split, args.data)
    return ConfigDict(dict(path=args.data, split=split, subset=None, image_folder=args.image_folder, size=args.size))


def inputs(model: Model, disk: Any, rows: Any, formatter: str) -> dict[str, str]:
    """What the numbers depend on beside the arguments, so that a file is not continued with others."""
    from aligner import convert
    from aligner.data import templates

    template = templates.chat_template(model.assets)
    return dict(model=convert.fingerprint(disk), rows=rows.identity, formatter=formatter, chat_template=template)


@contextlib.contextmanager
def going_on(partial: Path, described: dict[str, Any], block: int = 1) -> Iterator[int]:
    """How many rows a half-written file holds; nobody else writes it meanwhile. A line that a kill left unfinished is cut off.

    Args:
        partial: the file; beside it stands what it is written with.
        described: what decides its lines.
        block: rows that are computed together; a block of which some are missing is cut off, so that no number depends on where it stopped.

    Raises:
        UserError: it was written with other settings, another process writes it, or its folder cannot be written.
    """
    beside, now = partial.with_suffix(".settings"), json.dumps(described, sort_keys=True)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("a+")
    except OSError as error:
        raise UserError(f"--out: {partial.parent} cannot be written: {error.strerror}") from None
    with file:
        if not locks.take(file):
            raise UserError(f"another process writes {partial}; wait for its end, or name another file with --out")
        if not beside.exists():  # opened before that process removed it, locked after
            raise UserError(f"another process has written {partial} to its end meanwhile")
        file.seek(0)
        if not partial.exists():  # the settings may be what a kill left of them
            file.truncate(0)
            file.write(now)
            file.flush()
        elif file.read() != now:
            raise UserError(f"{partial} was begun with another model, dataset or settings; give the same command, or remove the file")
        yield _cut_back(partial, block)


def _cut_back(partial: Path, block: int) -> int:
    """Keep whole lines of whole blocks; how many."""
    if not partial.exists():
        return 0
    with partial.open("rb+") as file:
        lines = file.read().split(b"\n")[:-1]
        kept = len(lines) // block * block
        file.truncate(sum(len(line) + 1 for line in lines[:kept]))
    return kept


def records(path: Path) -> Iterator[dict[str, Any]]:
    """What such a command wrote, line by line; `str.splitlines` parts lines at U+2028 and its like too, which JSON leaves as they are."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def prompt_columns(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that belong to its prompt: what its text shows (`image`, `images`, `video`, ..), what its template is told."""
    names = [name for kind in MEDIA for name in (kind, f"{kind}s")]
    return {name: record[name] for name in (*names, *TOLD) if name in record}


def json_able(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold; embedded images are not."""
    kept = {}
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        kept[name] = value
    return kept


def told(failed: Iterable[str], rows: int, done: str, more: str = "") -> list[str]:
    """Lines for people: how many of the rows were `done`, and why the others were not (`failed`: "kind: details" for each)."""
    reasons = Counter(reason.partition(":")[0] for reason in failed)
    why = [f"  not {done}, {reason}: {count}" for reason, count in reasons.most_common(5)]
    return [f"{rows - reasons.total()} of {rows} rows {done}{more}", *why]


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], Path], argv: list[str] | None) -> int:
    """Run such a command. Returns the exit code: 0 done, 2 bad input, 130 Ctrl-C."""
    args = arguments(parser, argv)
    explain = lambda message: as_options(message, parser)
    return ended(lambda: print(f"written: {run(args)}"), explain, "stopped; the same command goes on from here")
