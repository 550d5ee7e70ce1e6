"""What a working directory is: the resolved config, the model's companion files, and the run that may go on in it."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from aligner import locks
from aligner.console import say
from aligner.types import Model, Params, UserError

if TYPE_CHECKING:
    from aligner.lora import Adapters

CONFIG = "config.json"
ASSETS = "assets"
SOURCE = "source.json"  # which weights the run started from
LOCK = "running.tmp"  # who works here

# On a restart these may differ from what the workdir was started with; they are reported. Anything else is another run.
MAY_DIFFER = (
    *("mesh", "model.attention", "train.steps", "train.eval_every", "train.watchdog", "checkpoint", "log", "profile", "data.workers"),
)


# Settings of `algorithm` that some algorithms had in an earlier aligner and never read: a run goes on without them, whatever they were.
UNREAD = ("epsilon", "epsilon_high", "delta", "dual_clip", "entropy_coef")


def resolve(config: ConfigDict, workdir: str | Path) -> ConfigDict:
    """A copy of the config in which "{workdir}" is the working directory."""

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{workdir}", str(workdir))
        if isinstance(value, (list, tuple)):
            return type(value)(map(one, value))
        return {key: one(child) for key, child in value.items()} if isinstance(value, Mapping) else value

    resolved = config.copy_and_resolve_references()
    resolved.update(one(resolved.to_dict()))
    return resolved


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a nested config."""
    result = {}
    for key, value in config.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return result


def check(config: ConfigDict, workdir: str | Path) -> list[str]:
    """Whether a run with this config may go on in the workdir, if there is one in it. What made no step, as where memory was too small, is
    none.

    Returns:
        Lines about settings that differ from the run before and may.

    Raises:
        UserError: the workdir belongs to a run whose config differs in what may not differ.
    """
    make(workdir)
    if not (Path(workdir) / CONFIG).exists() or not has_trained(workdir):
        return []
    before, now = flat(read_config(workdir)), flat(json.loads(json.dumps(config.to_dict())))
    pairs = {key: (before.get(key), now.get(key)) for key in before.keys() | now.keys()}
    changed = {key: pair for key, pair in pairs.items() if not same(*pair, workdir)}
    refused = sorted(key for key in changed if not any(key == free or key.startswith(free + ".") for free in MAY_DIFFER))
    if refused:
        what = "; ".join(f"config.{key} was {changed[key][0]!r} and is {changed[key][1]!r}" for key in refused)
        raise UserError(f"{workdir} belongs to a run with another config: {what}. Use another --workdir, or the settings of that run")
    return [f"config.{key} was {changed[key][0]!r} and is now {changed[key][1]!r}" for key in sorted(changed)]


def has_trained(workdir: str | Path) -> bool:
    """Whether a step was made in a workdir, and something is left of it."""
    from aligner import checkpoint, metrics

    return bool(checkpoint.steps(workdir) or metrics.read(workdir))


@contextlib.contextmanager
def alone(workdir: str | Path, patience: float = 120.0) -> Iterator[None]:
    """No other run works in the workdir meanwhile. One that ends (a launcher may start the next while a run still saves) is waited for.

    Process 0 holds the lock.

    Raises:
        UserError: another run is there after `patience` seconds.
    """
    make(workdir)
    if jax.process_index() != 0:
        yield
        return
    with (Path(workdir) / LOCK).open("a+") as file:
        begun, told = time.monotonic(), False
        while not locks.take(file):
            file.seek(0)
            other = f"another run works in {workdir} ({file.read().strip() or 'on another machine'})"
            if time.monotonic() - begun > patience:
                raise UserError(f"{other}; wait for its end, stop it, or use another --workdir")
            if not told:
                say(f"{other}; waiting for its end")
                told = True
            time.sleep(1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def make(workdir: str | Path) -> None:
    """The folder, if there is none."""
    if Path(workdir).exists() and not Path(workdir).is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder, new or of an earlier run")
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}); name a folder in which you may write") from None


