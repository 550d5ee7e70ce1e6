"""Hugging Face checkpoint folders -> models and parameter trees."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from aligner.convert import disk
from aligner.convert.assets import Assets
from aligner.convert.disk import Checkpoint
from aligner.convert.tables import Entry, by_tensor, read_leaf, table
from aligner.trees import flatten, unflatten
from aligner.types import Conversion, Model, Params, UserError

# What a parameter may be stored as; anything else is a quantised checkpoint.
FLOATS = ("float64", "float32", "float16", "bfloat16")

_SCORED = "ForSequenceClassification"  # how the names of Hugging Face's classes with a score head end

_HUB_FILES = ("*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja")
_THREADS = 8  # tensors of a stack that are read side by side; bounds the memory for those in flight


def load(path: str | Path, dtype: Any = "float32", mesh: Any = None, revision: str | None = None) -> tuple[Model, Params]:
    """Read a Hugging Face checkpoint.

    Args:
        path: local folder or Hub id.
        dtype: dtype of the parameters, None for that on disk, or a function tree path -> one of these.
        mesh: lay the parameters out over this mesh by the model's sharding rules; None puts them on the default device.
        revision: Hub revision.

    Returns:
        (model, params).

    Raises:
        UserError: as `open_model` and `load_params`.
    """
    model, checkpoint = open_model(path, revision)
    shardings = None
    if mesh is not None:
        from aligner.sharding import param_shardings

        shardings = param_shardings(abstract_params(model), model.sharding_rules, mesh)
    return model, load_params(model, checkpoint, dtype, shardings)


def open_model(path: str | Path, revision: str | None = None, score_head: bool = False) -> tuple[Model, Checkpoint]:
    """A checkpoint's model and its weights by their headers; no weights are read.

    Args:
        path: local folder or Hub id, which is fetched into the Hub's cache.
        revision: Hub revision.
        score_head: give a language model a fresh score head instead of its own; a `*ForSequenceClassification` folder has one anyway.

    Returns:
        (model with `assets` and `source_dtype`, checkpoint).

    Raises:
        UserError: no such folder or Hub id, no checkpoint in it, a family that is not supported, a corrupt or missing file, or
            tensors that do not fit the config; those are listed all at once.
    """
    folder = find_folder(path, revision)
    model = model_from_folder(folder, score_head)
    checkpoint = disk.open_checkpoint(folder)
    entries = table(model.conversion, abstract_params(model))
    stored = match(model, entries, checkpoint)
    headers = {name: checkpoint.tensors[stored[name]] for name in by_tensor(entries) if name in stored}
    sizes = Counter()
    for header in headers.values():
        sizes[header.dtype] += header.nbytes
    [(source_dtype, _)] = sizes.most_common(1)
    others = {name: header.dtype for name, header in headers.items() if header.dtype != source_dtype}
    return dataclasses.replace(model, assets=dataclasses.replace(model.assets, dtypes=others), source_dtype=source_dtype), checkpoint


def model_from_folder(folder: str | Path, score_head: bool = False) -> Model:
    """The model that a folder's config.json describes, with the folder as `assets`; there need not be weights.

    `source_dtype` is what the config says, float32 where it says nothing. With `score_head` a language model gets a score head that need
    not be stored, and its config says so from then on (a `*ForSequenceClassification` with one label, as `transformers` reads it).

    Raises:
        UserError: no config.json, or one that is not supported or that transformers cannot read.
    """
    from aligner.models import SUPPORTED, from_hf

    assets = Assets(Path(folder))
    config, path = assets.config_dict, assets.folder / "config.json"
    family = config.get("model_type")
    if family not in SUPPORTED:
        likeness = {name: (difflib.SequenceMatcher(None, name, str(family)).ratio(), str(family).startswith(name)) for name in SUPPORTED}
        near = sorted(SUPPORTED, key=likeness.get, reverse=True)
        raise UserError(f"{path} has model_type {family!r}, which is not supported; supported, nearest first: {', '.join(near)}.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UserError(f"{path} describes weights quantised by {method}; use the unquantised checkpoint.")
    from transformers import AutoConfig

    from aligner.models.families import register_configs

    register_configs()
    try:
        normalised = AutoConfig.from_pretrained(assets.folder)
    except Exception as error:  # transformers raises whatever its validators do
        raise UserError(f"{path} cannot be read by transformers: {disk.first_line(error)}") from error
    scored = any(str(name).endswith(_SCORED) for name in config.get("architectures") or ())
    if scored and normalised.num_labels != 1:
        raise UserError(f"{path} describes a classifier of {normalised.num_labels} labels; a reward or cost model has one score.")
    try:
        model = from_hf(normalised, score_head or scored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if score_head and not scored:
        assets = dataclasses.replace(assets, config_changes=_scored_config(normalised))
        model = dataclasses.replace(model, conversion=dataclasses.replace(model.conversion, fresh=("score.weight",)))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return dataclasses.replace(model, assets=assets, source_dtype=dtype if dtype in FLOATS else "float32")


def _scored_config(config: Any) -> dict[str, Any]:
    """What config.json says otherwise once a language model has a score head instead of its own."""
    architecture = type(config).__name__.removesuffix("Config") + _SCORED
    changes = {"architectures": [architecture], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    pad, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if pad is not None and pad in (end if isinstance(end, list) else [end]):
        # transformers scores the last token that is not padding: without this, the one before the EOS
        changes["pad_token_id"] = None
    return changes


def load_params(
    model: Model,
    checkpoint: Checkpoint,
    dtype: Any = "float32",
    shardings: Any = None,
    progress: bool | None = None,
    only: Callable[[str], bool] | None = None,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Read parameters leaf by leaf straight into (sharded) device arrays.

    On the host there is at any moment one leaf's local part being read and the one before on its way to the devices.
    (An old msgpack source has been read whole; that format gives no other way.)

    Args:
        model: says which leaves there are.
        checkpoint: its weights.
        dtype: dtype of the parameters, None for that on disk, or a function tree path -> one of these.
        shardings: tree of `jax.sharding.Sharding`, or None for the default device.
        progress: show a bar; None only on a terminal.
        only: tree path -> whether to read that leaf; None reads all.
        finish: (tree path, leaf) -> what takes its place in the tree, such as a quantised kernel, before the next leaf is read.

    Returns:
        The parameter tree, nested dicts.

    Raises:
        UserError: tensors that do not fit the model, a stored tied head that differs from the embedding, a corrupt file, or float64
            without JAX_ENABLE_X64.
    """
    entries = table(model.conversion, abstract_params(model))
    stored = match(model, entries, checkpoint)
    _check_tied(model.conversion, checkpoint, stored)
    entries = [entry for entry in entries if only is None or only(entry.path)]
    dtypes = {entry.path: _leaf_dtype(entry, dtype, checkpoint, stored) for entry in entries}
    places = flatten(shardings) if shardings is not None else {}

    def read(name, index):
        return checkpoint.read(stored[name], index)

    def is_fresh(entry):
        return entry.names.item(0) not in stored

    leaves: dict[str, jax.Array] = {}
    before = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for entry in bar([entry for entry in entries if not is_fresh(entry)], "loading", progress):
            get = functools.partial(read_leaf, entry, read=read, dtype=dtypes[entry.path], map=pool.map)
            leaf = _place(entry.shape, places.get(entry.path), get)
            leaf = finish(entry.path, leaf) if finish else leaf
            jax.block_until_ready(before)
            leaves[entry.path] = before = leaf
    for entry in filter(is_fresh, entries):  # the compiler drops what `init` makes besides
        make = lambda key, path=entry.path: flatten(model.init(key))[path].astype(dtypes[path])
        leaves[entry.path] = jax.jit(make, out_shardings=places.get(entry.path))(jax.random.key(0))
    return unflatten(leaves)


