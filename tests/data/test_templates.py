"""Where the answer begins and ends, and what stands for an image."""

import numpy as np
import pytest

from aligner.data.census import _settings
from aligner.data.samples import Bad, Preference, Supervised
from aligner.data.templates import encode_answers, encode_preference, ends_with_eos
from aligner.data.turns import encode_supervised
from aligner.types import UserError
from tests.data import tiny
from tests.data.test_turns import assistant, user

USER = [{"role": "user", "content": "what is this"}]


def pair(prompt=USER, chosen="a cat", rejected="a dog"):
    return Preference(prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}])


def with_images(*references):
    parts = [{"type": "image", "image": reference} for reference in references]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this"}]}]


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("template", [tiny.CHATML, None], ids=["chatml", "no template"])
def test_prompt_answer_and_eos(pad, template):
    model = tiny.text_model(template, pad=pad)
    words = model.assets.tokenizer
    encoded = encode_preference(pair(), model.assets)
    prompt, chosen = words.decode(encoded.prompt), words.decode(encoded.answers[0])
    if template:
        assert prompt == "<|user|>\nwhat is this</s>\n<|assistant|>\n"
        assert chosen == "a cat</s>\n", "also what both answers begin with is scored"
    else:
        assert prompt.startswith("<s>USER: what is this ASSISTANT:") and chosen.endswith("cat</s>")
    assert ends_with_eos(encoded, words.eos_token_id)
    assert all(answer.dtype == np.int32 and words.eos_token_id in answer for answer in encoded.answers)


def test_plain_text_gets_eos_once_and_needs_one():
    model = tiny.text_model()
    encoded = encode_preference(Preference("q", " a", " b</s>"), model.assets)
    for answer in encoded.answers:
        assert (answer == model.assets.tokenizer.eos_token_id).sum() == 1 and answer[-1] == model.assets.tokenizer.eos_token_id
    model.assets.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encode_preference(Preference("q", " a", " b"), model.assets)


def test_a_template_without_eos_is_noticed():
    model = tiny.image_model(tiny.LLAVA)
    assert not ends_with_eos(encode_preference(pair(), model.assets, model.media), model.assets.tokenizer.eos_token_id)


def test_any_number_of_answers():
    model = tiny.text_model()
    answers = tuple([{"role": "assistant", "content": text}] for text in ("one", "two", "three"))
    encoded = encode_answers(USER, answers, model.assets)
    pairs = [encode_answers(USER, (answer,), model.assets) for answer in answers]
    for answer, alone in zip(encoded.answers, pairs):
        assert np.concatenate([encoded.prompt, answer]).tolist() == np.concatenate([alone.prompt, alone.answers[0]]).tolist()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAVA, None], ids=["chatml", "llava", "no template"])
@pytest.mark.parametrize("bos", [False, True])
def test_placeholders_are_those_of_the_processor(count, template, bos):
    from PIL import Image

    model = tiny.image_model(template, bos=bos)
    pictures = [Image.new("RGB", (9, 7), (i, i, i)) for i in range(count)]
    encoded = encode_preference(pair(with_images(*pictures)), model.assets, model.media)
    assert (encoded.prompt == model.media.placeholder).sum() == count * model.media.features
    text = "<image>\n" * count + "what is this"
    if template == tiny.CHATML:
        text = f"<|user|>\n{text}</s>\n<|assistant|>\na cat</s>\n"
    elif template == tiny.LLAVA:
        text = f"USER: {text} ASSISTANT: a cat "
    else:
        text = f"<s>USER: {text} ASSISTANT: a cat</s>"
    inputs = model.assets.processor(
        text=text, images=pictures or None, return_tensors="np", add_special_tokens=not text.startswith("<s>")
    )
    assert np.concatenate([encoded.prompt, encoded.answers[0]]).tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (pair([{"role": "user", "content": "<image> without an image"}]), "image placeholders"),
        (pair(with_images("a.png") + [{"role": "user", "content": "<image>"}]), "image placeholders"),
        (pair(chosen="see <image>"), "image placeholders"),
        (pair(chosen=[{"type": "image", "image": "a.png"}]), "image placeholders"),
        (pair(prompt=[]), "empty prompt"),
        (Preference("", "a", "b"), "empty prompt"),
        (Preference("a", "b</s>", "b"), "answers are equal"),
    ],
)
def test_rows_that_cannot_be_encoded(sample, reason):
    model = tiny.image_model()
    with pytest.raises(Bad) as caught:
        encode_preference(sample, model.assets, model.media)
    assert caught.value.reason == reason


def test_a_template_may_refuse():
    model = tiny.text_model("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Bad, match=r"chat template: .*roles must alternate"):
        encode_preference(pair(), model.assets)


def test_of_several_templates_that_for_tools_writes_tools():
    """As `transformers` chooses: a checkpoint may bring a template of its own for them, whose text the default has not."""
    marked = "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}"
    several = {"default": tiny.CHATML, "tool_use": "<s>{{ tools[0].name }}{% for m in messages %}" + marked + "{% endfor %}"}
    model = tiny.text_model(several)
    tokenizer, talk = model.assets.tokenizer, [user("what"), assistant("yes")]
    for tools in (None, [{"name": "look"}]):
        options = {} if tools is None else {"tools": tools}
        theirs = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=tools is not None, **options)
        pair = encode_preference(Preference(talk[:1], talk[1:], [assistant("no")], template=options), model.assets)
        turns = encode_supervised(Supervised(talk, template=options), model.assets)
        for encoded in (pair, turns):
            assert [*encoded.prompt, *encoded.answers[0]] == theirs["input_ids"]
        if tools is not None:
            assert [*[0] * len(turns.prompt), *turns.scored[0]] == theirs["assistant_masks"]
    keys = [_settings(tiny.text_model({**several, "tool_use": text})) for text in ("a", "b")]
    assert keys[0] != keys[1], "a census is taken anew when either is edited"
