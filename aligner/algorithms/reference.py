"""Where reference log-probabilities come from, the same for every algorithm that has a reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from aligner.lora import without_adapters
from aligner.types import Array, Batch, Float

COLUMN = "reference_logps"


class Reference(NamedTuple):
    """How an algorithm gets its reference.

    Attributes:
        logps: (fixed, batch) -> [B,G,R].
        options: the fields of `Algorithm` that follow from it.
    """

    logps: Callable[[dict, Batch], Float[Array, "B G R"]]
    options: dict[str, Any]


def make_reference(config: ConfigDict, logps: Callable[..., Float[Array, "B G R"]], prepared_with: Any = None) -> Reference:
    """The reference that `config.reference.kind` names.

    Args:
        config: the whole config.
        logps: (params, batch) -> [B,G,R]: the policy's sums must be made in the same way.
        prepared_with: settings that `logps` depends on.

    Returns:
        precomputed: a column computed once before training; copy: a frozen copy in memory, computed with every batch; base: the same
        with the base, adapters off.
    """
    if config.reference.kind == "base":
        return Reference(lambda fixed, batch: logps(without_adapters(fixed), batch), {})
    if config.reference.kind == "copy":
        return Reference(lambda fixed, batch: logps(fixed["reference"], batch), {})
    prepare = lambda params, batch: {COLUMN: logps(params, batch)}
    return Reference(lambda fixed, batch: batch[COLUMN], dict(prepare=prepare, columns=(COLUMN,), prepared_with=prepared_with))
