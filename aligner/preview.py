"""What the model will really see: rows as tokens coloured by what is trained, images, frames of videos and spectrograms of
sounds as fed, drops and why, as one HTML page.

    python -m aligner.preview --config configs/dpo_llava.py:tiny --workdir runs/quickstart --out page.html

It reads the data section of the config as training does and needs no weights.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from aligner.commandline import check_out, ended
from aligner.data.kinds import ENCODERS, Kind
from aligner.types import Model, UserError

OUT = flags.DEFINE_string("out", "preview.html", "The page to write.")
ROWS = flags.DEFINE_integer("rows", 8, "How many rows of each dataset to show.", lower_bound=1)

TORN = "\ufffd"  # what bytes that are no whole character become
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1c; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd } h3 { font-size: 1rem }
.row { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .9rem; margin: 1rem 0 }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }
.text { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #fff8 }
.prompt { background: #eceff1 } .common { border-bottom: 2px solid #d99a00 }
.trained1 { background: #bfe8c5 } .trained2 { background: #f7c6c5 }
.trained3 { background: #c9d8f5 } .untrained { background: #eee; color: #888 } .media { background: #d9d2f2 }
.note { color: #666; font-size: .9em }
img { image-rendering: pixelated; max-height: 14rem; min-height: 6rem; max-width: 100%; margin: .3rem .5rem .3rem 0 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { text-align: left; padding: .15rem .8rem .15rem 0 }
.bar { background: #7aa6d8; height: .8rem }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap }
"""
LEGEND = (
    '<p class="text"><span class="prompt">prompt, read only</span>  <span class="media">features of an image, a video or a sound</span>  '
    '<span class="trained1">first answer, trained</span>  <span class="trained2">second answer, trained</span>  '
    '<span class="untrained">answer, not trained</span>  <span class="common">start that all answers share</span></p>'
)


def page(config: Any, model: Model, datasets: Iterable[Any], rows: int, kind: Kind | None = None) -> str:
    """The whole page as HTML text; it loads nothing from anywhere.

    Args:
        config: the whole config.
        model: for its assets and media sizes.
        datasets: from `aligner.data.loader.load_dataset`.
        rows: how many rows of each to show, evenly spaced.
        kind: of the examples: what their answers are called, and which are trained.
    """
    from aligner.data.templates import chat_template

    parts = [f"<h1>What the model in {html.escape(config.model.path)} will see</h1>", LEGEND]
    for dataset in datasets:
        parts.append(f"<h2>{html.escape(dataset.name)}</h2>")
        parts.append("<pre>" + html.escape("\n".join(dataset.report)) + "</pre>")
        parts.append(drops(dataset))
        shown = [dataset.row(int(i)) for i in np.linspace(0, dataset.size - 1, min(rows, dataset.size))]
        parts.append(histogram(dataset))
        parts += [show_row(row, model, kind) for row in shown]
    template = chat_template(model.assets)
    parts.append("<h2>Chat template</h2><pre>" + html.escape(template or "none: raw text") + "</pre>")
    title = html.escape(f"aligner preview: {config.model.path}")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def drops(dataset: Any) -> str:
    """Rows left out, by reason, each with what was wrong with the first and that row as the dataset has it."""
    if not dataset.dropped:
        return '<p class="note">No row was dropped.</p>'
    lines = []
    for reason, (count, ids) in sorted(dataset.dropped.items(), key=lambda item: -item[1][0]):
        names = ", ".join(dataset.raw(i)[0] for i in ids)
        raw = cut(repr(dataset.raw(ids[0])[1]))
        detail = html.escape(dataset.details.get(reason) or "show it")
        example = f"<details><summary>{detail}</summary><pre>{html.escape(raw)}</pre></details>"
        lines.append(f"<tr><td>{html.escape(reason)}</td><td>{count}</td><td>{html.escape(names)}</td><td>{example}</td></tr>")
    head = "<tr><th>dropped because</th><th>rows</th><th>for example rows</th><th>the first of them</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def cut(text: str, most: int = 2000) -> str:
    """The text, or its beginning and how much is left out."""
    return text if len(text) <= most else f"{text[:most]} .. ({len(text) - most} characters more)"


