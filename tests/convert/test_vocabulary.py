"""Added vocabulary: the folder is what `transformers` reads, old rows as they were, new ones their mean."""

import numpy as np
import pytest

import aligner
from aligner.convert import __main__ as command
from aligner.convert.vocabulary import add_tokens
from aligner.trees import flatten
from aligner.types import UserError
from scripts import make_tiny_checkpoint
from tests.models import vision_folders
from tests.torch_required import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("vocabulary") / "model"
    make_tiny_checkpoint.make_llava(made, vocab_size=300, hidden_size=16, heads=2, kv_heads=2, image_size=16, patch_size=8,
                                    vision_hidden_size=8, vision_layers=2, vision_heads=2)  # fmt: skip
    return made


def test_added_tokens_are_reloaded_by_transformers(folder, tmp_path, capsys):
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    arguments = ["add-tokens", "--model", str(folder), "--tokens", "<tool>", "</tool>", "--out", str(tmp_path / "out"), "--pad-to-multiple", "8"]
    assert command.main(arguments) == 0 and "<tool>" in capsys.readouterr().out
    old, tokenizer = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "out")
    known = len(old)
    assert tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"]) == [known, known + 1]
    ids = tokenizer("It is <tool>red</tool>.", return_tensors="pt")
    assert {known, known + 1} <= set(ids["input_ids"][0].tolist())
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, _ = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for which in ("get_input_embeddings", "get_output_embeddings"):
        new, was = getattr(theirs, which)().weight.detach(), getattr(before, which)().weight.detach()
        assert len(new) % 8 == 0 and len(new) >= known + 2
        assert torch.equal(new[:known], was[:known])
        assert torch.allclose(new[known:], was[:known].mean(0, keepdim=True), atol=1e-5)
    with torch.no_grad():
        expected = theirs(**ids).logits.numpy()
    model, params = aligner.load(tmp_path / "out")
    found = np.asarray(model.logits(params, {name: value.numpy() for name, value in ids.items()}))
    assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_tokens_that_are_there_already(folder, tmp_path):
    with pytest.raises(UserError, match="has all of <image> already; nothing to add"):
        add_tokens(folder, ["<image>"], tmp_path / "out")


def test_rows_without_a_token_count_as_rows(folder, tmp_path):
    """A vocabulary that is padded already stays at least as long, and is rounded up as any."""
    source = folder
    for number, (multiple, rows) in enumerate([(100, 400), (32, 416), (1, 416)]):
        add_tokens(source, [f"<{number}>"], tmp_path / str(number), multiple)
        source = tmp_path / str(number)
        assert aligner.load(source)[0].config.text_config.vocab_size == rows
    with pytest.raises(UserError, match="a multiple of 0; give 1 or more"):
        add_tokens(folder, ["<tool>"], tmp_path / "none", 0)


def test_an_embedding_with_more_rows_than_the_head(tmp_path):
    """Mllama's has eight more, for the image token and others that are never written."""
    folder = vision_folders.save(tmp_path, "mllama")
    add_tokens(folder, ["<tool>", "</tool>"], tmp_path / "out")
    before, after = (flatten(aligner.load(where)[1]["language_model"]) for where in (folder, tmp_path / "out"))
    known = len(vision_folders.WORDS)
    for path, axis, rows in (("model/embed_tokens/embedding", 0, known + 10), ("lm_head/kernel", 1, known + 2)):
        was, now = np.moveaxis(before[path], axis, 0)[:known], np.moveaxis(after[path], axis, 0)
        assert len(now) == rows and np.array_equal(now[:known], was)
        assert np.allclose(now[known:], was.mean(0), atol=1e-6)
