"""Entries in both directions, on tensors whose every value is different."""

from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest

from aligner.convert.tables import PIECE, TILE, by_tensor, copy_into, read_leaf, row_slices, table, write_tensor
from aligner.trees import flatten
from aligner.types import Conversion

MIXED = Conversion(
    stacks={"model/layers": "model.layers.{i}", "model/layers/mlp/experts": "model.layers.{i}.mlp.experts.{e}"},
    exceptions=(
        ("model.layers.{i}.qkv.weight", tuple(f"model/layers/{x}/kernel" for x in "qkv"), ("split", "transpose", 0)),
        ("model.layers.{i}.c_attn.weight", ("model/layers/a/kernel", "model/layers/b/kernel"), ("split", "copy", 1)),
        ("model.layers.{i}.qkv.bias", tuple(f"model/layers/{x}/bias" for x in "qkv"), ("split", "copy", 0)),
        ("h.{i}.conv1d", "model/layers/c/kernel", "copy"),
        ("absent.bias", "absent/bias", "copy"),
    ),
)
SHAPES = {
    "model/embed_tokens/embedding": (7, 4),
    "model/layers/norm/scale": (3, 4),
    "model/layers/q/kernel": (3, 4, 6),
    "model/layers/k/kernel": (3, 4, 2),
    "model/layers/v/kernel": (3, 4, 2),
    "model/layers/q/bias": (3, 6),
    "model/layers/k/bias": (3, 2),
    "model/layers/v/bias": (3, 2),
    "model/layers/a/kernel": (3, 4, 5),
    "model/layers/b/kernel": (3, 4, 1),
    "model/layers/c/kernel": (3, 4, 5),
    "model/layers/mlp/experts/up_proj/kernel": (3, 2, 4, 5),
    "model/layers/mlp/gate/kernel": (3, 4, 2),
    "patch/kernel": (2, 3, 4, 5),
    "audio/kernel": (2, 4, 5),
    "logit_scale": (),
    "class_embedding": (4,),
}


def make():
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
    tree = {}
    for path, leaf in leaves.items():
        node = tree
        *modules, last = path.split("/")
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    entries = table(MIXED, tree)
    tensors = {name: write_tensor(parts, lambda path, index: leaves[path][index]) for name, parts in by_tensor(entries).items()}
    return leaves, {entry.path: entry for entry in entries}, tensors


def test_names_and_layout_on_disk():
    leaves, entries, tensors = make()
    assert flatten({"a": {"b": 1}}) == {"a/b": 1}
    assert entries.keys() == leaves.keys()
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], leaves["model/embed_tokens/embedding"])
    np.testing.assert_array_equal(tensors["model.layers.1.norm.weight"], leaves["model/layers/norm/scale"][1])
    np.testing.assert_array_equal(tensors["patch.weight"], leaves["patch/kernel"].transpose(3, 2, 0, 1))  # HWIO -> OIHW
    np.testing.assert_array_equal(tensors["audio.weight"], leaves["audio/kernel"].transpose(2, 1, 0))
    np.testing.assert_array_equal(tensors["logit_scale"], leaves["logit_scale"])
    experts = leaves["model/layers/mlp/experts/up_proj/kernel"]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.experts.1.up_proj.weight"], experts[2, 1].T)
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.gate.weight"], leaves["model/layers/mlp/gate/kernel"][2].T)
    qkv = np.concatenate([leaves[f"model/layers/{x}/kernel"][1].T for x in "qkv"])
    np.testing.assert_array_equal(tensors["model.layers.1.qkv.weight"], qkv)
    fused = np.concatenate([leaves[f"model/layers/{x}/kernel"][1] for x in "ab"], 1)  # Conv1D: [in, out] on disk
    np.testing.assert_array_equal(tensors["model.layers.1.c_attn.weight"], fused)
    np.testing.assert_array_equal(tensors["h.0.conv1d"], leaves["model/layers/c/kernel"][0])
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_every_slice_of_every_leaf_reads_back():
    leaves, entries, tensors = make()
    touched = []

    def read(name, index):
        touched.append(tensors[name][index].size)
        return tensors[name][index]

    rng = np.random.default_rng(1)
    for path, leaf in leaves.items():
        for _ in range(6):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in leaf.shape]
            index = tuple(slice(*bound) for bound in bounds)
            touched.clear()
            got = read_leaf(entries[path], index, read, np.float32)
            np.testing.assert_array_equal(got, leaf[index])
            assert sum(touched) == got.size  # nothing that the slice does not need
        np.testing.assert_array_equal(read_leaf(entries[path], (slice(None),) * leaf.ndim, read, np.float32), leaf)


