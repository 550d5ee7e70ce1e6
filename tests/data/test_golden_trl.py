"""Tokens and masks against TRL's own preprocessing, row by row."""

from tests.torch_required import torch  # isort: skip
import copy
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aligner.data.formatters import find_formatter
from aligner.data.samples import as_preference
from aligner.data.templates import DEFAULT_TEMPLATE, encode_preference
from tests.data import tiny


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def ours(row, model):
    _, to_sample = find_formatter("auto", list(row), "data.train")
    return encode_preference(as_preference(to_sample(row)), model.assets, model.media)


CHAT = user("what is this") + assistant("a cat") + user("and this?")
TEXT_ROWS = {
    "standard": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
    "standard, merges over the boundary": {"prompt": "what is thi", "chosen": "s house", "rejected": "s picture"},
    "standard, only the first merges": {"prompt": "what is thi", "chosen": "s house", "rejected": "- no"},
    "standard, only the second merges": {"prompt": "what is thi", "chosen": "- no", "rejected": "s house"},
    "standard, EOS there": {"prompt": "a", "chosen": " b</s>", "rejected": " c"},
    "implicit text": {"chosen": "Human: hi\n\nAssistant: I think so", "rejected": "Human: hi\n\nAssistant: I do not"},
    "conversation": {"prompt": CHAT, "chosen": assistant("a dog"), "rejected": assistant("a dog and a cat")},
    "system": {"prompt": [{"role": "system", "content": "Be brief."}, *CHAT], "chosen": assistant("x"), "rejected": assistant("y")},
    "implicit conversation": {"chosen": CHAT + assistant("a dog"), "rejected": CHAT + assistant("no dog")},
    "several messages": {"prompt": user("q"), "chosen": assistant("a") + CHAT + assistant("b"), "rejected": assistant("c")},
    "unicode": {"prompt": user("什么 🐈‍⬛?"), "chosen": assistant("猫"), "rejected": assistant("犬 é")},
}


@pytest.mark.parametrize("name", TEXT_ROWS)
@pytest.mark.parametrize("options", [{}, {"bos": True}, {"pad": "</s>"}, {"template": DEFAULT_TEMPLATE}], ids=str)
def test_text_rows_equal_trl(name, options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, row = tiny.text_model(**options), TEXT_ROWS[name]
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None, report_to="none")
    trainer = SimpleNamespace(_tokenizer=model.assets.tokenizer)
    theirs = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), model.assets.tokenizer, args, "train")[0]
    encoded = ours(row, model)
    assert encoded.prompt.tolist() == theirs["prompt_ids"]
    assert encoded.answers[0].tolist() == theirs["chosen_ids"]
    assert encoded.answers[1].tolist() == theirs["rejected_ids"]


def picture(seed=0, size=(13, 9)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


PARTS = [{"type": "text", "text": "first"}, {"type": "image"}, {"type": "text", "text": "or second"}, {"type": "image"}]
IMAGE_ROWS = {
    "one image": {"images": [picture()], "prompt": user("what is this"), "chosen": assistant("a cat"), "rejected": assistant("a dog")},
    "image column": {"image": picture(), "prompt": user("what is this"), "chosen": assistant("a"), "rejected": assistant("b")},
    "two images": {"images": [picture(1), picture(2)], "prompt": CHAT, "chosen": assistant("a"), "rejected": assistant("b c")},
    "parts": {
        "images": [picture(1), picture(2)],
        "prompt": [{"role": "user", "content": PARTS}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "first"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "second"}]}],
    },
    "no image": {"images": [], "prompt": user("hello"), "chosen": assistant("hi"), "rejected": assistant("no")},
}


@pytest.mark.parametrize("name", IMAGE_ROWS)
@pytest.mark.parametrize("options", [{}, {"template": tiny.LLAVA}, {"pad": "</s>"}], ids=["chatml", "llava", "pad=eos"])
def test_image_rows_equal_trl(name, options):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    from aligner.data.media import open_image, read_pictures

    model, row = tiny.image_model(**options), IMAGE_ROWS[name]
    encoded = ours(row, model)
    theirs = DataCollatorForVisionPreference(model.assets.processor)([copy.deepcopy(row)])
    for r, answer in enumerate(encoded.answers):
        length = int(theirs["attention_mask"][r].sum())
        assert np.concatenate([encoded.prompt, answer]).tolist() == theirs["input_ids"][r, :length].tolist()
        assert [0] * len(encoded.prompt) + [1] * len(answer) == theirs["completion_mask"][r, :length].tolist()
    if encoded.media:
        found = read_pictures([open_image(image, ".") for _, image in encoded.media], model.media, model.assets.processor.image_processor)
        pixels = np.concatenate([picture.arrays["pixel_values"] for picture in found])
        expected = theirs["pixel_values"][: len(encoded.media)].permute(0, 2, 3, 1)  # TRL repeats them for the second answer
        assert torch.equal(torch.from_numpy(pixels), expected.float())


def test_whole_text_is_what_the_processor_gives_at_inference():
    """Where pieces do not compose (TRL's vision collator tokenises answers alone, without BOS), the whole text is what the model meets."""
    model = tiny.image_model(tiny.LLAVA, bos=True)
    encoded = ours(IMAGE_ROWS["one image"], model)
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is this"}]
    conversation = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    text = model.assets.processor.apply_chat_template(conversation)
    inputs = model.assets.processor(text=text, images=[picture()], return_tensors="np")
    assert np.concatenate([encoded.prompt, encoded.answers[0]]).tolist() == inputs["input_ids"][0].tolist()
    assert encoded.prompt[0] == model.assets.tokenizer.bos_token_id
