"""Our trees by Hugging Face names, and the error measures of the golden tests."""

from __future__ import annotations

import jax
import numpy as np

from aligner import trees
from aligner.convert import tables


def by_name(model, tree) -> dict[str, np.ndarray]:
    """A tree shaped like a model's parameters (their gradients) as Hugging Face tensors by their name on disk."""
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    tensors = tables.by_tensor(tables.table(model.conversion, shapes))
    return {name: tables.write_tensor(parts, lambda path, index: leaves[path][index]) for name, parts in tensors.items()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|a-b| / max|b|."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
