"""Score heads in Hugging Face folders: what `transformers` makes of ours, what we make of its, and back byte for byte."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import aligner
from aligner import convert
from aligner.convert.verify import verify
from aligner.models import SUPPORTED
from aligner.types import UserError
from tests.everyday import everyday
from tests.golden.checkpoints import EOS, IMAGE, LLAMA, PAD, TEXT, VISION, perturb, save_llama, save_llava
from tests.models import vision_configs
from tests.models.text_configs import FIRST, hf_config
from tests.torch_required import torch

BAR = 1e-4


def inputs(rows=3, columns=11):
    """Ragged, padded on the right, ending with EOS."""
    ids = np.random.default_rng(0).integers(7, 70, (rows, columns))
    lengths = np.array([columns, 6, 8])[:rows]
    ids[np.arange(rows), lengths - 1] = EOS
    mask = np.arange(columns) < lengths[:, None]
    return np.where(mask, ids, PAD), mask.astype(int), lengths


def close(ours, theirs):
    assert np.abs(ours - theirs).max() <= BAR * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("odd", everyday(["gqa", "mha_tied"], "gqa"))
def test_a_fresh_head_is_read_by_transformers(tmp_path, odd):
    """Language model -> score head -> folder -> LlamaForSequenceClassification: the same scores, no tensor missing or left over."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    save_llama(tmp_path / "lm", **LLAMA[odd])
    model, disk = convert.open_model(tmp_path / "lm", score_head=True)
    params = convert.load_params(model, disk)
    kernel = np.asarray(params["score"]["kernel"])
    assert kernel.shape == (TEXT["hidden_size"], 1) and 0.005 < kernel.std() < 0.05  # Hugging Face's initializer_range is 0.02
    assert "lm_head" not in params
    convert.save(model, params, tmp_path / "rm")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert isinstance(theirs, LlamaForSequenceClassification) and theirs.config.num_labels == 1
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, mask, lengths = inputs()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[:, 0]
    model, params = aligner.load(tmp_path / "rm")
    found = np.asarray(model.logits(params, {"input_ids": ids, "attention_mask": mask}))[np.arange(3), lengths - 1, 0]
    close(found, expected)


def test_a_folder_of_transformers_survives(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    theirs = perturb(LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=1)))
    theirs.save_pretrained(tmp_path / "rm")
    assert not verify(tmp_path / "rm").different
    model, params = aligner.load(tmp_path / "rm")
    assert model.has_score_head
    aligner.save(model, params, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (tmp_path / "rm" / "config.json").read_bytes()
    ids, mask, lengths = inputs()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[:, 0]
    found = np.asarray(model.logits(params, {"input_ids": ids, "attention_mask": mask}))[np.arange(3), lengths - 1, 0]
    close(found, expected)
    # asked for a score head, a folder that has one keeps it
    again, disk = convert.open_model(tmp_path / "rm", score_head=True)
    np.testing.assert_array_equal(convert.load_params(again, disk)["score"]["kernel"], params["score"]["kernel"])


@pytest.mark.slow
def test_llava_keeps_its_tensors_and_the_bare_model_reads_them(tmp_path):
    """The documented layout: `LlavaModel.from_pretrained` reads the folder, `score.weight` times its last hidden state is the score."""
    from transformers import LlavaModel

    save_llava(tmp_path / "lm")
    model, disk = convert.open_model(tmp_path / "lm", score_head=True)
    params = convert.load_params(model, disk)
    convert.save(model, params, tmp_path / "rm")
    assert not verify(tmp_path / "rm").different
    before, after = load_file(tmp_path / "lm" / "model.safetensors"), load_file(tmp_path / "rm" / "model.safetensors")
    assert before.keys() - after.keys() == {"language_model.lm_head.weight"} and after.keys() - before.keys() == {"score.weight"}
    assert all((after[name] == before[name]).all() for name in before.keys() & after.keys())
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["architectures"] == ["LlavaForSequenceClassification"]

    theirs, info = LlavaModel.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"score.weight"}
    features = (VISION["image_size"] // VISION["patch_size"]) ** 2
    ids = np.array([[1, *[IMAGE] * features, 8, 9, 10, EOS]])
    pixels = np.random.default_rng(1).normal(size=(1, 3, VISION["image_size"], VISION["image_size"])).astype(np.float32)
    with torch.no_grad():
        hidden = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).last_hidden_state[0, -1].numpy()
    model, params = aligner.load(tmp_path / "rm")
    assert model.has_score_head
    found = np.asarray(model.logits(params, {"input_ids": ids, "pixel_values": pixels}))[0, -1, 0]
    close(found, float(hidden @ after["score.weight"][0]))


def test_where_padding_is_the_end_transformers_still_reads_the_end(tmp_path):
    """With pad = EOS `transformers` would score the token before; our config then names no padding, and single rows agree."""
    from transformers import AutoModelForSequenceClassification

    save_llama(tmp_path / "lm", pad_token_id=EOS)
    model, disk = convert.open_model(tmp_path / "lm", score_head=True)
    convert.save(model, convert.load_params(model, disk), tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ids = inputs()[0][:1]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()[0, 0]
    model, params = aligner.load(tmp_path / "rm")
    close(np.asarray(model.logits(params, {"input_ids": ids}))[0, -1, 0], expected)


def test_a_classifier_is_no_reward_model(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=3)).save_pretrained(tmp_path / "c")
    with pytest.raises(UserError, match="3 labels"):
        convert.open_model(tmp_path / "c")


# ---- the other families


def classifiers() -> list[str]:
    """Families, of text or vision and language, for which `transformers` has a class with a score head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as names

    return [family for family in SUPPORTED if family in names]


EVERY_DAY = ("gpt_neox",)  # fused projections, a name of its own for the decoder


@pytest.mark.parametrize("family", everyday(classifiers(), *EVERY_DAY))
def test_families(tmp_path, family):
    """A folder of `transformers`: byte for byte back, the same scores here, nothing missing or left over when it reads ours again."""
    from transformers import AutoModelForSequenceClassification

    if family in FIRST:
        hf, vision = hf_config(family, **FIRST[family], num_labels=1), {}
    else:
        hf = vision_configs.hf_config(family, vision_configs.CASES[family][0])
        hf.num_labels = 1
        vision = vision_configs.batch(family, hf, [0])
    if hf.get_text_config().pad_token_id is None:
        hf.get_text_config().pad_token_id = hf.pad_token_id = 0
    torch.manual_seed(0)
    perturb(AutoModelForSequenceClassification.from_config(hf)).save_pretrained(tmp_path / "rm")
    assert not verify(tmp_path / "rm").different
    model, params = aligner.load(tmp_path / "rm")
    assert model.has_score_head
    aligner.save(model, params, tmp_path / "copy")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "copy", output_loading_info=True, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    given = vision or {"input_ids": np.random.default_rng(0).integers(3, 60, (1, 11))}
    with torch.no_grad():
        expected = theirs(**{name: torch.as_tensor(value) for name, value in given.items()}).logits.numpy()[:, 0]
    close(np.asarray(model.logits(params, given))[:, -1, 0], expected)
