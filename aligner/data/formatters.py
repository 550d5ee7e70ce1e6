"""How a row of a dataset becomes a sample: formatters, found by the columns or named in the config.

A formatter is a function row -> sample, or a class with such a `__call__`. Add one with

    from aligner.data.formatters import assistant, formatter, user

    @formatter("my_dataset", needs=("question", "good", "bad"), makes=Preference)
    def my_dataset(row):
        return Preference([user(row["question"])], [assistant(row["good"])], [assistant(row["bad"])])

in a file of your own and name it in the config by where it stands: `--config.data.train.formatter=package.module:my_dataset`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from aligner.data.conversations import MARK, assistant, messages_of, place_images, place_media, split_prompt, user, without_none
from aligner.data.samples import PARTS, Bad, Document, Preference, Prompt, Ranked, Supervised, Unpaired, check, is_conversation
from aligner.types import UserError

__all__ = ["MARK", "assistant", "find_formatter", "formatter", "known", "messages_of", "place_images", "place_media",
           "split_prompt", "user"]  # fmt: skip

Formatter = Callable[[dict[str, Any]], Any]


class Variant(NamedTuple):
    """One way in which a formatter's name reads rows: what columns it needs, what it makes, whether `auto` may take it."""

    needs: tuple[str, ...]
    makes: type
    function: Formatter
    auto: bool


_FORMATTERS: dict[str, list[Variant]] = {}

_OURS = ("add_generation_prompt", "continue_final_message", "conversation", "assets", "shown")  # arguments of `render`, no template's
PAIRS = (Preference, Ranked)
PROMPTS = (Prompt, Supervised, Preference, Ranked, Unpaired, Document)  # whatever holds something to answer


def formatter(name: str, needs: tuple[str, ...] = (), makes: type = Preference, auto: bool = True) -> Callable[[Formatter], Formatter]:
    """Register a formatter, a function or a class of such objects, under `name`; one name may have several, for other kinds of samples.

    Args:
        name: what configs call it.
        needs: columns that must be there.
        makes: the type of its samples.
        auto: `auto` may take it for rows that have the columns, where samples of this type will do.
    """

    def register(function: Formatter) -> Formatter:
        callable_ = function() if inspect.isclass(function) else function
        _FORMATTERS.setdefault(name, []).append(Variant(tuple(needs), makes, callable_, auto))
        return function

    return register


def known() -> dict[str, list[Variant]]:
    """All registered formatters by name."""
    from aligner.data import by_columns, by_name  # noqa: F401  they register themselves

    return _FORMATTERS


def find_formatter(
    name: str,
    columns: list[str],
    where: str,
    takes: tuple[type, ...] = PAIRS,
    template: Mapping[str, Any] | None = None,
    example: Mapping[str, Any] | None = None,
) -> tuple[str, Formatter]:
    """The formatter for rows with these columns.

    Args:
        name: a registered name, "auto" (of those whose columns are all there, the one that needs the most), or "package.module:function".
        columns: found in the dataset.
        where: the config section, for errors.
        takes: the types of samples that will do, the best first.
        template: arguments for the chat template of all rows; a row's own `chat_template_kwargs` and `tools` come on top.
        example: a row; of several that "auto" finds equally good, the one that reads it. `conversations` may end in one answer or several.

    Returns:
        (name, function from row to sample). The function raises Bad for a row that it cannot use.
    """
    if ours := set(template or ()).intersection(_OURS):
        raise UserError(f"config.{where}.template sets {', '.join(sorted(ours))}, which is decided where a template is used; remove it.")
    guard = functools.partial(_guard, template=dict(template or {}))
    if ":" in name:
        return name, guard(_import(name, where))
    if name == "auto":
        candidates = [(key, variant) for key, variant in _every() if variant.auto and variant.makes in takes]
    else:
        candidates = [(name, variant) for variant in _variants(name, where, takes)]
    fitting = [(key, variant) for key, variant in candidates if set(variant.needs) <= set(columns)]
    if not fitting:
        missing = lambda found: len(set(found[1].needs) - set(columns)) - len(set(found[1].needs) & set(columns))
        needed = "; ".join(f"{key!r} needs {', '.join(variant.needs)}" for key, variant in sorted(candidates, key=missing)[:3])
        raise UserError(
            f"config.{where}: the rows have {'the columns ' + ', '.join(columns) if columns else 'no columns'}; {needed}; "
            f"rename the columns, or set config.{where}.formatter to your own package.module:function."
        )
    fitting.sort(key=lambda found: (-len(found[1].needs), takes.index(found[1].makes)))
    equals = [found for found in fitting if set(found[1].needs) == set(fitting[0][1].needs)]
    best, variant = next((found for found in equals if example is not None and _reads(guard(found[1].function), example)), fitting[0])
    return best, guard(variant.function)