def bring_up_to_date(workdir: str | Path, defaults: ConfigDict) -> None:
    """Settings that the aligner of an earlier run in the workdir did not have are recorded for it as what they are by default, and told;
    so those that its algorithm had and never read are forgotten.

    Args:
        workdir: with or without a run in it.
        defaults: the config as its file has it; what the command line changes is not the earlier run's.
    """
    if not (Path(workdir) / CONFIG).exists():
        return
    before, now = read_config(workdir), json.loads(json.dumps(resolve(defaults, workdir).to_dict()))
    after, gone = _with_missing(before, now), []
    if (algorithm := before.get("algorithm")) and algorithm["name"] == now["algorithm"]["name"]:
        gone = [name for name in UNREAD if name in algorithm and name not in now["algorithm"]]
        after["algorithm"] = {name: value for name, value in after["algorithm"].items() if name not in gone}
    if after != before:
        write_json(Path(workdir) / CONFIG, after)
    if new := sorted(flat(after).keys() - flat(before).keys()):
        say(f"the run in {workdir} is of an earlier aligner; these count as their defaults: config.{', config.'.join(new)}")
    if gone:
        names = ", ".join(f"config.algorithm.{name}" for name in gone)
        say(f"the run in {workdir} is of an earlier aligner; these, which {algorithm['name']} never read, are gone: {names}")


