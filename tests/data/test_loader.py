"""The census and the stream of batches."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from aligner.data import census
from aligner.data.loader import attach, batches, check_assets, eval_batches, load_dataset
from aligner.types import UserError
from tests.data import tiny


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count):
    return [{"prompt": f"what is {i}", "chosen": " yes" * (i % 3 + 1), "rejected": " no"} for i in range(count)]


def picture_rows(folder, count):
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (9, 13, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return [{"image": f"{i}.png", "question": f"what is {i}", "chosen": "a cat", "rejected": "a dog"} for i in range(count)]


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("ten") / "rows.jsonl", text_rows(10))
    return load_dataset(tiny.config(path), "train", tiny.text_model(), progress=False)


def test_a_dataset(ten):
    assert ten.size == ten.rows_total == 10 and ten.row_ids.tolist() == list(range(10)) and ten.dropped == {}
    T, S, I = ten.shape
    assert T % 8 == S % 8 == 0 and I == 0
    row = ten.row(3)
    assert row["tokens"].shape == (T,) and row["score_token"].shape == (S,) and row["example_id"].tolist() == [3]
    assert "pixel_values" not in row
    assert "10 of 10 rows kept" in ten.report[0]


def test_census_drops_by_reason(tmp_path):
    rows = picture_rows(tmp_path, 12)
    rows[1]["chosen"] = " "
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[3]["image"] = "missing.png"
    rows[4]["question"] = "<image><image> two?"
    rows[5]["question"] = "word " * 300
    del rows[6]["rejected"]
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:100])
    rows[8]["image"] = "../outside.png"
    rows[9]["image"] = "missing too.png"
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = load_dataset(tiny.config(path, max_length=100), "train", tiny.image_model(), progress=False)
    assert dataset.dropped == {
        "empty answer": (1, [1]),
        "answers are equal": (1, [2]),
        "unreadable image": (3, [3, 7, 9]),
        "image placeholders": (1, [4]),
        "too long": (1, [5]),
        "missing column": (1, [6]),
        "image outside of the folder": (1, [8]),
    }
    assert dataset.row_ids.tolist() == [0, 10, 11] and dataset.size == 3 and dataset.rows_total == 12
    assert any("unreadable image: 3 (rows 3, 7, 9; row 3: missing.png: does not exist" in line for line in dataset.report)
    with pytest.raises(UserError, match=r"9 of 12 rows .*max_bad_fraction allows 50.0%: unreadable image: 3 .*too long: 1"):
        load_dataset(tiny.config(path, max_length=100, max_bad_fraction=0.5), "train", tiny.image_model(), progress=False)
    with pytest.raises(UserError, match=r"12 of 12 rows .*none is left"):
        load_dataset(tiny.config(path, max_length=3), "train", tiny.image_model(), progress=False)


def test_pixels_arrive_where_the_tokens_point(tmp_path):
    rows = picture_rows(tmp_path, 3)
    rows[1] |= {"images": ["0.png", "1.png"]}
    rows[2]["image"] = None
    model = tiny.image_model()
    dataset = load_dataset(tiny.config(write(tmp_path / "rows.jsonl", rows)), "train", model, progress=False)
    assert dataset.shape[2] == 2 and any("1 rows without an image" in line for line in dataset.report)
    processor = model.assets.processor.image_processor
    pixels = processor([Image.open(tmp_path / f"{i}.png") for i in range(3)], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    batch = next(eval_batches(dataset, 4))
    assert np.array_equal(batch["pixel_values"][0], [pixels[0], np.zeros_like(pixels[0])])
    assert np.array_equal(batch["pixel_values"][1], pixels[:2])
    assert batch["image_mask"].tolist() == [[True, False], [True, True], [False, False], [False, False]]
    for b, count in enumerate([1, 2, 0, 0]):
        index = batch["media_index"][b]
        assert index[index >= 0].tolist() == list(range(count * model.media.features))


def test_parquet_with_images_inside(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    rows = picture_rows(tmp_path, 3)
    features = Features({"image": Picture()} | {name: Value("string") for name in ("question", "chosen", "rejected")})
    full = [row | {"image": str(tmp_path / row["image"])} for row in rows]
    Dataset.from_list(full, features=features).to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset(tiny.config(tmp_path / "rows.parquet"), "train", tiny.image_model(), progress=False)
    named = load_dataset(tiny.config(write(tmp_path / "rows.jsonl", rows)), "train", tiny.image_model(), progress=False)
    assert stored.size == 3 and stored.fingerprint == named.fingerprint
    equal(next(eval_batches(stored, 3)), next(eval_batches(named, 3)))


def test_images_for_a_text_model(tmp_path):
    path = write(tmp_path / "rows.jsonl", picture_rows(tmp_path, 2))
    with pytest.raises(UserError, match=r"row 0 of .* holds an image, but the llama model takes text only"):
        load_dataset(tiny.config(path), "train", tiny.text_model(), progress=False)


def test_a_processor_that_does_not_fit_the_model():
    model = tiny.image_model()
    model.media = type(model.media)(model.media.placeholder, 16, 16, 16)
    with pytest.raises(UserError, match="gives images of 8 x 8, the model's vision tower takes 16 x 16"):
        check_assets(model)
    model.media = type(model.media)(7, 4, 8, 8)
    with pytest.raises(UserError, match=r"gives <image> the id 3, .* 7"):
        check_assets(model)


def test_fingerprint_sees_rows_images_template_and_processor(tmp_path):
    path = write(tmp_path / "rows.jsonl", picture_rows(tmp_path, 3))
    prints = []

    def take(model, path=path):
        prints.append(load_dataset(tiny.config(path), "train", model, progress=False).fingerprint)

    take(tiny.image_model())
    take(tiny.image_model())
    assert prints[0] == prints[1], "the same input gives the same fingerprint"
    take(tiny.image_model(tiny.LLAVA))
    other = tiny.image_model()
    other.assets.processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    take(other)
    Image.new("RGB", (5, 5)).save(tmp_path / "1.png")
    take(tiny.image_model())
    take(tiny.image_model(), write(tmp_path / "more.jsonl", picture_rows(tmp_path, 2)))
    assert len(set(prints)) == 5


def test_census_is_kept_and_taken_again_when_something_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [*text_rows(4), {"prompt": "q", "chosen": "a", "rejected": "a"}])
    model, kept = tiny.text_model(), tmp_path / "kept"
    taken = []
    count = census._count
    monkeypatch.setattr(census, "_count", lambda *args: taken.append(1) or count(*args))

    def load(config):
        return load_dataset(config, "train", model, cache_dir=kept, progress=False)

    first, second = load(tiny.config(path)), load(tiny.config(path))
    assert len(taken) == 1
    monkeypatch.chdir(tmp_path)
    load(tiny.config(path.name))
    assert len(taken) == 1, "the same file, by another name"
    for name in ("fingerprint", "dropped", "report", "shape"):
        assert getattr(first, name) == getattr(second, name)
    load(tiny.config(path, max_length=1000))
    load(tiny.config(path, size=3))
    model.assets.tokenizer.chat_template = tiny.LLAVA
    load(tiny.config(path))
    write(path, text_rows(5))
    load(tiny.config(path))
    assert len(taken) == 5
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert load(tiny.config(path)).size == 5 and len(taken) == 6, "a torn file is not believed"


def ids_of(stream, count):
    return np.concatenate([next(stream)["example_id"][:, 0] for _ in range(count)])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_gets_no_bar(tmp_path, monkeypatch, terminal):
    """Lines that a terminal draws over each other stay one after another there."""
    model, disabled = tiny.text_model(), []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("aligner.console.tqdm", lambda **options: disabled.append(options["disable"]) or tqdm(disable=True))
    load_dataset(tiny.config(write(tmp_path / "rows.jsonl", text_rows(3))), "train", model)
    assert disabled == [not terminal]


def test_every_epoch_has_every_row_once_in_another_order(ten):
    order = ids_of(batches(ten, 4, seed=1, shuffle=True), 15).reshape(6, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order), "batches of 4 run over the borders of 10"
    assert len({tuple(epoch) for epoch in order}) == 6
    assert not np.array_equal(order[0], ids_of(batches(ten, 4, seed=2, shuffle=True), 3)[:10])
    assert ids_of(batches(ten, 4, seed=1, shuffle=False), 5).tolist() == [*range(10)] * 2


def test_order_does_not_depend_on_batch_size_or_threads(ten):
    import dataclasses

    one = ids_of(batches(ten, 1, seed=3, shuffle=True), 30)
    for size, workers in [(3, 1), (10, 7), (15, 0)]:
        other = dataclasses.replace(ten, workers=workers)
        assert np.array_equal(ids_of(batches(other, size, seed=3, shuffle=True), 30 // size), one)


@pytest.mark.parametrize(("epochs", "size", "count"), [(1, 4, 3), (1, 5, 2), (2.0, 4, 5), (0.5, 1, 5), (0.3, 1, 3), (0.01, 4, 1)])
def test_epochs(ten, epochs, size, count):
    assert len(list(batches(ten, size, seed=0, shuffle=True, epochs=epochs))) == count


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_at_any_point(ten, shuffle):
    def make(**options):
        return batches(ten, 3, seed=5, shuffle=shuffle, epochs=2, **options)

    whole = list(make())
    for k in range(len(whole) + 1):
        stream = make()
        for _ in range(k):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        stream.close()
        for resumed in (make(), make(start=k), stream):
            resumed.set_state(state)
            rest = list(resumed)
            assert len(rest) == len(whole) - k
            for a, b in zip(rest, whole[k:]):
                equal(a, b)


@pytest.mark.parametrize("halves", [(slice(0, 2), slice(2, 4)), (np.array([0, 3]), np.array([1, 2]))])
def test_processes_together_load_the_whole(ten, halves):
    whole = batches(ten, 4, seed=1, shuffle=True, epochs=2)
    parts = [batches(ten, 4, seed=1, shuffle=True, epochs=2, rows=rows) for rows in halves]
    for batch, *pieces in zip(whole, *parts):
        for rows, piece in zip(halves, pieces):
            equal({name: array[rows] for name, array in batch.items()}, piece)
    ends = [eval_batches(ten, 4, rows=rows) for rows in halves]
    for batch, *pieces in zip(eval_batches(ten, 4), *ends):
        for rows, piece in zip(halves, pieces):
            equal({name: array[rows] for name, array in batch.items()}, piece)


def test_a_state_is_good_for_another_number_of_processes(ten):
    stream = batches(ten, 4, seed=1, shuffle=True)
    next(stream), next(stream)
    half = batches(ten, 4, seed=1, shuffle=True, rows=slice(2, 4))
    half.set_state(stream.get_state())
    assert np.array_equal(next(stream)["example_id"][2:], next(half)["example_id"])


def test_eval_sees_every_row_once(ten):
    seen = list(eval_batches(ten, 4))
    assert np.concatenate([batch["example_id"][:, 0] for batch in seen]).tolist() == [*range(10), -1, -1]
    assert not seen[-1]["score_segment"][2:].any() and not seen[-1]["role"][2:].any() and not seen[-1]["segment_ids"][2:].any()
    assert len({batch["tokens"].shape for batch in seen}) == 1


def test_attach(ten):
    column = np.arange(20, dtype=np.float32).reshape(10, 2)
    *_, last = eval_batches(ten, 4)
    batch = attach(last, {"reference_logps": column})
    assert batch["reference_logps"].tolist() == [[[16, 17]], [[18, 19]], [[0, 0]], [[0, 0]]]
    assert batch["reference_logps"].dtype == np.float32 and "reference_logps" not in last


def test_an_image_that_vanishes_while_training(tmp_path):
    dataset = load_dataset(tiny.config(write(tmp_path / "r.jsonl", picture_rows(tmp_path, 2))), "train", tiny.image_model(), progress=False)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"row 1 of .* now not: unreadable image: 1.png"):
        list(eval_batches(dataset, 2))