def histogram(dataset: Any, bins: int = 16) -> str:
    """Lengths of all rows against the width that they are padded to."""
    width = dataset.shape[0]
    counts, edges = np.histogram(dataset.lengths, bins=min(bins, width), range=(0, width))
    most = max(int(counts.max()), 1)
    bars = [f'<div class="bar" style="width:{18 * n / most:.1f}rem"></div>' for n in counts]
    cells = [f"<td>{int(a)} to {int(b)}</td><td>{n}</td><td>{bar}</td>" for a, b, n, bar in zip(edges, edges[1:], counts, bars)]
    lines = "".join(f"<tr>{cell}</tr>" for cell in cells)
    note = f'<p class="note">{dataset.size} rows, {dataset.fill:.1%} of their {width} columns are filled</p>'
    return f"<table><tr><th>tokens of a row</th><th>rows</th><th></th></tr>{lines}</table>{note}"


def show_row(row: Mapping[str, np.ndarray], model: Model, kind: Kind | None = None) -> str:
    """One row: its images, then for each segment the prompt and its answers side by side."""
    pictures = "".join(map(picture, stills(row, model))) if "pixel_values" in row else ""
    # the columns whose token is trained: the one after a scored position in the same answer, or the first of an answer
    trained, real, names = trained_columns(row), row["score_segment"] > 0, kind.names if kind else ()
    if kind and kind.mismatched:  # another row's answer is looked at, not learned from
        trained, real = trained & (row["role"] != 2), real & (row["score_role"] != 2)
    blocks = []
    segments = int(row["segment_ids"].max())
    of = lambda segment: f" of segment {segment}" if segments > 1 else ""
    for segment in range(1, segments + 1):
        here = row["segment_ids"] == segment
        roles = [int(role) for role in np.unique(row["role"][here]) if role > 0]
        prompt = tokens_html(row, here & (row["role"] == 0), trained, model)
        answers = [here & (row["role"] == role) for role in roles]
        shared = common_start([row["tokens"][columns] for columns in answers])
        texts = [tokens_html(row, columns, trained, model, shared) for columns in answers]
        named = [names[role - 1] if role <= len(names) else f"answer {role}" for role in roles]
        cells = [f"<div><h3>{name}</h3>{text}</div>" for name, text in zip(named, texts)]
        blocks.append(f'<h3>prompt{of(segment)}</h3>{prompt}<div class="answers">{"".join(cells)}</div>')
    used, scored = int((row["segment_ids"] > 0).sum()), int(real.sum())
    ids = ", ".join(str(i) for i in row["example_id"] if i >= 0)
    note = f'<p class="note">row {ids}: {used} of {len(row["tokens"])} columns, {scored} tokens trained</p>'
    return f'<div class="row">{note}{pictures}{"".join(blocks)}</div>'


def stills(row: Mapping[str, np.ndarray], model: Model) -> Iterator[np.ndarray]:
    """The images, tiles and frames of a row, [H,W,3] each; from patches they are put together again. A sound is a picture with time to the
    right and pitch upwards."""
    real = row["image_mask"]
    pixels, side = row["pixel_values"][real], model.media.height
    if model.media.kind == "audio":
        for spectrogram, frames in zip(pixels, row["frames"][real]):
            yield np.repeat(spectrogram[:frames, ::-1, None], 3, axis=-1).swapaxes(0, 1)
        return
    if "patch_grid" not in row:
        yield from pixels if pixels.ndim == 4 else ()
        return
    for number in range(1, 1 + row["image_ids"].max(initial=0)):
        here = row["image_ids"][real] == number
        grid = row["patch_grid"][real][here].reshape(-1, 2)
        first = pixels[here].reshape(len(grid), -1, side, side, 3)[:, 0]  # of the frames that a patch spans
        still = np.zeros((grid[:, 0].max() + 1, side, grid[:, 1].max() + 1, side, 3), np.float32)
        still[grid[:, 0], :, grid[:, 1]] = first
        yield still.reshape(len(still) * side, -1, 3)


