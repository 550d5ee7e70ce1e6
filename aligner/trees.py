"""A parameter tree by its leaves' paths, "model/layers/mlp/up_proj/kernel", and back."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from aligner.types import Params


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}, in their order. What is no dict is a leaf, such as a quantised kernel."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")