def match(model: Model, entries: list[Entry], checkpoint: Checkpoint) -> dict[str, str]:
    """Pair the tensors that a model needs with those on disk.

    Returns:
        Canonical Hugging Face name -> name on disk, for every parameter and every stored tied tensor.

    Raises:
        UserError: lists every tensor that is missing, left over, stored twice, of the wrong shape or of no floating dtype.
    """
    conversion = model.conversion
    shapes = {name: parts[0][0].full for name, parts in by_tensor(entries).items()}
    tied = dict(conversion.tied)
    problems: dict[str, dict[str, str]] = defaultdict(dict)  # kind -> name -> detail
    stored: dict[str, str] = {}
    for name in sorted(checkpoint.tensors):
        canonical = canonical_name(conversion, name)
        if canonical not in shapes and canonical not in tied:
            if not is_ignored(conversion, name):
                problems["left over"][name] = ""
        elif canonical in stored:
            problems["stored twice"][name] = f" (also as {stored[canonical]})"
        else:
            stored[canonical] = name
    for name, other in tied.items():
        if name in stored:
            stored.setdefault(other, stored[name])  # some writers keep the head and drop the embedding
    for name, shape in shapes.items():
        if name not in stored:
            if name in conversion.fresh:
                continue
            is_head = name.endswith("lm_head.weight")
            problems["missing"][name] = " (if it is the embedding, set tie_word_embeddings to true in config.json)" if is_head else ""
            continue
        header = checkpoint.tensors[stored[name]]
        if header.shape != shape:
            problems["of another shape than config.json says"][name] = f" ({list(header.shape)} stored, {list(shape)} needed)"
        elif header.dtype not in FLOATS:
            problems["of no floating dtype"][name] = f" ({header.dtype})"
    for name, other in tied.items():
        if name in stored and other in shapes and checkpoint.tensors[stored[name]].shape != shapes[other]:
            problems["of another shape than the embedding it is tied to"][name] = f" ({list(checkpoint.tensors[stored[name]].shape)})"
    for name in list(problems["left over"])[:99]:
        if near := difflib.get_close_matches(canonical_name(conversion, name), problems["missing"], n=1, cutoff=0.8):
            problems["left over"][name] = f" (nearest missing: {near[0]})"
    problems = {kind: group for kind, group in problems.items() if group}
    if problems:
        listed = "; ".join(f"{len(group)} {kind}: {_listed(group)}" for kind, group in sorted(problems.items()))
        raise UserError(
            f"the tensors in {checkpoint.folder} do not fit its config.json (model_type {model.family}): {listed}. "
            "Check that both come from the same model."
        )
    return stored


