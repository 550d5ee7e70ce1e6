"""Rows with sounds, from a file to the arrays of a batch: what a model reads is what its Hugging Face processor would give it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from aligner.convert import model_from_folder
from aligner.data import audio, loader
from aligner.logprobs import dense_logits
from aligner.types import UserError
from tests.data import tiny as data_tiny
from tests.models import tiny, vision_folders


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_audio")
    return model_from_folder(vision_folders.describe(folder, "qwen2_audio")), vision_folders.rows(folder / "rows", 4, sounds=True)


@pytest.mark.slow
def test_a_row_is_what_the_processor_gives(hearing):
    """Text by `Qwen2AudioProcessor`'s own template, features by its own extractor; logits as well."""
    model, data = hearing
    params, processor = tiny.perturbed(model), model.assets.processor
    dataset = loader.load_dataset(data_tiny.config(data), "train", model, progress=False)
    assert dataset.dropped == {} and dataset.shape[2] == 2
    logits = lambda batch: dense_logits(model.apply(params, batch, features=model.encode(params, batch)).hidden, model.head(params))
    for number, line in enumerate(map(json.loads, data.read_text().splitlines())):
        row = dataset.row(number)
        columns = np.isin(row["role"], (0, 2)) & (row["segment_ids"] > 0)
        sounds = [audio.load_audio(name, data.parent) for name in line["audios"]]
        text = processor.apply_chat_template(line["prompt"] + line["rejected"], tokenize=False)
        theirs = processor(text=[text], audio=sounds or None, sampling_rate=audio.RATE, return_tensors="np", add_special_tokens=False)
        np.testing.assert_array_equal(row["tokens"][columns], theirs["input_ids"][0])
        assert (row["media_index"] >= 0).sum() == (theirs["input_ids"] == model.media.placeholder).sum()
        assert row["image_mask"].sum() == len(sounds) == number % 3
        found, expected = logits({name: jnp.asarray(array)[None] for name, array in row.items()})[0][columns], logits(model.inputs(theirs))[0]
        assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("samples", "reason", "detail"), [(17_000, "audio too long", "1.1 seconds, the model hears 1 at most"), (900, "audio too short", "0.056 s"),
                                      (None, "unreadable audio", "none.wav")],
)  # fmt: skip
def test_a_sound_that_does_not_fit_is_dropped_and_counted(hearing, tmp_path, samples, reason, detail):
    model, data = hearing
    sound = "none.wav" if samples is None else {"array": [0.1] * samples, "sampling_rate": 16_000}
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    (data.parent / "broken.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[1] | {"audios": [sound]}])))
    dataset = loader.load_dataset(data_tiny.config(data.parent / "broken.jsonl"), "train", model, progress=False)
    assert dataset.dropped == {reason: (1, [4])} and detail in dataset.details[reason]


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [("feature_size", 8, "gives audios of 20 x 8, the model's audio tower takes 20 x 6; set feature_size and chunk_length"),
     ("chunk_length", 2, "gives audios of 40 x 6"), ("sampling_rate", 8000, "sampling_rate in preprocessor_config.json of .* is 8000")],
)  # fmt: skip
def test_an_extractor_that_does_not_fit_is_refused(hearing, monkeypatch, setting, value, sentence):
    model, _ = hearing
    monkeypatch.setattr(model.assets.processor.feature_extractor, setting, value)
    with pytest.raises(UserError, match=sentence):
        loader.check_assets(model)


@pytest.mark.parametrize(("model", "takes"), [(data_tiny.text_model, "llama model takes text only"), (data_tiny.image_model, "llava model takes text, image only")])
def test_a_model_that_hears_nothing_says_so(hearing, tmp_path, model, takes):
    path = tmp_path / "rows.jsonl"
    path.write_text(hearing[1].read_text().splitlines()[1])
    with pytest.raises(UserError, match=f"row 0 of .* holds an audio, but the {takes}; choose"):
        loader.load_dataset(data_tiny.config(path), "train", model(), progress=False)
