"""The census: every row is formatted, tokenised and its images decoded once, before training, so that nothing fails hours later.

It says which rows are kept, how long they are, what was dropped and why, and gives the dataset a fingerprint. Token ids stay on disk.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import inspect
import itertools
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aligner import arrays
from aligner.console import counted
from aligner.data import modalities, templates, tokens
from aligner.data.samples import Bad, article
from aligner.data.together import Steps, together
from aligner.types import Model, UserError

if TYPE_CHECKING:
    from aligner.data.mixture import Samples

TOGETHER = 256  # rows that a thread looks at in one go, their texts tokenised in one call, which goes over all cores
_VERSION = 11  # counts up when what a census says of the same rows changes


@dataclasses.dataclass(frozen=True)
class Census:
    """What is known of a dataset's rows.

    Attributes:
        row_ids: [N] int64, the kept rows.
        sizes: [N,6] int32: prompt tokens, tokens of all answers, how many of them are scored, answers, slots for media, and 1 where
            every answer ends with EOS.
        dropped: reason -> (count, up to three row numbers).
        details: reason -> what was wrong with its first row.
        fingerprint: sha256 over row numbers, token ids, image bytes, image-processor settings and the chat template.
        ends: [N] int64, where in the file of tokens each kept row ends.
        tokens: that file; None where nothing is kept.
    """

    row_ids: np.ndarray
    sizes: np.ndarray
    dropped: dict[str, tuple[int, list[int]]]
    details: dict[str, str]
    fingerprint: str
    ends: np.ndarray
    tokens: Path | None = None


def take_census(
    steps: Callable[[int], Steps],
    rows: Samples,
    model: Model,
    max_length: int | None,
    name: str,
    *,
    key: Any = None,
    cache_dir: str | Path | None = None,
    workers: int = 8,
    progress: bool | None = None,
) -> Census:
    """Look at every row, or read what an earlier start found.

    Args:
        steps: row number -> its encoder (aligner.data.together), which returns an Encoded.
        rows: the source.
        model: its tokenizer and image processor stand in the fingerprint.
        max_length: tokens of prompt + longest answer; longer rows are dropped. None keeps any length.
        name: config section, for messages and the file name.
        key: whatever else decides the outcome (kind of sample); part of the name under which the result is kept.
        cache_dir: None keeps nothing.
        workers: threads, which decode images and sounds side by side.
        progress: say how far it is; None says it on process 0.

    Raises:
        UserError: a broken file, or media for a model that takes none of their kind.
    """
    settings = _settings(model)
    inputs = [_VERSION, rows.identity, len(rows), max_length, settings, key]
    cache = Path(cache_dir) / f"{name}-{_sha(inputs)[:32]}.npz" if cache_dir else None
    if (found := _read(cache)) is not None:
        return found

    eos = model.assets.tokenizer.eos_token_id

    def look(index: int, encoded: templates.Encoded | Bad) -> tuple[list[int], bytes, bytes] | Bad:
        if not isinstance(encoded, Bad):
            try:
                return _look(index, encoded, rows, eos, max_length, cache is not None)
            except Bad as bad:
                return bad
        if isinstance(encoded, templates.Refused):
            takes = ", ".join(["text", *(model.media.tokens if model.media is not None else ())])
            raise UserError(
                f"config.{name}: row {rows.name(index)} of {rows.description} holds {article(encoded.kind)}, but the {model.family} model "
                f"takes {takes} only; choose a model that does, or rows without."
            )
        return encoded

    def look_at(numbers: Sequence[int]) -> list[tuple[list[int], bytes, bytes] | Bad]:
        return [*map(look, numbers, together(map(steps, numbers)))]

    if cache is None:
        return _count(look_at, len(rows), _sha(settings), name, workers, progress, lambda data: None)
    cache.parent.mkdir(parents=True, exist_ok=True)
    arrays.sweep(cache.parent)  # token files are as large as the dataset, and Ctrl-C does not wait to tidy up
    with arrays.whole(cache.with_suffix(".tokens")) as part, part.open("wb") as file:
        census = _count(look_at, len(rows), _sha(settings), name, workers, progress, file.write)
    _write(cache, census)
    return dataclasses.replace(census, tokens=cache.with_suffix(".tokens"))


def _look(
    index: int, encoded: templates.Encoded, rows: Samples, eos: int | None, max_length: int | None, keep: bool
) -> tuple[list[int], bytes, bytes]:
    """(a row of `sizes`, digest, the example as bytes where it is kept)."""
    lengths = [len(answer) for answer in encoded.answers]
    longest = len(encoded.prompt) + max(lengths, default=0)
    if max_length is not None and longest > max_length:
        raise Bad("too long", f"{longest} tokens, config.data.max_length is {max_length}")
    digest = hashlib.sha256(np.int64([index, len(encoded.prompt), *lengths]).tobytes())
    for part in (encoded.prompt, *encoded.answers, *(encoded.scored or ())):
        digest.update(part.tobytes())
    digest.update(json.dumps(encoded.values, sort_keys=True, default=str).encode())
    for kind, reference in encoded.media:
        digest.update(modalities.check(kind, reference, rows.folder(index)))
    scored = sum(lengths) if encoded.scored is None else sum(int(mask.sum()) for mask in encoded.scored)
    slots = len(encoded.media) if encoded.slots is None else encoded.slots
    kept = tokens.pack(encoded) if keep and not encoded.media else b""
    ends = int(templates.ends_with_eos(encoded, eos))
    return [len(encoded.prompt), sum(lengths), scored, len(lengths), slots, ends], digest.digest(), kept


def _count(
    look_at: Callable, total: int, start: str, name: str, workers: int, progress: bool | None, write: Callable[[bytes], Any]
) -> Census:
    row_ids, sizes, ends, dropped, details = array("q"), array("i"), array("q"), {}, {}  # compact: there may be millions of rows
    digest, end = hashlib.sha256(start.encode()), 0
    with (
        concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool,
        counted(total, f"reading {name}", shown=_shows(progress)) as update,
    ):
        pieces = (range(first, min(first + TOGETHER, total)) for first in range(0, total, TOGETHER))
        ahead = lambda count: [(piece, pool.submit(look_at, piece)) for piece in itertools.islice(pieces, count)]
        waiting = collections.deque(ahead(2 * workers + 2))  # few, so that millions of rows do not wait as futures
        while waiting:
            piece, looked = waiting.popleft()
            for index, found in zip(piece, looked.result()):
                if isinstance(found, Bad):
                    count, examples = dropped.get(found.reason, (0, []))
                    dropped[found.reason] = (count + 1, [*examples, index][:3])
                    details.setdefault(found.reason, found.detail)
                else:
                    row_ids.append(index)
                    sizes.extend(found[0])
                    digest.update(found[1])
                    write(found[2])
                    end += len(found[2])
                    ends.append(end)
            update(len(piece))
            waiting.extend(ahead(1))
    good, kept = np.array(row_ids, np.int64), np.array(sizes, np.int32).reshape(-1, 6)
    return Census(good, kept, dropped, details, digest.hexdigest(), np.array(ends, np.int64))


def _shows(progress: bool | None) -> bool:
    if progress is None:
        import jax

        progress = jax.process_index() == 0
    return progress


# --- what people read ------------------------------------------------------------------------------------------------------------


def check_census(census: Census, rows: Samples, name: str, max_bad_fraction: float) -> None:
    """Stop where nothing is left or too much was dropped.

    Raises:
        UserError: names every reason with its count and an example.
    """
    bad = len(rows) - len(census.row_ids)
    if bad < len(rows) and bad <= max_bad_fraction * len(rows):
        return
    rule = "none is left" if bad == len(rows) else f"config.data.max_bad_fraction allows {max_bad_fraction:.1%}"
    reasons = "; ".join(_reasons(census, rows))
    raise UserError(f"config.{name}: {bad} of {len(rows)} rows of {rows.description} cannot be used, {rule}: {reasons}.")


def describe(census: Census, rows: Samples, name: str, formatter: str, model: Model) -> Iterator[str]:
    """Lines that say what was read, what was dropped and how long examples are."""
    kept = len(census.row_ids)
    yield f"{name}: {rows.description}, formatter {formatter}: {kept} of {len(rows)} rows kept"
    for line in _reasons(census, rows):
        yield f"  dropped, {line}"
    prompt, _, scored, answers, slots, ends = census.sizes.T
    answer = f", an answer {scored.sum() / answers.sum():.0f} on average" if answers.any() else ""
    yield f"  prompt {int(np.median(prompt))} tokens (longest {prompt.max()}){answer}"
    if model.media is not None and not slots.all():
        columns = " or ".join(f"`{kind}` or `{kind}s`" for kind in model.media.tokens)
        why = "" if slots.any() else f": no row has one in a column {columns}"
        yield f"  {int((slots == 0).sum())} rows without {' or '.join(map(article, model.media.tokens))}{why}"
    if not ends.all():
        eos = model.assets.tokenizer.eos_token
        yield f"  {kept - int(ends.sum())} rows where the chat template ends an answer without {eos}: they do not train where to stop"


def _reasons(census: Census, rows: Samples) -> list[str]:
    lines = []
    for reason, (count, ids) in sorted(census.dropped.items(), key=lambda item: -item[1][0]):
        names = [*map(rows.name, ids)]
        detail = f"; row {names[0]}: {census.details[reason]}" if census.details.get(reason) else ""
        lines.append(f"{reason}: {count} (rows {', '.join(names)}{', ..' if count > len(ids) else ''}{detail})")
    return lines


# --- what a census depends on, and where it is kept ------------------------------------------------------------------------------


def source_code(function: Callable) -> str:
    """A function's source, so that a census is taken again when a formatter is edited; "" where there is none."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def _settings(model: Model) -> list[Any]:
    """What beside the rows decides the tokens and pixels: template, tokenizer, image processor."""
    assets = model.assets
    backend = getattr(assets.tokenizer, "backend_tokenizer", None)
    tokenizer = backend.to_str() if backend is not None else assets.tokenizer.get_vocab()
    processor = modalities.processor(model).to_dict() if model.media is not None else None
    media_sizes = model.media.sizes if model.media is not None else None
    shown = dict.fromkeys(templates.chat_template(assets, tools) for tools in (None, ()))
    settings = [*shown, _sha(tokenizer), assets.tokenizer.special_tokens_map, processor, media_sizes]
    return [*settings, assets.video_settings] if model.media is not None and model.media.video is not None else settings


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path | None) -> Census | None:
    stored = arrays.read(path) if path is not None else None
    if stored is None:  # or torn by a kill: take it again
        return None
    words = json.loads(str(stored["words"]))
    dropped = {reason: (count, ids) for reason, (count, ids) in words["dropped"].items()}
    ids, sizes, ends, kept = stored["row_ids"], stored["sizes"], stored["ends"], path.with_suffix(".tokens")
    whole = kept.exists() and kept.stat().st_size == (ends[-1] if len(ends) else 0)
    return Census(ids, sizes, dropped, words["details"], words["fingerprint"], ends, kept) if whole else None


def _write(path: Path, census: Census) -> None:
    words = json.dumps({"dropped": census.dropped, "details": census.details, "fingerprint": census.fingerprint})
    arrays.write(path, row_ids=census.row_ids, sizes=census.sizes, ends=census.ends, words=words)
