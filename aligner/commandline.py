"""The command line, and one sentence for what is wrong with it: absl and ml_collections raise a dozen kinds of errors."""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, FieldReference

from aligner.stopping import unread
from aligner.types import UserError
from aligner.workdir import flat

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a tuple"}


def parse(argv: list[str]) -> list[str]:
    """Set all flags.

    Returns:
        What is left: the program's name.

    Raises:
        UserError: an unknown key (the nearest is named), a value of another type, a config file that is missing or broken, an argument that
            is no flag, mostly a setting without its dashes.
    """
    path, _ = config_file(argv)
    if path and not Path(path).is_file():
        others = sorted(str(file) for file in Path("configs").glob("*.py") if file.stem not in ("__init__", "common", "online"))
        near = difflib.get_close_matches(path, others, n=1, cutoff=0.8)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(others) or 'no folder configs here'}"
        raise UserError(f"--config {path} does not exist; {hint}")
    if {"h", "?", "help", "helpshort", "helpfull"} & {argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")}:
        print(help_text(argv))
        sys.exit(0)
    argv, unset = _without_none(argv)
    try:
        left = flags.FLAGS(argv)
    except Exception as error:
        raise UserError(_explain(argv, path, error)) from None
    if unset:
        flags.FLAGS.config.update_from_flattened_dict(dict.fromkeys(unset), "config.")
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}; settings are given as --config.section.key=value")
    logging.set_verbosity(logging.WARNING)  # Orbax tells a dozen lines for every save, JAX which backends are not there
    return left


def help_text(argv: list[str]) -> str:
    """What the program is for, its options and, where a config is named, that config's settings."""
    found = flags.FLAGS.flags_by_module_dict()
    own = [flag for module, defined in found.items() if module == argv[0] or module.startswith("aligner.") for flag in defined]
    told = [f"  --{flag.name:<15} {flag.help}" + (f" (default: {flag.default})" if flag.default not in (None, "") else "") for flag in own]
    path, preset = config_file(argv)
    if path:
        settings = [f"  --config.{key}={value}" for key, value in flat(defaults(argv).to_dict()).items()]
        told += ["", f"defaults of {path}{':' * bool(preset)}{preset}; configs/common.py explains each:", *settings]
    else:
        told += ["", "with --config FILE, --help lists the settings of that config as well"]
    return "\n".join([sys.modules["__main__"].__doc__ or "", "options:", *told])


def config_file(argv: list[str]) -> tuple[str, str]:
    """(path, preset) behind --config; ("", "") without one."""
    value = next((value for name, value in _settings(argv) if name == "config"), "")
    path, _, preset = (value or "").partition(":")
    return path, preset


def defaults(argv: list[str]) -> Any:
    """The config as its file has it, without what the command line changes."""
    path, preset = config_file(argv)
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config and get_config(*[preset] * bool(preset))
    except Exception as broken:
        raise UserError(f"--config {path}: {_last_line(broken)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path} has no function get_config that returns a ConfigDict, as configs/dpo_llava.py has")
    return config


def _settings(argv: list[str]) -> list[tuple[str, str | None]]:
    """(flag, value) pairs as they stand on the command line; the value of a bare flag is what follows it, if that is no flag."""
    found = []
    for argument, following in zip(argv[1:], [*argv[2:], "-"]):
        if match := re.fullmatch(r"--?([\w.]+)(?:=(.*))?", argument, re.DOTALL):
            found.append((match[1], match[2] if match[2] is not None or following.startswith("-") else following))
    return found


def _without_none(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the command line without settings that are to be None and may be, which absl would read as numbers, the names of those settings)."""
    asked = {argument: match[1] for argument in argv if (match := re.fullmatch(r"--?(config\.[\w.]+)=None", argument))}
    config = defaults(argv) if asked and config_file(argv)[0] else None
    taken = {argument: name for argument, name in asked.items() if _may_be_none(config, name)}
    last = dict(_settings(argv))
    return [argument for argument in argv if argument not in taken], [name for name in taken.values() if last[name] == "None"]


def _may_be_none(config: Any, name: str) -> bool:
    """Whether a config's file says, by a placeholder, that `config.section.key` may be None."""
    _, *sections, key = name.split(".")
    for section in sections:
        config = config.get(section) if isinstance(config, ConfigDict) else None
    return isinstance(config, ConfigDict) and isinstance(dict(config.items(preserve_field_references=True)).get(key), FieldReference)


