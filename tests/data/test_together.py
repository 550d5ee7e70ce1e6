"""Rows that are encoded side by side become what each becomes alone."""

import numpy as np
import pytest

from aligner.data import together
from aligner.data.samples import Bad, Preference, Supervised
from aligner.data.templates import encode_preference
from aligner.data.together import Texts, encoder
from aligner.data.turns import encode_supervised
from aligner.types import UserError
from tests.data import tiny
from tests.data.test_turns import TALK, assistant, user

TEXTS = ["a cat", "", "the 🐈's house", " two  spaces\n", "</s> in the text"]


@encoder
def ids(texts, tokenizer, special=True, spans=False):
    if "bad" in texts:
        raise Bad("no good", "as asked")
    found = yield Texts(tokenizer, [text for text in texts if text != "late"], special, spans)
    if "late" in texts:
        raise Bad("too late")
    more = yield Texts(tokenizer, ["once more"], not special)
    return [one.ids.tolist() for one in (*found, *more)], [one.spans if spans else None for one in found]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("spans", [True, False])
def test_as_the_tokenizer_says(special, spans):
    tokenizer = tiny.tokenizer(bos=True)
    found, where = ids(TEXTS, tokenizer, special, spans)
    expected = tokenizer(TEXTS, add_special_tokens=special, return_offsets_mapping=True)
    assert found == [*expected["input_ids"], tokenizer("once more", add_special_tokens=not special)["input_ids"]]
    assert all(one is None for one in where) or [one.tolist() for one in where] == [[[*pair] for pair in one] for one in expected["offset_mapping"]]
    assert spans == (where[0] is not None)


@pytest.mark.parametrize("bytes_fall_back", [True, False])
def test_tokens_over_characters(bytes_fall_back):
    """They are those whose span is not empty and meets the range; a character of several tokens brings all of them."""
    tokenizer = byte_level() if bytes_fall_back else tiny.tokenizer(bos=True)

    @encoder
    def located(text):
        [tokens] = yield Texts(tokenizer, [text], True, True)
        return tokens

    for text in TEXTS:
        tokens = located(text)
        starts, ends = tokens.spans.T
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                found = np.zeros(len(tokens.ids), bool)
                found[tokens.over(start, end)] = True
                np.testing.assert_array_equal(found, (ends > start) & (starts < end) & (ends > starts), f"{text!r}, {start} to {end}")


def byte_level():
    """A tokenizer that knows no word, so that a character outside of ASCII takes several tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_many_with_some_that_fail(monkeypatch):
    monkeypatch.setattr(together, "MOST_CHARACTERS", 12)  # several calls
    one, other = tiny.tokenizer(bos=True), tiny.tokenizer()
    asked = [(["a cat"], one), (["bad"], one), (["in the house"], other, False), (["late", "x"], one), (["a dog", "a cat"], one, True, True)]
    found = together.together(ids.steps(*one) for one in asked)
    for got, wanted in zip(found, asked):
        if wanted[0][0] in ("bad", "late"):
            with pytest.raises(Bad) as caught:
                ids(*wanted)
            assert (got.reason, got.detail) == (caught.value.reason, caught.value.detail)
        else:
            assert got[0] == ids(*wanted)[0]
    assert together.together([]) == []


def test_a_tokenizer_whose_python_half_does_more():
    made = tiny.tokenizer()
    plain = ids(TEXTS, made)[0]

    class Louder(type(made)):
        def __call__(self, text, **options):
            return super().__call__([one.upper() for one in text] if isinstance(text, list) else text.upper(), **options)

    made.__class__ = Louder
    assert ids(TEXTS, made)[0] == [made(text)["input_ids"] for text in (*TEXTS, "once more")] != plain


def test_a_tokenizer_that_cuts_and_pads():
    made = tiny.tokenizer()
    made.backend_tokenizer.enable_truncation(2)
    made.backend_tokenizer.enable_padding(length=40)
    assert ids(TEXTS, made)[0][0] == tiny.tokenizer()("a cat")["input_ids"]


def test_a_slow_tokenizer():
    made = tiny.tokenizer()

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            found = made(text, **options)
            return {"input_ids": found["input_ids"]}

    assert ids(TEXTS, Slow())[0] == ids(TEXTS, made)[0]
    with pytest.raises(UserError, match=r"add tokenizer\.json"):
        ids(TEXTS, Slow(), True, True)


def test_whole_rows():
    model = tiny.text_model()
    said = [encode_supervised.steps(Supervised(TALK[:n]), model.assets) for n in (2, 4, 2)]
    pairs = [encode_preference.steps(Preference([user("hi")], [assistant(a)], [assistant(b)]), model.assets) for a, b in ("xy", "ab")]
    found = together.together([*said, *pairs])
    alone = [encode_supervised(Supervised(TALK[:n]), model.assets) for n in (2, 4, 2)]
    alone += [encode_preference(Preference([user("hi")], [assistant(a)], [assistant(b)]), model.assets) for a, b in ("xy", "ab")]
    for a, b in zip(found, alone):
        parts = [(a.prompt, b.prompt), *zip(a.answers, b.answers), *zip(a.scored or (), b.scored or ())]
        assert len(a.answers) == len(b.answers) and all(np.array_equal(x, y) for x, y in parts)
