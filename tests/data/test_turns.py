"""Which tokens of a conversation are trained."""

import numpy as np
import pytest

from aligner.data.samples import Bad, Supervised
from aligner.data.templates import DEFAULT_TEMPLATE
from aligner.data.turns import encode_supervised
from tests.data import tiny


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = [user("what is this"), assistant("a cat"), user("and this?"), assistant("a dog 🐈 in the house")]


def tokens(encoded):
    return np.concatenate([encoded.prompt, *encoded.answers])


def mask(encoded):
    scored = [np.ones(len(answer), bool) for answer in encoded.answers] if encoded.scored is None else encoded.scored
    return np.concatenate([np.zeros(len(encoded.prompt), bool), *scored])


def runs(encoded, model):
    """The texts of the stretches that are trained."""
    ids, trained = tokens(encoded), mask(encoded)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [model.assets.tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2])]


def encode(conversation, model, prompt="", loss_on="assistant"):
    return encode_supervised(Supervised(conversation, prompt), model.assets, model.media, loss_on)


def test_every_turn_of_the_assistant_with_its_end():
    model = tiny.text_model()
    assert runs(encode(TALK, model), model) == ["a cat</s>\n", "a dog 🐈 in the house</s>\n"]
    assert runs(encode(TALK, model, loss_on="last"), model) == ["a dog 🐈 in the house</s>\n"]
    whole = encode(TALK, model, loss_on="all")
    assert mask(whole).tolist() == [False] + [True] * (len(tokens(whole)) - 1)
    assert np.array_equal(tokens(whole), tokens(encode(TALK, model))), "what is trained does not change the tokens"


def test_what_the_assistant_is_asked_with_is_not_trained():
    model = tiny.text_model(DEFAULT_TEMPLATE)
    assert runs(encode(TALK, model), model) == [" a cat</s>", " a dog 🐈 in the house</s>"]
    talk = [user("x"), assistant("a"), assistant("b"), user("y"), assistant("c")]
    plain = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    model = tiny.text_model(plain)
    assert runs(encode(talk, model), model) == [" a\n", " b\n", " c\n"]


def test_a_conversation_that_the_assistant_opens():
    model = tiny.text_model(DEFAULT_TEMPLATE)
    assert runs(encode([assistant("hi there"), user("hi"), assistant("yes")], model), model) == ["hi there</s>", " yes</s>"]


def test_templates_that_do_not_grow_turn_by_turn():
    length = "{% for m in messages %}{{ loop.length }}{{ m['content'] | trim }}<end>{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    model = tiny.text_model(length)
    assert runs(encode(TALK, model), model) == ["a cat<end>", "a dog 🐈 in the house<end>"]
    closing = tiny.CHATML.replace("{{ eos_token }}", "<end>") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    model = tiny.text_model(closing)
    assert runs(encode(TALK, model), model) == ["a cat<end>\n", "a dog 🐈 in the house<end>\n</s>"]
    spaced = "{% for m in messages %}the {{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    model = tiny.text_model(spaced + "{% if add_generation_prompt %}the assistant:{% endif %}")
    trained = [" a cat", " a dog 🐈 in the house "]
    assert runs(encode(TALK, model), model) == trained, "a token that joins the next turn's word is not the assistant's"


def test_prompt_and_completion():
    model = tiny.text_model()
    assert runs(encode([assistant("a dog")], model, prompt=TALK[:3]), model) == ["a dog</s>\n"], "as pairs: all that follows the prompt"
    assert runs(encode(TALK[2:], model, prompt=TALK[:2]), model) == ["a dog 🐈 in the house</s>\n"], "turns of the prompt are context"
    assert runs(encode(" blue.", model, prompt="The sky is"), model) == [" blue.</s>"]
    assert runs(encode("The sky is blue.", model), model) == ["he sky is blue.</s>"]
    several = [assistant("a dog"), assistant("yes")]
    assert runs(encode(several, model, prompt=TALK[:3]), model) == ["a dog</s>\n<|assistant|>\nyes</s>\n"]
    assert runs(encode(several, model, prompt=TALK[:3], loss_on="last"), model) == ["yes</s>\n"], "the last message alone"
    everything = encode([assistant("a dog")], model, prompt=TALK[:3], loss_on="all")
    assert mask(everything).tolist() == [False] + [True] * (len(tokens(everything)) - 1)


def test_images_in_any_turn():
    model = tiny.image_model()
    looks = lambda text, name: user([{"type": "image", "image": name}, {"type": "text", "text": text}])
    talk = [looks("what", "a.png"), assistant("a cat"), looks("and this", "b.png"), assistant("a dog")]
    encoded = encode(talk, model)
    assert encoded.media == (("image", "a.png"), ("image", "b.png")) and runs(encoded, model) == ["a cat</s>\n", "a dog</s>\n"]
    assert (tokens(encoded) == model.media.placeholder).sum() == 2 * model.media.features
    everything = encode(talk, model, loss_on="all")
    assert not mask(everything)[tokens(everything) == model.media.placeholder].any(), "pictures are not predicted"
    with pytest.raises(Bad, match="assistant's turn holds an image"):
        encode([user("show"), {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}, user("x"), assistant("y")], model)


def test_a_processor_that_adds_the_special_tokens():
    body = "{% if message['role'] == 'assistant' %}{% generation %}"
    for end, template in {
        "\n": tiny.CHATML,
        "": "{% for message in messages %}<|{{ message['role'] }}|>\n" + body + "{{ message['content'][0]['text'] }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}\n{% endfor %}",
    }.items():
        model = tiny.image_model(template, bos=True)
        encoded = encode(TALK, model)
        assert encoded.prompt[0] == model.assets.tokenizer.bos_token_id
        assert runs(encoded, model) == [f"a cat</s>{end}", f"a dog 🐈 in the house</s>{end}"]


NEVER = "{% for m in messages %}x{% if m['role'] == 'nobody' %}{% generation %}y{% endgeneration %}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("conversation", "template", "reason"),
    [
        ([user("what"), user("who")], tiny.CHATML, "no turn of the assistant"),
        (TALK, NEVER, r"marks no token .*'s: \{% for m in messages"),
    ],
)
def test_nothing_is_trained_by_guess(conversation, template, reason):
    with pytest.raises(Bad, match=reason):
        encode(conversation, tiny.text_model(template))
