"""Adapters in PEFT's layout: `adapter_config.json` + `adapter_model.safetensors` <-> leaves of our tree.

PEFT names a tensor by the module in the memory of `transformers`: `base_model.model.{module}.lora_A.weight` [r, in], `lora_B.weight`
[out, r] and `lora_magnitude_vector` [out]; a module of `modules_to_save` keeps its own tensors. Here the layers of a stack are one leaf:
a layer without an adapter has scale 0, one of lower rank is filled up with zeros, which no gradient reaches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from aligner import lora
from aligner.convert import disk, hf
from aligner.convert.tables import Entry, by_tensor, table, write_tensor
from aligner.lora import TRAINED, Adapters
from aligner.trees import flatten
from aligner.types import Model, Params, UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "magnitude"}
OLD = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # names of earlier releases

# Settings that are read here, or that change nothing once an adapter is trained. Any other one that is set would.
KNOWN = ("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
         "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
         "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
         "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
         "task_type", "use_dora", "use_rslora")  # fmt: skip
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also change the base


def plan(config: ConfigDict, model: Model, params: Params) -> tuple[Adapters | None, dict[str, np.ndarray]]:
    """What `config.lora` asks for.

    Args:
        config: the whole config.
        model: the model.
        params: its tree; only shapes are read.

    Returns:
        (adapters, weights of `config.lora.adapter` to begin with), (None, {}) when adapters are off.

    Raises:
        UserError: the settings make no sense, do not fit the model, or are not those of `config.lora.adapter`.
    """
    c = config.lora
    lora.check(config)
    if not c.rank:
        return None, {}
    if not c.adapter:
        return lora.plan(config, model, params), {}
    for key in ("targets", "layers_to_transform", "modules_to_save"):
        if c[key]:
            raise UserError(f"config.lora.{key} is {c[key]!r}, but the adapter {c.adapter} says what it adapts; leave one of them out")
    adapters, weights = read(c.adapter, model, params)
    stored = read_config(find(c.adapter))
    for key, found in (("rank", stored["r"]), ("alpha", stored["lora_alpha"]), ("variant", adapters.variant)):
        if c[key] != found:
            raise UserError(f"the adapter {c.adapter} has {key} {found}, not {c[key]}; set --config.lora.{key}={found}")
    return dataclasses.replace(adapters, dropout=c.dropout), weights


def find(path: str | Path) -> Path:
    """An adapter's folder: a local one as it is, a Hub id fetched into the Hub's cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        raise UserError(f"there is no adapter folder {path}; give one that holds {CONFIG}, or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"there is no adapter folder {path}, and the Hub did not give it: {disk.first_line(error)}") from error


def fingerprint(path: str) -> str:
    """A short name for an adapter's content; "" for none."""
    if not path:
        return ""
    return hashlib.sha256(b"".join((find(path) / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused where it says what is not understood here."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no PEFT adapter: it has no {CONFIG}") from None
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be read: it holds a {type(config).__name__}, no adapter's settings")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} describes an adapter of type {config.get('peft_type')!r}; only LORA is supported (with rsLoRA and DoRA)")
    config = {"lora_alpha": 8, "r": 8, **config}
    r, alpha, patterns = config["r"], config["lora_alpha"], config.get("alpha_pattern") or {}
    try:
        fits = all(number > 0 for number in (r, alpha, *patterns.values())) and all(map(re.compile, patterns))
    except (TypeError, AttributeError, re.error):
        fits = False
    if not fits:
        wanted = "they must be numbers above 0, the last for regular expressions"
        raise UserError(f"{path} sets r to {r!r}, lora_alpha to {alpha!r}, alpha_pattern to {patterns!r}; {wanted}")
    strange = sorted(key for key, value in config.items() if key not in KNOWN and value)
    strange += ["bias"] if config.get("bias", "none") != "none" else []
    if str(config.get("init_lora_weights", True)).lower().startswith(BASE_CHANGING):
        strange.append("init_lora_weights")
    if strange:
        raise UserError(f"{path} sets {strange[0]} to {config[strange[0]]!r}, which is not supported")
    return config


def read(path: str | Path, model: Model, params: Params) -> tuple[Adapters, dict[str, np.ndarray]]:
    """An adapter that `peft` or `write` wrote.

    Args:
        path: folder or Hub id.
        model: the base model.
        params: its tree; only shapes are read.

    Returns:
        (adapters, {tree path: array}), arrays as they stand in the tree, those of `Adapters.saved` included.

    Raises:
        UserError: the adapter does not fit the model, or uses what is not supported.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = find(path)
    config = read_config(folder)
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} has no {WEIGHTS}; save the adapter as safetensors, PEFT's default")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {disk.first_line(error)}") from None
    known = lora.linears(model.conversion, params)
    places = by_tensor(table(model.conversion, params))
    found: dict[str, dict[tuple, dict[str, np.ndarray]]] = {}  # module -> layer -> part -> tensor as PEFT lays it out
    scales: dict[str, dict[tuple, float]] = {}
    saved: dict[str, dict[tuple, np.ndarray]] = {}  # leaf -> layer -> its core

    def misfit(name, why):
        return UserError(f"the adapter {path} does not fit its base, a {model.family} model: {name} {why}")

    whole = {hf.canonical_name(model.conversion, tensor): name for name in tensors for tensor, part in [_parse(name)] if not part}
    for head, embedding in model.conversion.tied:
        apart = [whole[name] for name in (embedding, head) if name in whole]
        if len(apart) == 2 and np.array_equal(tensors[apart[0]], tensors[apart[1]]):
            del tensors[apart[1]]
        elif apart:  # PEFT trains a copy of the one and leaves the other as it is
            raise misfit(apart[0], f"trained apart from what it is tied to ({embedding}, {head} are one tensor there); merge it with PEFT")
    for name in sorted(tensors):
        module, part = _parse(name)
        stored = hf.canonical_name(model.conversion, f"{module}.weight" if part else module)
        if stored not in places or (part and not all(entry.path.removesuffix("/kernel") in known for entry, _ in places[stored])):
            if re.search(r"\.(base_layer\.|lora_embedding_)|(^|\.)(lm_head|embed_out|score)\.lora_", name):
                raise misfit(name, "is of an adapter on a head or an embedding, which is not supported; merge it with PEFT")
            raise misfit(name, "belongs to no linear map there" if part else "belongs to nothing there")
        for entry, index in places[stored]:
            tensor = tensors[name]
            if not part:
                if tensor.shape != entry.full:
                    raise misfit(name, f"is {list(tensor.shape)}, where {list(entry.full)} is needed")
                everything = (slice(None),) * len(entry.full)
                saved.setdefault(entry.path, {})[index] = entry.core(tensor[entry.source(everything)], everything)
                continue
            inputs, outputs = (entry.full[axis] for axis in entry.perm)  # GPT-2's maps lie the other way round than all others
            if part == "lora_a" and tensor.shape[1:] != (inputs,):
                raise misfit(name, f"is {list(tensor.shape)}, where {['r', inputs]} is needed")
            if part != "lora_a":
                if tensor.shape[:1] != (outputs,):
                    raise misfit(name, f"is {list(tensor.shape)}, where {[outputs]} begin its shape")
                tensor = _outputs(entry, tensor).reshape(-1, *tensor.shape[1:])
            own = entry.path.removesuffix("/kernel")
            found.setdefault(own, {}).setdefault(index, {})[part] = tensor
            if part == "lora_a":
                rank = tensor.shape[0]
                pattern = next((p for p in config.get("alpha_pattern") or {} if re.match(rf"(.*\.)?({p})$", module)), None)
                alpha = config["alpha_pattern"][pattern] if pattern else config["lora_alpha"]
                scales.setdefault(own, {})[index] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not found:
        raise misfit(folder / WEIGHTS, "holds no adapter")
    dora = bool(config.get("use_dora"))
    if dora and config.get("use_rslora"):
        raise UserError(f"{folder / CONFIG} sets both use_dora and use_rslora, which together are not supported")
    needed = {"lora_a", "lora_b"} | ({"magnitude"} if dora else set())
    leaves, ranks, scale = {}, {}, {}
    for module, layers in found.items():
        for parts in layers.values():
            if parts.keys() != needed or parts["lora_a"].shape[0] != parts["lora_b"].shape[1]:
                raise misfit(module, f"has {', '.join(sorted(parts))} of unlike rank or not all of {', '.join(sorted(needed))}")
        *stacked, rows, columns = known[module]
        ranks[module] = max(parts["lora_a"].shape[0] for parts in layers.values())
        dtype = np.result_type(np.float32, *(t.dtype for parts in layers.values() for t in parts.values() if t.dtype.kind == "f"))
        a, b = np.zeros((*stacked, rows, ranks[module]), dtype), np.zeros((*stacked, ranks[module], columns), dtype)
        magnitude = np.ones((*stacked, columns), dtype)
        for index, parts in layers.items():
            r = parts["lora_a"].shape[0]
            a[index][:, :r], b[index][:r] = parts["lora_a"].T, parts["lora_b"].T
            magnitude[index] = parts.get("magnitude", 1)
        leaves |= {f"{module}/lora_a": a, f"{module}/lora_b": b} | ({f"{module}/magnitude": magnitude} if dora else {})
        scale[module] = tuple(scales[module].get((i,), 0.0) for i in range(stacked[0])) if stacked else scales[module][()]
    flat = flatten(params)
    for leaf, cores in saved.items():
        if len(cores) != math.prod(flat[leaf].shape[: len(next(iter(cores)))]):
            raise misfit(leaf, "is saved for some of its layers only, which is not supported")
        leaves[leaf] = np.stack([cores[i] for i in sorted(cores)]) if () not in cores else cores[()]
    variant = "dora" if dora else "rslora" if config.get("use_rslora") else "lora"
    return Adapters(ranks, scale, variant, saved=tuple(saved)), leaves


def write(out: str | Path, model: Model, adapters: Adapters, trainable: Params, base: str = "", dtype: Any = "float32") -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads.

    Args:
        out: new or empty folder, or a former adapter, which is replaced.
        model: the base model.
        adapters: what `trainable` holds.
        trainable: adapter leaves and those of `adapters.saved`.
        base: path or Hub id of the base, for `base_model_name_or_path`.
        dtype: of the tensors.

    Raises:
        UserError: `out` holds something else, or PEFT cannot say what trained.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {CONFIG, WEIGHTS, "README.md"}):
        raise UserError(f"{out} exists and is no former adapter; choose another folder or remove it")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(trainable).items()}
    abstract = hf.abstract_params(model)
    entries = {entry.path: entry for entry in table(model.conversion, abstract)}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, parts in by_tensor([entries[f"{module}/kernel"] for module in adapters.rank]).items():
        own = [(entry.path.removesuffix("/kernel"), entry, index) for entry, index in parts]
        scales = [float(np.asarray(adapters.scale[module])[index]) for module, _, index in own]
        if not any(scales):
            continue
        short, scale = module_name(model, name), max(scales)
        trained = [ours for ours in TRAINED if f"{own[0][0]}/{ours}" in leaves]
        factors = {ours: [leaves[f"{module}/{ours}"][index] for module, _, index in own] for ours in trained}
        ranks[short] = r = sum(a.shape[1] for a in factors["lora_a"])
        alphas[short] = float(f"{scale * (math.sqrt(r) if adapters.variant == 'rslora' else r):.12g}")
        tensors |= {f"{PREFIX}{short}.{part}": tensor for part, tensor in _joined(own, factors, [s / scale for s in scales]).items()}
    whole = _saved_tensors(model, adapters, leaves, list(entries.values()))
    tensors |= {PREFIX + name: tensor for name, tensor in whole.items()}
    tied = {_memory(model, head) for head, _ in model.conversion.tied} & whole.keys()  # PEFT ties them again to what is saved
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    config = dict(
        peft_type="LORA",
        task_type="SEQ_CLS" if any(path.startswith("score/") for path in adapters.saved) else "CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        lora_dropout=adapters.dropout,
        target_modules=_targets(model, abstract, entries, set(ranks)),
        modules_to_save=sorted({name.rpartition(".")[0] for name in whole} - {name.rpartition(".")[0] for name in tied}) or None,
        **({"ensure_weight_tying": True} if tied else {}),  # which earlier releases of PEFT do not know
        use_dora=adapters.variant == "dora",
        use_rslora=adapters.variant == "rslora",
        bias="none",
        fan_in_fan_out=any(entries[f"{module}/kernel"].perm == (0, 1) for module in adapters.rank),  # GPT-2's maps
        init_lora_weights=True,
        inference_mode=True,
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    cast = {name: np.ascontiguousarray(tensor, np.dtype(dtype)) for name, tensor in tensors.items()}
    disk.write(cast, partial / WEIGHTS, {"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def module_name(model: Model, name: str) -> str:
    """A tensor's name in the layout we write -> its module in the memory of `transformers`."""
    return _memory(model, name).rpartition(".")[0]


def _memory(model: Model, name: str) -> str:
    for pattern, replacement in model.conversion.modules:
        name = re.sub(pattern, replacement, name)
    return name


def _parse(name: str) -> tuple[str, str]:
    """(module, our name of the part) of an adapter's tensor, (tensor, "") of a module saved whole."""
    name = name.removeprefix(PREFIX)
    for old, new in OLD.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    for part, ours in PARTS.items():
        if name.endswith("." + part):
            return name.removesuffix("." + part), ours
    return name, ""


def _joined(own: list[tuple[str, Entry, tuple]], factors: Mapping[str, list[np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    """PEFT's tensors of one linear map. Where leaves are parts of it, as queries, keys and values may be, each keeps its own rank: what
    they do with the input stands one below the other, and each reaches its own outputs alone."""
    a = np.concatenate([factor.T for factor in factors["lora_a"]])
    outputs = own[0][1].full[own[0][1].perm[1]]
    b, start = np.zeros((outputs, len(a)), a.dtype), 0
    for (_, entry, _), factor, weight in zip(own, factors["lora_b"], weights):
        _outputs(entry, b)[..., start : start + len(factor)] = (weight * factor.T).reshape(entry.blocks, -1, len(factor))
        start += len(factor)
    joined = {"lora_A.weight": a, "lora_B.weight": b}
    if "magnitude" in factors:
        if sum(len(factor) for factor in factors["magnitude"]) < outputs:
            whole = own[0][1].names.flat[0]
            raise UserError(f"{own[0][0]} is a part of {whole}, of which PEFT's DoRA adapts all or nothing; export it merged instead")
        magnitude = np.zeros(outputs, a.dtype)
        for (_, entry, _), factor in zip(own, factors["magnitude"]):
            _outputs(entry, magnitude)[...] = factor.reshape(entry.blocks, -1)
        joined["lora_magnitude_vector"] = magnitude
    return joined


def _outputs(entry: Entry, tensor: np.ndarray) -> np.ndarray:
    """What belongs to this leaf, a view [blocks, n, ..], of a tensor whose first axis is the outputs of all leaves that are one on disk."""
    start, stop = entry.part[1:] if entry.part else (0, len(tensor))
    return tensor.reshape(entry.blocks, -1, *tensor.shape[1:])[:, start:stop]


def _saved_tensors(model: Model, adapters: Adapters, leaves: Mapping[str, np.ndarray], entries: list[Entry]) -> dict[str, np.ndarray]:
    heads = {embedding: head for head, embedding in model.conversion.tied}
    result = {}
    for name, parts in by_tensor(entries).items():
        ours = [entry.path in adapters.saved for entry, _ in parts]
        if not any(ours):
            continue
        if not all(ours):
            path = parts[0][0].path
            raise UserError(f"{path} trained whole but is one with another tensor, which no adapter can say; export it merged")
        for stored in filter(None, (name, heads.get(name))):  # what is tied stands there twice
            result[_memory(model, stored)] = write_tensor(parts, lambda path, index: leaves[path][index])
    return result


def _targets(model: Model, abstract: Params, entries: Mapping[str, Entry], adapted: set[str]) -> list[str]:
    """Short names (`q_proj`) when they mean exactly the adapted modules, otherwise full ones; a number alone would mean blocks, too."""
    linear = (entries[f"{m}/kernel"] for m in lora.linears(model.conversion, abstract))
    every = {module_name(model, name) for entry in linear for _, name in entry.tensors()}
    last = {name.rpartition(".")[2] for name in adapted}
    exact = {name for name in every if name.rpartition(".")[2] in last} == adapted and not any(map(str.isdigit, last))
    return sorted(last if exact else adapted)