def _with_missing(before: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`before` with what `defaults` has more; not where it is empty: such a section holds names of the user's own (`data.evals`)."""
    filled = dict(before)
    for key, default in defaults.items():
        if key not in before:
            filled[key] = default
        elif isinstance(default, Mapping) and isinstance(before[key], Mapping) and before[key]:
            filled[key] = _with_missing(before[key], default)
    return filled


def same(before: Any, now: Any, workdir: str | Path) -> bool:
    """Equal, or two ways to write the path of one file or folder: with and without a slash at its end, or in a workdir that stood elsewhere
    when the run before recorded it."""
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    one_file = os.path.exists(before) and os.path.exists(now) and os.path.samefile(before, now)
    return one_file or (now.startswith(f"{workdir}/") and before.endswith(now.removeprefix(str(workdir))))


def record(config: ConfigDict, workdir: str | Path) -> None:
    """Make the workdir this config's; process 0 writes."""
    if jax.process_index() == 0:
        write_json(Path(workdir) / CONFIG, config.to_dict())


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The resolved config that a workdir was started with."""
    path = Path(workdir) / CONFIG
    if "://" in str(workdir):
        raise UserError(f"{workdir} is remote, and only training works with that; copy it to a folder here, or mount it, and name that")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a working directory of a run: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be read: it holds a {type(config).__name__}, no config")
    return config


def restore_params(workdir: str | Path, step: int | None = None) -> tuple[Model, Params, int]:
    """The model of a run with its trained parameters, on this machine's first device; frozen ones are read again from `model.path`.

    Adapters are merged into their kernels, in float32; those of a quantised base (QLoRA) into the unquantised one.

    Args:
        workdir: of the run.
        step: which checkpoint; default: the newest.

    Returns:
        (model, params, step).
    """
    from aligner import convert, lora
    from aligner.trees import flatten, unflatten

    config = read_config(workdir)
    model, adapters, trainable, step = restore_trainable(workdir, step)
    ours = lambda path: path.rpartition("/")[2] not in lora.TRAINED and not path.startswith("critic/")
    leaves = {path: leaf for path, leaf in flatten(trainable).items() if ours(path)}
    missing = flatten(convert.abstract_params(model)).keys() - leaves.keys()
    if missing:  # frozen: read again as they stand on disk, so that they are exported unchanged
        original, disk = convert.open_model(config["model"]["path"], config["model"]["revision"], model.has_score_head)
        check_source(workdir, original, convert.fingerprint(disk))
        merge = lora.merge_into(adapters, trainable)
        leaves |= flatten(convert.load_params(original, disk, dtype=None, only=missing.__contains__, finish=merge))
    return model, unflatten(leaves), step


def restore_trainable(workdir: str | Path, step: int | None = None) -> tuple[Model, "Adapters | None", Params, int]:
    """What a run trained, without the base: (model, its adapters if it has any, trainable tree, step)."""
    from aligner import checkpoint, convert
    from aligner.lora import Adapters

    source = read_source(workdir)
    model = convert.model_from_folder(Path(workdir) / ASSETS)
    assets = dataclasses.replace(model.assets, dtypes=source["dtypes"])
    model = dataclasses.replace(model, source_dtype=source["source_dtype"], assets=assets)
    adapters = Adapters.from_json(source["adapters"]) if source.get("adapters") else None
    return model, adapters, *checkpoint.restore_trainable(workdir, step)


def read_source(workdir: str | Path) -> dict[str, Any]:
    """What `check_source` recorded."""
    path = Path(workdir) / SOURCE
    if not path.exists():
        raise UserError(f"{workdir} is not the working directory of a run that has begun to train: it has no {SOURCE}")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); bring it back from a copy, or start anew in another --workdir") from None


def check_source(workdir: str | Path, model: Model, fingerprint: str, adapters: "Adapters | None" = None) -> None:
    """The weights that a run started from are recorded, and must be the same from its first step on; so what adapters it has.

    Raises:
        UserError: they changed.
    """
    path = Path(workdir) / SOURCE
    described = json.loads(json.dumps(dataclasses.asdict(adapters))) if adapters else None
    if path.exists() and has_trained(workdir):
        before = read_source(workdir)
        if before["fingerprint"] != fingerprint:
            raise UserError(f"the weights in {model.assets.folder} are not the ones that the run in {workdir} started from")
        if adapters and before.get("adapters") != described:
            raise UserError(f"the adapters are not those that the run in {workdir} started with; config.lora.adapter has changed")
    elif jax.process_index() == 0:
        folder, dtypes = str(model.assets.folder), dict(model.assets.dtypes)
        write_json(path, dict(path=folder, fingerprint=fingerprint, source_dtype=model.source_dtype, dtypes=dtypes, adapters=described))


def claim(
    workdir: str | Path,
    config: ConfigDict,
    model: Model,
    weights: str,
    adapters: "Adapters | None",
    rows: str,
    held_out: Mapping[str, str],
    steps: int,
) -> None:
    """Make the workdir this run's, where what is there is of it. Called before anything is loaded, and once all paths are known to be good.

    Args:
        workdir, config, model, adapters: of the run.
        weights: fingerprint of those that it starts from.
        rows, held_out: fingerprints of what it learns from and, by name, is evaluated on.
        steps: that it is to have in all.

    Raises:
        UserError: the run that is there started from, or learned from, something else.
    """
    from aligner import checkpoint

    if newest := checkpoint.newest(workdir):  # asked before anything of the run is touched
        check_place(workdir, *newest, rows, steps)
        compare_held_out(newest[1], held_out)
    check_source(workdir, model, weights, adapters)
    if jax.process_index() == 0:
        model.assets.copy_to(Path(workdir) / ASSETS)
    record(config, workdir)  # only now, so that a first try with a bad path leaves no run behind


def check_place(workdir: str | Path, done: int, kept: Mapping[str, Any], rows: str, steps: int) -> None:
    """Whether a run may go on from a checkpoint: its place in the data is one in the rows that it learned from.

    Args:
        workdir: of the run.
        done: steps of the checkpoint.
        kept: its metadata.
        rows: names those of now.
        steps: that the run is to have in all.

    Raises:
        UserError: the rows changed (checkpoints of an earlier aligner do not say), or more steps are done than asked for.
    """
    if kept.get("rows", rows) != rows:
        raise UserError(
            f"config.data.train no longer holds what the run in {workdir} learned from (rows, their order, images or the chat template "
            "changed), and where it stopped has no meaning there; bring that back, or start anew in another --workdir"
        )
    if done > steps:
        raise UserError(f"the run in {workdir} has done {done} steps, and config.train.steps is {steps}; give {done} or more")


def compare_held_out(kept: Mapping[str, Any], held_out: Mapping[str, str]) -> None:
    """Tell where evaluations would be of other rows than those before a checkpoint.

    Args:
        kept: the checkpoint's metadata; an earlier aligner's do not say.
        held_out: fingerprints by name of the sets of now.
    """
    if kept.get("held_out", held_out) != held_out:
        say("config.data.eval holds other rows than before: evaluations from now on are not to be compared with those of before")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also when the process is killed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")  # several processes may write the same
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)