def test_pieces_of_large_tensors_by_threads():
    """Tensors of several pieces, cut and whole, in another dtype, read by more threads than there are cores."""
    shapes = {"a/kernel": (2, 1100, 2001), "b/embedding": (2001, 1100), "q/kernel": (1500, 800), "k/kernel": (1500, 500)}
    split = Conversion(stacks={"a": "a.{i}"}, exceptions=(("qk.weight", ("q/kernel", "k/kernel"), ("split", "transpose", 0)),))
    bits = np.random.default_rng(2).integers(0, 1 << 16, sum(map(np.prod, shapes.values())), np.uint16).view(ml_dtypes.bfloat16)
    parts = np.split(bits, np.cumsum([np.prod(shape) for shape in shapes.values()])[:-1])
    leaves = {path: part.reshape(shape) for (path, shape), part in zip(shapes.items(), parts, strict=True)}
    tree = {
        "a": {"kernel": leaves["a/kernel"]},
        "b": {"embedding": leaves["b/embedding"]},
        **{x: {"kernel": leaves[f"{x}/kernel"]} for x in "qk"},
    }
    entries = table(split, tree)
    tensors = {name: write_tensor(parts, lambda path, index: leaves[path][index]) for name, parts in by_tensor(entries).items()}
    asked = []

    def read(name, index):
        asked.append(name)
        return tensors[name][index]

    with ThreadPoolExecutor(8) as pool:
        for entry in entries:
            for index in ((slice(None),) * len(entry.shape), (slice(1, None), slice(3, -2), slice(300, -1))[-len(entry.shape) :]):
                got, expected = read_leaf(entry, index, read, np.float32, pool.map), leaves[entry.path][index].astype(np.float32)
                np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert len(asked) > 2 * sum(len(list(entry.tensors())) for entry in entries)


EVERY_BFLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def tricky_float32():
    """Around every bfloat16 what rounds down, ties and rounds up: normal, subnormal, infinite and NaNs of all payloads."""
    ends = np.asarray([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | ends).ravel().view(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 700), (700, 1), TILE, TILE[::-1], (513, 257), (1023, 1030)], ids=str)
@pytest.mark.parametrize("values", [EVERY_BFLOAT16, tricky_float32()], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_turned_copy_has_the_bits_of_a_cast(shape, values, dtype):
    for lies in (np.resize(values, shape), np.resize(values, (shape[0] + 1, shape[1] + 2))[1:, 1:-1]):
        expected = lies.astype(dtype).T
        out = np.empty((shape[1] + 1, shape[0] + 2), dtype)  # a part of a larger one
        copy_into(out[1:, 1:-1], lies.T)
        assert out[1:, 1:-1].tobytes() == expected.tobytes()
        straight = np.empty(shape, dtype)
        copy_into(straight, lies)
        assert straight.tobytes() == expected.T.tobytes()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_all_values_are_turned_alike():
    for values, dtype in ((EVERY_BFLOAT16, "float32"), (tricky_float32(), "bfloat16")):
        matrix = values.reshape(1 << 8, -1)
        out = np.empty(matrix.shape[::-1], dtype)
        copy_into(out, matrix.T)
        assert out.tobytes() == matrix.astype(dtype).T.tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (1, 3), (5, 0), (5000, 1), (100_000, 100), (300, 50_000)])
def test_runs_of_rows_are_all_rows(shape):
    runs = row_slices(shape[0], shape[0] * shape[1])
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(shape[0]))
    assert all((run.stop - run.start) * shape[1] <= max(PIECE, TILE[0] * shape[1]) for run in runs)


def test_layers_in_order_of_the_model():
    stack = {"layers": {"kernel": jax.ShapeDtypeStruct((12, 2, 2), np.float32), "bias": jax.ShapeDtypeStruct((12, 2), np.float32)}}
    names = list(by_tensor(table(Conversion(stacks={"layers": "layers.{i}"}), stack)))
    assert names == [f"layers.{i}.{leaf}" for i in range(12) for leaf in ("bias", "weight")]


@pytest.mark.parametrize(
    "exceptions",
    [
        [("b.weight", "a/kernel", "transpose")],  # two leaves, one tensor
        [("qk.weight", ("a/kernel", "b/kernel"), ("split", "transpose", 0)), ("qk.weight", "c/kernel", "copy")],
        [("x", "a/kernel", "rotate")],
    ],
)
def test_a_contradictory_table_is_refused(exceptions):
    tree = {name: {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)} for name in "abc"}
    with pytest.raises(ValueError):
        table(Conversion(stacks={}, exceptions=exceptions), tree)
