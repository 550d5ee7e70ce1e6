"""What users get for bad input: one sentence that names the thing, where it is, and the nearest fix."""

import io
import json

import pytest
from PIL import Image

from aligner.data.loader import load_dataset
from aligner.types import UserError
from tests.data import tiny

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SEEN = {"question": "q", "chosen": "a", "rejected": "b"}


def told(path, model=None, needs="preference", **options):
    """The one sentence that a dataset is refused with."""
    with pytest.raises(UserError) as caught:
        load_dataset(tiny.config(path, **{"max_bad_fraction": 0.0} | options), "train", model or tiny.text_model(), needs, progress=False)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith((".", ")")) and len(sentence) < 500, sentence
    return sentence


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_a_truncated_line_is_named_by_its_number(tmp_path):
    path = write(tmp_path, PAIR, PAIR, json.dumps(PAIR)[:20])
    assert told(path).startswith(f"{path}, line 3: not valid JSON (Unterminated string")


def test_a_wrong_column_says_what_is_found_and_needed(tmp_path):
    sentence = told(write(tmp_path, {"prompt": "p", "good": "a", "bad": "b"}))
    assert "the rows have the columns prompt, good, bad" in sentence and "'llava_ranked' needs conversations" in sentence
    assert "package.module:function" in sentence


@pytest.mark.parametrize(
    ("image", "what"),
    [
        ("../secret.png", "image outside of the folder: 1 (rows 0; row 0: ../secret.png leaves"),
        ("https://example.org/a.png", "image is a URL: 1 (rows 0; row 0: https://example.org/a.png: images are not fetched"),
        ("gone.png", "unreadable image: 1 (rows 0; row 0: gone.png: does not exist"),
    ],
)
def test_images_that_may_not_be_read(tmp_path, image, what):
    (tmp_path / "here").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    assert what in told(write(tmp_path / "here", SEEN | {"image": image}), tiny.image_model())


def test_a_bomb_of_a_hundred_megapixels(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    assert len(buffer.getvalue()) < 1 << 20
    sentence = told(write(tmp_path, SEEN | {"image": "bomb.png"}), tiny.image_model())
    assert "unreadable image: 1" in sentence and "10000 x 10001 is more than 89478485 pixels" in sentence


def test_a_template_that_fails_to_render(tmp_path):
    path = write(tmp_path, {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"})
    refuses = "{{ raise_exception('no users here') }}"
    assert "the chat template refuses the conversation: no users here" in told(path, tiny.text_model(refuses))
    assert "line 1: " in told(path, tiny.text_model("{% for %}")) and "config.data.chat_template" in told(path, tiny.text_model("{% for %}"))


def test_mixed_schemas(tmp_path):
    path = write(tmp_path, PAIR, PAIR, {"prompt": "p", "completion": "c"}, {"messages": []})
    sentence = told(path)
    assert "2 of 4 rows" in sentence and "missing column: 2 (rows 2, 3; row 2: 'chosen', the row has prompt, completion)" in sentence


def test_sounds_for_a_model_that_hears_nothing(tmp_path):
    rows = {"messages": [{"role": "user", "content": "<audio>what?"}, {"role": "assistant", "content": "a"}], "audios": ["a.wav"]}
    assert "row 0 of" in (sentence := told(write(tmp_path, rows), needs="supervised")) and "holds an audio" in sentence