def canonical_name(conversion: Conversion, name: str) -> str:
    """A name on disk in the layout that we write."""
    for pattern, replacement in conversion.renames:
        name = re.sub(pattern, replacement, name)
    return name


def is_ignored(conversion: Conversion, name: str) -> bool:
    """Whether a tensor on disk is a buffer that carries no parameter."""
    return any(re.search(pattern, name) for pattern in conversion.ignored)


def abstract_params(model: Model) -> Params:
    """The model's tree as shapes."""
    return jax.tree.map(lambda leaf: leaf, _shapes(model.init))  # a tree of the caller's own


@functools.lru_cache(maxsize=16)
def _shapes(init: Callable[..., Params]) -> Params:
    """What `init` makes. Remembered: a start asks several times, and every trace takes half a second."""
    return jax.eval_shape(lambda: init(jax.random.key(0)))


def find_folder(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """A local folder as it is, or a Hub id fetched into the Hub's cache (weights as safetensors; old Flax ones where there are none).

    `weights=False` fetches the small files alone.

    Raises:
        UserError: neither exists.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the checkpoint folder {folder.parent} or a Hub id.")
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f" (did you mean {folder.parent / near[0]}?)" if near else ""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"there is no folder {folder}{hint}; give a checkpoint folder or a Hub id (organisation/name).")
    from huggingface_hub import snapshot_download

    try:
        for pattern in ("model*.safetensors", "flax_model*.msgpack") if weights else (_HUB_FILES[0],):
            fetched = Path(snapshot_download(str(path), revision=revision, allow_patterns=[*_HUB_FILES, pattern]))
            if any(fetched.glob(pattern)):
                break
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"there is no folder {path}{hint}, and the Hub did not give it: {disk.first_line(error)}") from error
    return fetched


def _place(shape: tuple[int, ...], sharding: Any, get: Callable[..., np.ndarray]) -> jax.Array:
    if sharding is None:
        return jax.device_put(get((slice(None),) * len(shape)))
    pieces: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one read

    def piece(index):
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in pieces:
            pieces[key] = get(index)
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece)


def _leaf_dtype(entry: Entry, dtype: Any, checkpoint: Checkpoint, stored: Mapping[str, str]) -> np.dtype:
    want = dtype(entry.path) if callable(dtype) and not isinstance(dtype, type) else dtype
    if want is None:
        found = {checkpoint.tensors[stored[name]].dtype for _, name in entry.tensors() if name in stored}
        want = functools.reduce(jnp.promote_types, (np.dtype(name) for name in sorted(found))) if found else np.dtype("float32")
    name = dtype_name(want)
    if name not in FLOATS:
        raise UserError(f"parameters cannot be loaded as dtype {want!r}; choose one of {', '.join(FLOATS)}.")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise UserError("float64 parameters need 64-bit mode: set JAX_ENABLE_X64=1, or load them with another dtype.")
    return np.dtype(name)


def dtype_name(dtype: Any) -> str:
    """How NumPy calls it; as it is where NumPy has no such one."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _check_tied(conversion: Conversion, checkpoint: Checkpoint, stored: Mapping[str, str]) -> None:
    for name, other in conversion.tied:
        if name not in stored or stored[name] == stored[other]:
            continue
        rows = checkpoint.tensors[stored[name]].shape[0]
        for start in range(0, rows, 4096):
            block = (slice(start, min(start + 4096, rows)),)
            if not np.array_equal(checkpoint.read(stored[name], block), checkpoint.read(stored[other], block), equal_nan=True):
                raise UserError(
                    f"{checkpoint.folder} stores {stored[name]} with other values than {stored[other]}, though config.json ties them; "
                    "set tie_word_embeddings to false there, or remove the tensor."
                )


def _listed(group: Mapping[str, str], limit: int = 12) -> str:
    """Names with their details; layers are folded into one: `model.layers.*.mlp.up_proj.weight (32 times)`."""
    folded: dict[str, list[str]] = defaultdict(list)
    for name in group:
        folded[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    shown = [
        (f"{pattern} ({len(names)} times)" if len(names) > 1 else names[0]) + group[names[0]]
        for pattern, names in list(folded.items())[:limit]
    ]
    return ", ".join(shown) + (f" and {len(folded) - limit} other names" if len(folded) > limit else "")


def bar(items: Any, what: str, progress: bool | None) -> tqdm:
    """A progress bar, shown after a second and on a terminal unless told otherwise."""
    return tqdm(items, what, total=len(items), leave=False, delay=1, disable=None if progress is None else not progress)