def trained_columns(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which columns hold a token that a loss is computed on, found again from the scored positions."""
    trained = np.zeros(len(row["tokens"]), bool)
    real = row["score_segment"] > 0
    for start, token, role in zip(row["score_from"][real], row["score_token"][real], row["score_role"][real]):
        follows = start + 1 < len(trained) and row["role"][start + 1] == row["role"][start] and row["tokens"][start + 1] == token
        if follows and row["role"][start] in (0, role) and not (row["role"][start] == 0 and (row["role"] == role).any()):
            trained[start + 1] = True
        else:  # the first token of an answer is predicted from the prompt's last column
            first = np.flatnonzero((row["segment_ids"] == row["segment_ids"][start]) & (row["role"] == role))
            trained[first[0] if len(first) else start + 1] = True
    return trained


def tokens_html(row: Mapping[str, np.ndarray], columns: np.ndarray, trained: np.ndarray, model: Model, shared: int = 0) -> str:
    """The tokens of some columns, each a coloured span; a run of image features is one, and so are the tokens of one character."""
    media = row.get("media_index", np.full(len(row["tokens"]), -1))

    def kind(place: int) -> str:
        column = where[place]
        if media[column] >= 0:
            return kinds[int(row["tokens"][column])]
        role = int(row["role"][column])
        shade = f"trained{min(role, 3) or 1}" if trained[column] else "untrained" if role else "prompt"
        return shade + (" common" if place < shared else "")

    where, spans, show = np.flatnonzero(columns), [], shower(model.assets.tokenizer)
    kinds = {token: medium for medium, token in model.media.tokens.items()} if "media_index" in row else {}
    for name, places in itertools.groupby(range(len(where)), kind):
        ids = [int(row["tokens"][where[place]]) for place in places]
        if name in kinds.values():
            spans.append(f'<span class="media">{name}, {len(ids)} features</span>')
            continue
        while ids:
            # a character may be several tokens: the fewest that are no torn one
            texts = {count: show(ids[:count]) for count in range(1, min(len(ids), 4) + 1)}
            count = next((count for count, text in texts.items() if TORN not in text), 1)
            title = ", ".join(map(str, ids[:count]))
            spans.append(f'<span class="{name}" title="{title}">{html.escape(texts[count])}</span>'.replace("\n", "⏎\n"))
            ids = ids[count:]
    return f'<div class="text">{"".join(spans)}</div>'


def shower(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids -> their text as it stands within a longer one: alone, some tokenizers leave the space before a word out."""
    before = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    known = len(tokenizer.convert_tokens_to_string(before))
    return lambda ids: tokenizer.convert_tokens_to_string(before + tokenizer.convert_ids_to_tokens(ids))[known:]


def common_start(answers: list[np.ndarray]) -> int:
    """How many first tokens all answers share."""
    if len(answers) < 2:
        return 0
    shortest = min(map(len, answers))
    same = np.all([answer[:shortest] == answers[0][:shortest] for answer in answers], axis=0)
    return int(shortest if same.all() else np.argmin(same))


def picture(pixels: np.ndarray) -> str:
    """Pixels [H,W,3] as the tower gets them, stretched to what a screen shows."""
    from PIL import Image

    low, high = float(pixels.min()), float(pixels.max())
    scaled = ((pixels - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(scaled).save(buffer, "PNG")
    return f'<img alt="image as fed" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main(argv: list[str]) -> None:
    from aligner import algorithms, convert, workdir
    from aligner.console import say
    from aligner.data import loader
    from aligner.data.catalogue import with_template
    from aligner.main import CONFIG, WORKDIR
    from aligner.run import call_setup, eval_splits

    if CONFIG.value is None:
        raise UserError("--config is missing; for example: python -m aligner.preview --config configs/dpo_llava.py:tiny --out page.html")
    out = check_out(OUT.value)
    # a folder for each config: what presets make there is of their own model
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    config = workdir.resolve(CONFIG.value, WORKDIR.value or f"runs/preview/{name}")
    if config.setup:
        call_setup(config)
    model, _ = convert.open_model(config.model.path, config.model.revision, config.algorithm.name in algorithms.SCORING)
    model = with_template(model, config.data)
    needs = algorithms.make(config, model).needs
    if needs == "prompt":  # as `aligner.rl.prompts` takes them: with room for an answer
        with config.unlocked():
            config.data.max_length = max(0, config.data.max_length - config.generation.max_new_tokens)
    datasets = [loader.load_dataset(config, split, model, needs) for split in ("train", *eval_splits(config).values())]
    for dataset in datasets:
        say(*dataset.report)
    out.write_text(page(config, model, datasets, ROWS.value, ENCODERS[needs]), encoding="utf-8")
    print(f"{out}: up to {ROWS.value} rows of {', '.join(dataset.name for dataset in datasets)}; open it in a browser")


if __name__ == "__main__":
    from aligner.main import parse

    sys.exit(ended(lambda: app.run(main, flags_parser=parse)))
