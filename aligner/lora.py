"""Which leaves train: how the trainable tree and the fixed base split and combine."""

import re
from collections.abc import Sequence

from aligner.types import Params, UserError


def split(params: Params, freeze: Sequence[str]) -> tuple[dict, dict]:
    """(trainable, base): leaves whose path a regex of `freeze` matches from its start are the base. Branches without a leaf are left out.

    Raises:
        UserError: a regex matches nothing, or everything is frozen.
    """
    unused = set(freeze)

    def walk(tree: Params, prefix: str) -> tuple[dict, dict]:
        trainable, base = {}, {}
        for name, child in tree.items():
            path = prefix + name
            if isinstance(child, dict):
                ours, theirs = walk(child, path + "/")
                trainable.update({name: ours} if ours else {})
                base.update({name: theirs} if theirs else {})
                continue
            matching = [pattern for pattern in freeze if re.match(pattern, path)]
            unused.difference_update(matching)
            (base if matching else trainable)[name] = child
        return trainable, base

    trainable, base = walk(params, "")
    if unused:
        top = ", ".join(f"{name}/..." for name in params)
        raise UserError(f"config.optim.freeze has {sorted(unused)[0]!r}, which matches no parameter; the tree begins with {top}")
    if not trainable:
        raise UserError("config.optim.freeze matches every parameter, so nothing would train")
    return trainable, base


def combine(trainable: Params, base: Params) -> dict:
    """The whole tree again: the two trees share branches, never leaves."""
    merged = dict(base)
    for name, child in trainable.items():
        merged[name] = combine(child, base[name]) if isinstance(child, dict) and name in base else child
    return merged
