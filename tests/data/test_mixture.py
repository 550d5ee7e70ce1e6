"""Several datasets as one: which rows an epoch holds, in what order, and who reads them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from aligner.data import loader, mixture
from aligner.data.loader import batches, eval_batches, load_dataset
from aligner.data.tokens import pack, unpack
from aligner.rl import prompts
from aligner.rl.prompts import load_prompts
from aligner.types import UserError
from tests.data import tiny


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    pairs = [{"prompt": f"what is {i}", "chosen": " yes" * (i % 3 + 1), "rejected": " no"} for i in range(12)]
    talks = [{"question": f"q {i}", "response_0": "a cat", "response_1": "a dog", "better_response_id": i % 2} for i in range(8)]
    ours = [{"prompt": row["question"], **row} for row in talks]
    return write(tmp_path / "pairs.jsonl", pairs), write(tmp_path / "safe.jsonl", ours)


def load(entries, needs="preference", cache_dir=None, seed=0, model=None, **changes):
    config = tiny.config("", seed=seed, **changes)
    with config.unlocked():
        config.data.train.mixture = tuple(entries)
    return load_dataset(config, "train", model or tiny.text_model(), needs, cache_dir=cache_dir, progress=False)


def ids(stream):
    return [int(i) for batch in stream for i in batch["example_id"].ravel() if i >= 0]


def test_counts_and_choices():
    none = (None, None)
    assert mixture.counts([10, 6], [none, none]) == [10, 6]
    assert mixture.counts([10, 6], [(0.5, None), (2, None)]) == [5, 12]
    assert mixture.counts([10, 6], [(None, 1), (None, 3)]) == [4, 12]
    assert sum(mixture.counts([7, 7, 7], [(None, 1.0)] * 3)) == 21
    assert mixture.counts([10], [(0.001, None)]) == [1]
    rows, times = mixture.choose(10, 4, seed=1)
    assert len(set(rows)) == 4 and times.tolist() == [1] * 4 and rows.tolist() == sorted(rows)
    assert mixture.choose(10, 4, seed=1)[0].tolist() == rows.tolist() != mixture.choose(10, 4, seed=2)[0].tolist()
    rows, times = mixture.choose(4, 10, seed=1)
    assert rows.tolist() == [0, 1, 2, 3] and sorted(times) == [2, 2, 3, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_holds_what_was_asked_for(files, packing, tmp_path):
    pairs, safe = files
    entries = [dict(path=pairs, fraction=0.5), dict(path=safe, fraction=2.0, formatter="safe_rlhf")]
    dataset = load(entries, packing=packing, packed_length=200, cache_dir=tmp_path)
    seen = Counter(ids(eval_batches(dataset, 4)))
    assert [seen[i] for i in range(14)] == [1] * 6 + [2] * 8, "half of the first, all of the second twice"
    assert dataset.rows_total == 14 and dataset.row_ids.tolist() == sorted(seen.elements())
    again = load(entries, packing=packing, packed_length=200, cache_dir=tmp_path)
    assert again.fingerprint == dataset.fingerprint and ids(eval_batches(again, 4)) == ids(eval_batches(dataset, 4))
    assert load(entries, packing=packing, packed_length=200, seed=5).fingerprint != dataset.fingerprint
    assert "pairs.jsonl (6 of 12 rows an epoch) + " in dataset.report[0] and "trl, safe_rlhf" in dataset.report[0]


def test_prompts_stand_in_an_epoch_as_often_as_was_asked_for(files):
    """As rows that are learned from do; a weight or fraction that repeats prompts was passed over."""
    pairs, safe = files
    config = tiny.config("", formatter="prompt_only")
    config.generation = dict(max_new_tokens=8, server="")
    with config.unlocked():
        config.data.train.mixture = (dict(path=pairs, weight=1.0), dict(path=safe, weight=4.0))
    asked = load_prompts(config, "train", tiny.text_model())
    assert asked.size == len(asked.lengths) == 20
    for epoch in range(2):
        seen = Counter(asked.item(place).row for place in range(20 * epoch, 20 * epoch + 20))
        assert [seen[i] for i in range(12)] == [1] * 4 + [2] * 8, "4 of the 12 pairs, all of the other 8 twice"


def test_text_is_read_by_one_thread(files, monkeypatch):
    """Threads that only handle text wait for each other, whether it is learned from or answered; `config.data.workers` decode media."""
    asked = []
    for module in (loader, prompts):
        counting = lambda *args, take=module.take_census, **options: asked.append(options["workers"]) or take(*args, **options)
        monkeypatch.setattr(module, "take_census", counting)
    config = tiny.config(files[0], workers=3)
    config.generation = dict(max_new_tokens=8, server="")
    for model in (tiny.text_model(), tiny.image_model()):
        load_dataset(config, "train", model)
        load_prompts(config, "train", model)
    assert asked == [1, 1, 3, 3]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_row_once_an_epoch_whoever_reads_and_wherever_it_stops(files, packing, processes, tmp_path):
    """Batches of 8 over 8 devices, by one process or two of four devices; stopped after every batch and taken up again."""
    dataset = load([dict(path=path) for path in files], packing=packing, packed_length=200, cache_dir=tmp_path)
    options = dict(batch_size=8, seed=3, shuffle=True)
    whole = batches(dataset, **options)
    count = 2 * dataset.size // 8 + 1
    expected = [next(whole)["example_id"] for _ in range(count)]
    epoch = np.concatenate(expected)[: dataset.size]
    assert sorted(int(i) for i in epoch.ravel() if i >= 0) == list(range(20))

    parts = [slice(8 // processes * p, 8 // processes * (p + 1)) for p in range(processes)]
    found = [[] for _ in parts]
    for rows, mine in zip(parts, found):
        state = {"next_batch": 0}
        for _ in range(count):
            stream = batches(dataset, rows=rows, **options)  # a process that was killed and started anew
            stream.set_state(state)
            mine.append(next(stream)["example_id"])
            state = json.loads(json.dumps(stream.get_state()))
            stream.close()
    for k in range(count):
        assert np.array_equal(np.concatenate([mine[k] for mine in found]), expected[k])


def test_a_row_is_never_its_own_mismatched_answer(files):
    dataset = load([dict(path=path, fraction=2.0) for path in files], needs="unpaired")
    assert dataset.size == 80 and dataset.rows_total == 40
    tokenizer = tiny.tokenizer()
    for number in range(dataset.size):
        row = dataset.row(number)
        texts = [tokenizer.decode(row["tokens"][row["role"] == role]) for role in (1, 2)]
        assert all(texts)


def test_formatter_and_template_arguments_of_each(tmp_path):
    template = "{{ mood or 'plain' }}: {% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    own = row | {"chat_template_kwargs": {"mood": "own"}}
    first, second = write(tmp_path / "a.jsonl", [row, own]), write(tmp_path / "b.jsonl", [row])
    model = tiny.text_model(template)
    dataset = load([dict(path=first, template=dict(mood="gay")), dict(path=second)], "supervised", model=model)
    texts = [model.assets.tokenizer.decode(dataset.row(i)["tokens"]) for i in range(3)]
    assert [text.split(":")[0] for text in texts] == ["gay", "own", "plain"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([dict(pth="a")], "mixture\\[0\\] has no key 'pth'; did you mean 'path'"),
        ([dict(weight=1)], "has no path"),
        ([dict(path="{0}", weight=1), dict(path="{1}")], "some datasets have a weight and some have none"),
        ([dict(path="{0}", weight=1, fraction=1)], "a fraction and a weight"),
        ([dict(path="{0}", weight=-1)], "weight is -1; it must be a number above 0"),
        ([dict(path="{0}"), dict(path="nothing.jsonl")], "config.data.train.mixture\\[1\\].path: nothing.jsonl does not exist"),
        ([dict(path="{0}"), dict(path="{1}", formatter="llava_ranked")], "mixture\\[1\\]: the rows have the columns .*needs conversations"),
    ],
)
def test_what_makes_no_sense(files, entries, message):
    with pytest.raises(UserError, match=message):
        load([entry | ({"path": entry["path"].format(*files)} if "path" in entry else {}) for entry in entries])


def test_reasons_name_the_file(files, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}])
    dataset = load([dict(path=files[0]), dict(path=bad)])
    assert dataset.dropped == {"answers are equal": (1, [12])} and any("rows 0 of bad.jsonl" in line for line in dataset.report)


def test_tokens_are_kept_and_read_back(files, tmp_path, monkeypatch):
    fresh = [*map(load([dict(path=path) for path in files]).row, range(20))]
    kept = load([dict(path=path) for path in files], cache_dir=tmp_path)
    monkeypatch.setattr("aligner.data.templates.render", None)  # neither is anything rendered
    monkeypatch.setattr("aligner.data.templates.plain_text", None)
    for i in range(20):
        a, b = fresh[i], kept.row(i)
        assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)
    store = next(tmp_path.glob("*.tokens"))
    monkeypatch.undo()
    whole = store.read_bytes()
    for place in range(0, len(whole), 7):  # a flipped bit, wherever it is: the row is made again
        store.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        reread = [*map(kept.row, range(20))]
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(fresh, reread) for name in a)
    store.write_bytes(whole[:-1])  # torn: read and written again
    assert load([dict(path=path) for path in files], cache_dir=tmp_path).fingerprint == kept.fingerprint


def test_an_example_as_bytes():
    from aligner.data.templates import Encoded

    ints = lambda *values: np.array(values, np.int32)
    plain = Encoded(ints(1, 2), (ints(3), ints(4, 5)))
    masked = Encoded(ints(), (ints(3, 4, 5),), (), (np.array([True, False, True]),), {"label": 1.0, "scores": [0.5, float("inf")]})
    for encoded in (plain, masked):
        again = unpack(pack(encoded))
        assert again.values == encoded.values and again.media == ()
        pairs = [(encoded.prompt, again.prompt), *zip(encoded.answers, again.answers), *zip(encoded.scored or (), again.scored or ())]
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        assert len(again.answers) == len(encoded.answers) and (again.scored is None) == (encoded.scored is None)


CHILD = """
import sys, json, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from aligner import sharding
from aligner.data.loader import batches
from aligner.run import local_rows
from tests.data.test_mixture import load
mesh = sharding.make_mesh({"data": -1, "fsdp": 2})
dataset = load([dict(path=path) for path in sys.argv[3:]])
stream = batches(dataset, 8, seed=3, shuffle=True, rows=local_rows(mesh, 8))
stream.set_state({"next_batch": 1})
print("ROWS", json.dumps([local_rows(mesh, 8).tolist(), [next(stream)["example_id"].ravel().tolist() for _ in range(4)]]))
"""


@pytest.mark.slow
def test_two_processes_of_four_devices(files):
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = lambda i: subprocess.Popen(
        [sys.executable, "-c", CHILD, address, str(i), *files], env=environment, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = [json.loads(child.communicate(timeout=300)[0].split("ROWS")[1]) for child in [run(0), run(1)]]
    stream = batches(load([dict(path=path) for path in files]), 8, seed=3, shuffle=True)
    stream.set_state({"next_batch": 1})
    assert sorted(found[0][0] + found[1][0]) == list(range(8))
    for k in range(4):
        whole = next(stream)["example_id"].ravel()
        for rows, mine in found:
            assert whole[rows].tolist() == mine[k]