def _reads(function: Formatter, row: Mapping[str, Any]) -> bool:
    try:
        function(row)
    except Bad:
        return False
    return True


def _every() -> Iterator[tuple[str, Variant]]:
    return ((key, variant) for key, variants in known().items() for variant in variants)


def _variants(name: str, where: str, takes: tuple[type, ...]) -> list[Variant]:
    """What a name can make of those samples that will do."""
    if name not in known():
        near = difflib.get_close_matches(name, _FORMATTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"config.{where}.formatter: there is no {name!r}; {hint}known are auto, {', '.join(sorted(_FORMATTERS))}.")
    found = [variant for variant in _FORMATTERS[name] if variant.makes in takes]
    if not found:
        makes = " or ".join(variant.makes.__name__ for variant in _FORMATTERS[name])
        raise UserError(
            f"config.{where}.formatter {name!r} makes samples of type {makes}, but config.algorithm takes "
            f"{' or '.join(kind.__name__ for kind in takes)}; formatters for it are "
            f"{', '.join(sorted({key for key, variant in _every() if variant.makes in takes}))}."
        )
    return found


def _import(name: str, where: str) -> Formatter:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        found = found() if inspect.isclass(found) else found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"config.{where}.formatter: {name} cannot be imported ({error}).") from None
    if not callable(found):
        raise UserError(f"config.{where}.formatter: {name} is a {type(found).__name__}, no function from a row to a sample.")
    return found


def _guard(function: Formatter, template: Mapping[str, Any]) -> Formatter:
    """Rows are other people's data: whatever is odd in one becomes a counted reason, not a traceback."""

    def guarded(row: dict[str, Any]) -> Any:
        try:
            return check(_with_options(function(row), row, template))
        except (Bad, UserError):
            raise
        except KeyError as error:
            raise Bad("missing column", f"{error}, the row has {', '.join(map(str, row))}") from error
        except Exception as error:  # a formatter may be anyone's
            raise Bad("unexpected value", f"{type(error).__name__}: {error}") from error

    guarded.__wrapped__ = function
    return guarded


def _with_options(sample: Any, row: Mapping[str, Any], template: Mapping[str, Any]) -> Any:
    """The sample with what its row and its dataset tell the chat template: `tools` (also as JSON text), `chat_template_kwargs`."""
    tools = row.get("tools")
    options = {**template, **(row.get("chat_template_kwargs") or {})}
    if tools:
        options["tools"] = without_none(json.loads(tools) if isinstance(tools, str) else tools)
    if ours := set(options).intersection(_OURS):
        raise Bad("unexpected value", f"chat_template_kwargs sets {', '.join(sorted(ours))}, which is decided where a template is used")
    return _told(sample, options) if options else sample


def _told(sample: Any, options: Mapping[str, Any]) -> Any:
    """The sample, or the samples in it, with options for the chat template; plain text has none."""
    if parts := {name: _told(getattr(sample, name), options) for name in PARTS if hasattr(sample, name)}:
        return dataclasses.replace(sample, **parts)
    if hasattr(sample, "template") and any(is_conversation(getattr(sample, field, None)) for field in ("prompt", "conversation")):
        return dataclasses.replace(sample, template={**sample.template, **options})
    return sample