def _explain(argv: list[str], path: str, error: Exception) -> str:
    """What was refused and what would be taken; the config file is read again to know that."""
    config = defaults(argv) if path else None
    for name, value in _settings(argv):
        if name.startswith("config.") and config is not None and (problem := _problem(config, name, value)):
            return problem
    return f"bad command line: {_last_line(error)}"


def _problem(config: Any, name: str, value: str | None) -> str | None:
    """What is wrong with `--name=value`, None where nothing is."""
    section, where = config, "config"
    for part in name.split(".")[1:]:
        keys = [str(key) for key in section] if hasattr(section, "keys") else []
        if part not in keys:
            if not keys:
                return f"{where} is a value, so there is no {name}"
            near = difflib.get_close_matches(part, keys, n=1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"the keys of {where} are {', '.join(keys)}"
            return f"the config has no key {where}.{part}; {hint}"
        parent, section, where = section, section[part], f"{where}.{part}"
    if hasattr(section, "keys"):
        return f"{where} is a section, not a value; set one of {', '.join(f'{where}.{key}' for key in section)}"
    kind = parent.get_type(part)
    try:
        taken = value is None or kind not in (int, float, bool) or (value.lower() in _BOOLEANS if kind is bool else kind(value) is not None)
    except ValueError:
        taken = False
    example = "" if section is None or kind is bool else f", such as {section!r}"
    return None if taken else f"{where} must be {_KINDS[kind]}{example}, not {value!r}"


def as_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message about settings as a config has them, in the words of a program that takes those settings as its arguments."""
    names, options = {action.dest for action in parser._actions}, parser.format_help()

    def argument(match: re.Match) -> str:
        section, key = match.groups()
        name = section if key in (None, "path") else key
        option = f"--{name.replace('_', '-')}"
        return match[0] if name not in names else option if f"{option} " in options else name

    return re.sub(r"config\.(data|model|against)(?:\.(\w+))?", argument, message)


def arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """What stands on the command line. An option that is not known is told before one that is missing, with the nearest that is."""
    nested = [one for action in parser._actions if isinstance(action, argparse._SubParsersAction) for one in action.choices.values()]
    known = [option for one in (parser, *nested) for option in one._option_string_actions]
    for argument in sys.argv[1:] if argv is None else argv:
        name = argument.partition("=")[0]
        if name == "--":  # behind it nothing is an option
            break
        if re.fullmatch("--[a-z][a-z_-]*", name) and not any(option.startswith(name) for option in known):
            near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
            parser.error(f"there is no {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return parser.parse_args(argv)


def ended(program: Callable[[], int | None], explain: Callable[[str], str] = str, stopped: str = "stopped") -> int:
    """Run a program to its end. Returns its exit code, 2 where what it was given is wrong, 130 after Ctrl-C, each told in a sentence;
    141 where nobody reads on what it prints, as after `| head`, which is no fault and told to nobody.

    Args:
        program: returns its exit code, None for 0.
        explain: message -> what people read, such as `as_options`.
        stopped: what is said after Ctrl-C.
    """
    try:
        try:
            return program() or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the interpreter's end it would be too late to say nothing
    except UserError as error:
        print(f"error: {explain(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and unread():
            return 128 + signal.SIGPIPE
        if not (message := unwritable(error)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def unwritable(error: OSError) -> str | None:
    """What people read of a disk that is full, or may not be written; None where something else went wrong."""
    if error.errno in (errno.EROFS, errno.EACCES):
        return f"{error.filename}: {error.strerror}; make that possible and give the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" to {error.filename}" if error.filename else ""
        return f"nothing more can be written{where}: {error.strerror}; make room and give the same command again"
    return None


def split_of(asked: str | None, data: str) -> str:
    """The split of `data` that was asked for, "train" where none was; raises UserError where there can be none, and all would be read."""
    if asked is not None and Path(data).is_file():
        raise UserError(f"--split {asked}: {data} is a single file and has no splits; without --split all its rows are read")
    return asked or "train"


def check_named(path: str | Path, option: str = "--out") -> None:
    """Raises UserError for "-", which elsewhere means the terminal and here would be a file of that name."""
    if str(path) == "-":
        raise UserError(f"{option} is -: what is written goes to a file, not to the terminal; name one")


def check_out(path: str | Path, option: str = "--out") -> Path:
    """The path, if a file can be written there; raises UserError. Asked before the work whose result it is to hold."""
    check_named(path, option)
    path = Path(path)
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from None
    return path


_BOOLEANS = ("true", "t", "1", "false", "f", "0")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
