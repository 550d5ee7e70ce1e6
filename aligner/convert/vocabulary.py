"""Added vocabulary: new tokens get rows of the embedding and of the head, the mean of the old ones, and the folder says so everywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligner.convert.assets import Assets
from aligner.convert.export import save
from aligner.convert.hf import abstract_params, load, model_from_folder
from aligner.models.decoder import text_config
from aligner.trees import flatten, unflatten
from aligner.types import Params, UserError

# Leaves with a place for every token: end of the path -> which axis.
_BY_TOKEN = {"embed_tokens/embedding": 0, "lm_head/kernel": -1, "lm_head/bias": -1}


def add_tokens(path: str | Path, tokens: Sequence[str], out_dir: str | Path, pad_to_multiple: int = 1) -> None:
    """Write a checkpoint with tokens added to its vocabulary.

    Args:
        path: local folder or Hub id.
        tokens: what to add; each becomes one special token. Those that the tokenizer has are left alone.
        out_dir: folder to write, as `save` takes it.
        pad_to_multiple: the number of rows is rounded up to it.

    Raises:
        UserError: no tokens are new, `pad_to_multiple` is below 1, or what `load` and `save` say.
    """
    if pad_to_multiple < 1:
        raise UserError(f"the number of rows cannot be a multiple of {pad_to_multiple}; give 1 or more.")
    if blank := [token for token in tokens if not token.strip()]:
        raise UserError(f"{blank[0]!r} is no token to add; give a text that is not empty.")
    model, params = load(path, dtype=None)
    tokenizer = model.assets.tokenizer
    known = len(tokenizer)
    new = [token for token in dict.fromkeys(tokens) if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if not new:
        raise UserError(f"{path}: its tokenizer has all of {', '.join(tokens)} already; nothing to add.")
    tokenizer.add_tokens(new, special_tokens=True)
    rows = -(-max(text_config(model).vocab_size, len(tokenizer)) // pad_to_multiple) * pad_to_multiple
    with tempfile.TemporaryDirectory() as scratch:
        model.assets.copy_to(scratch)
        tokenizer.save_pretrained(scratch)
        config = with_vocabulary(model.assets.config_dict, rows)
        (Path(scratch) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        larger = model_from_folder(scratch)
        assets = Assets(Path(scratch), dtypes=model.assets.dtypes)
        larger = dataclasses.replace(larger, assets=assets, source_dtype=model.source_dtype)
        save(larger, resized(params, known, abstract_params(larger)), out_dir)


def resized(params: Params, known: int, larger: Params) -> Params:
    """The tree with as many places for tokens as `larger` has, of which only shapes are read; those from `known` on hold the mean of the
    ones before. Some embeddings have more places than the head, such as Mllama's."""
    leaves, shapes = flatten(params), flatten(larger)
    for path, leaf in leaves.items():
        axis = next((axis for end, axis in _BY_TOKEN.items() if path == end or path.endswith("/" + end)), None)
        if axis is not None:
            leaves[path] = _grown(np.asarray(leaf), axis, known, shapes[path].shape[axis])
    return unflatten(leaves)


def _grown(leaf: np.ndarray, axis: int, known: int, rows: int) -> np.ndarray:
    by_row = np.moveaxis(leaf, axis, 0)
    old = by_row[: min(known, len(by_row))]
    mean = np.mean(old.astype(np.float64), axis=0, keepdims=True).astype(leaf.dtype)
    return np.ascontiguousarray(np.moveaxis(np.concatenate([old, np.repeat(mean, rows - len(old), axis=0)]), 0, axis))


def with_vocabulary(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """config.json with another number of tokens, where it says one; models of parts have it in `text_config`, some outside as well."""
    changed = dict(config)
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "vocab_size": rows}
    if "vocab_size" in config or "text_config" not in config:
        changed["vocab_size"] = rows
    return changed


def copy_companions(source: str | Path, target: str | Path, names: Sequence[str]) -> None:
    """Copy the files of these names that are there."""
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
