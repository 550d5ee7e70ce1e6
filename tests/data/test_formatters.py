"""Rows of real datasets' shapes become the samples they mean."""

import re

import pytest

from aligner.data.by_columns import question
from aligner.data.formatters import find_formatter, place_images, split_prompt
from aligner.data.kinds import ENCODERS
from aligner.data.mixture import open_samples
from aligner.data.samples import (
    Bad,
    Document,
    Preference,
    Ranked,
    Stepwise,
    Supervised,
    Triple,
    TwoSided,
    Unpaired,
    as_preference,
    as_ranked,
    as_supervised,
    as_triple,
    check,
    unpair,
)
from aligner.data.turns import encode_supervised
from aligner.types import UserError
from tests.data import tiny


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def image(reference):
    return {"type": "image", "image": reference}


def text(words):
    return {"type": "text", "text": words}


def formatted(row, name="auto"):
    return find_formatter(name, list(row), "data.train")[1](row)


def test_trl_strings_stay_plain_text():
    assert formatted({"prompt": "a", "chosen": "b", "rejected": "c"}) == Preference("a", "b", "c")


def test_trl_messages_and_mixed_forms():
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert formatted(row) == Preference([user("q")], [assistant("a")], [assistant("b")])
    assert formatted(row | {"chosen": "a", "rejected": "b"}) == formatted(row)
    assert formatted(row | {"prompt": "q"}) == formatted(row)


def test_implicit_prompt_is_the_shared_start():
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert formatted(row) == Preference([user("q")], [assistant("a")], [assistant("b")])
    # UltraFeedback: a string prompt beside whole conversations
    assert formatted({"prompt": "q"} | row) == formatted(row)
    assert split_prompt("Q: x A: yes", "Q: x A: no") == ("Q: x A:", " yes", " no")
    assert split_prompt("ab", "abc") == ("a", "b", "bc")
    with pytest.raises(Bad, match="empty answer"):
        split_prompt("", "a")


def test_images_go_where_the_text_marks_them_else_to_the_front():
    row = {"prompt": [user("q"), assistant("a"), user("r")], "chosen": [assistant("x")], "rejected": [assistant("y")]}
    assert formatted(row | {"images": ["1.png", "2.png"]}).prompt[0] == user([image("1.png"), image("2.png"), text("q")])
    marked = row | {"prompt": [user("<image>\nq"), assistant("a"), user("r <image> s")], "images": ["1.png", "2.png"]}
    prompt = formatted(marked).prompt
    assert prompt[0] == user([image("1.png"), text("q")])
    assert prompt[2] == user([text("r "), image("2.png"), text(" s")])
    filled = [user([text("q"), {"type": "image", "text": None}])]  # Parquet writes None for missing keys
    assert formatted(row | {"prompt": filled, "image": "1.png"}).prompt == [user([text("q"), image("1.png")])]
    assert marked["prompt"][0] == user("<image>\nq"), "rows are not changed in place"


def test_marks_and_images_must_agree_in_number():
    for content, images in [("<image> <image> q", ["1.png"]), ([{"type": "image"}, text("q")], []), ("<image>", ["1", "2"])]:
        with pytest.raises(Bad) as caught:
            place_images([user(content)], images)
        assert caught.value.reason == "image placeholders"


def test_plain_prompt_with_an_image():
    row = {"prompt": "what?", "chosen": "a", "rejected": "b", "images": ["1.png"]}
    assert formatted(row) == Preference([user([image("1.png"), text("what?")])], [assistant("a")], [assistant("b")])
    rendered = formatted(row | {"prompt": "USER: <image>\nwhat? ASSISTANT:"})
    assert rendered == Preference([text("USER: "), image("1.png"), text("what? ASSISTANT:")], "a", "b")


def test_rlaif_v_is_preferred_over_trl_by_its_columns():
    row = {"image": {"bytes": b"x", "path": None}, "question": "q", "chosen": "a", "rejected": "b", "ds_name": "c"}
    assert find_formatter("auto", list(row), "data.train")[0] == "rlaif_v"
    assert formatted(row) == Preference([user([image(row["image"]), text("q")])], [assistant("a")], [assistant("b")])
    with_system = question({"system": "s", "question": "q", "chosen": "a", "rejected": "b"})
    assert with_system.prompt == [{"role": "system", "content": "s"}, user("q")]


def test_llava_ranked_list():
    turns = [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": ["best", "middle", "worst"]}]
    sample = formatted({"id": "1", "image": "1.jpg", "conversations": turns})
    assert isinstance(sample, Ranked) and len(sample.completions) == 3
    assert sample.prompt == [user([text("what?"), image("1.jpg")])]
    assert as_preference(sample) == Preference(sample.prompt, [assistant("best")], [assistant("worst")])
    with pytest.raises(Bad, match="no ranked answers"):
        formatted({"conversations": [turns[0], {"from": "gpt", "value": "one"}]})


def test_sharegpt_pair():
    row = {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}
    row |= {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    expected = [{"role": "system", "content": "s"}, user("q")]
    assert formatted(row) == Preference(expected, [assistant("a")], [assistant("b")])


def test_conversations_beside_whole_answers_are_no_prompt():
    """AutoAlign writes the chosen conversation a second time; taken for the prompt, it would show the model its answer."""
    human, a, b = ({"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"})
    row = {"prompt": "q", "conversations": [human, a], "chosen": [human, a], "rejected": [human, b]}
    assert formatted(row) == Preference([user("q")], [assistant("a")], [assistant("b")])
    with pytest.raises(Bad, match="ends with an answer"):
        formatted({"conversations": [human, a], "chosen": a, "rejected": b})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "missing column"),
        ({"prompt": "q", "chosen": "a"}, "missing column"),
        ({"prompt": [{"role": "wizard", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [user([{"type": "smell", "smell": "v"}])], "chosen": "a", "rejected": "b"}, "unknown content"),
        ({"prompt": 3, "chosen": ["a"], "rejected": ["b"]}, "unexpected value"),
    ],
)
def test_odd_rows_become_counted_reasons(row, reason):
    with pytest.raises(Bad) as caught:
        find_formatter("trl", ["prompt", "chosen", "rejected"], "data.train")[1](row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None stands where a text or messages"),
        (3, "3 stands where a text or messages"),
        (["a"], "'a' stands where a message should be, {'role': .., 'content': ..}"),
        ([{"content": "a"}], "{'content': 'a'} stands where a message should be"),
        ([assistant(3)], "3 stands where the content of a message"),
        ([assistant(["a"])], "'a' stands where a part of a message should be, {'type': 'text', 'text': ..}"),
        ([assistant([{"text": "a"}])], "{'text': 'a'} stands where a part of a message"),
        ([assistant([{"type": "text"}])], "{'type': 'text'} stands where a part of a message"),
    ],
)
def test_a_value_of_another_type_is_shown(value, shown):
    """What Python says of it, such as "'NoneType' object is not iterable" or "'from'", helps nobody."""
    row = {"image": "a.png", "question": "q", "chosen": value, "rejected": "b"}
    with pytest.raises(Bad, match=re.escape(f"unexpected value: {shown}")):
        find_formatter("rlaif_v", list(row), "data.train")[1](row)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (Preference("q", "a", "a"), "answers are equal"),
        (Preference("q", [assistant(" \n")], [assistant("a")]), "empty answer"),
        ("a string", "not a pair"),
    ],
)
def test_what_is_no_pair(pair, reason):
    with pytest.raises(Bad) as caught:
        as_preference(pair)
    assert caught.value.reason == reason


def test_missing_columns_name_what_is_found_and_needed():
    with pytest.raises(UserError, match=r"columns query, good, bad; .*needs.*chosen, rejected.*package.module:function"):
        find_formatter("auto", ["query", "good", "bad"], "data.train")
    with pytest.raises(UserError, match=r"columns prompt; 'rlaif_v' needs image, question, chosen, rejected"):
        find_formatter("rlaif_v", ["prompt"], "data.train")
    with pytest.raises(UserError, match="no 'sharegtp'; did you mean 'sharegpt'"):
        find_formatter("sharegtp", ["prompt"], "data.train")


def by_hand(row):
    return Preference(row["a"], row["b"], row["c"])


def test_a_function_of_ones_own():
    assert find_formatter(f"{__name__}:by_hand", ["a"], "data.train")[1]({"a": "q", "b": "x", "c": "y"}) == Preference("q", "x", "y")
    with pytest.raises(UserError, match="cannot be imported"):
        find_formatter(f"{__name__}:nothing", ["a"], "data.train")


def sample(row, needs):
    """(name of the formatter, sample) for an algorithm that needs samples of a kind."""
    name, to_sample = find_formatter("auto", list(row), "data.train", ENCODERS[needs].takes)
    return name, to_sample(row)


TURNS = [user("q"), assistant("a"), user("r"), assistant("b")]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"messages": TURNS}, "messages", Supervised(TURNS)),
        ({"conversations": SHAREGPT, "system": "s"}, "conversations", Supervised([{"role": "system", "content": "s"}, *TURNS])),
        ({"prompt": "p", "completion": " c"}, "prompt_completion", Supervised(" c", "p")),
        ({"prompt": TURNS[:1], "completion": TURNS[1:2]}, "prompt_completion", Supervised(TURNS[1:2], TURNS[:1])),
        ({"prompt": "q", "response": "a"}, "prompt_response", Supervised([assistant("a")], [user("q")])),
        ({"question": "q", "answer": "a"}, "question_answer", Supervised([assistant("a")], [user("q")])),
        ({"instruction": "q", "input": "", "output": "a", "text": "t"}, "alpaca", Supervised([assistant("a")], [user("q")])),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", Supervised([assistant("a")], [user("q\ni")])),
        ({"text": "words"}, "text", Document("words")),
        ({"prompt": "q", "response": "bad", "refinement": "good"}, "language_feedback",
         Preference([user("q")], [assistant("good")], [assistant("bad")])),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "messages": TURNS}, "trl", Preference("p", "c", "r")),
    ],
)  # fmt: skip
def test_what_is_imitated(row, name, expected):
    assert sample(row, "supervised") == (name, expected)


def test_images_of_what_is_imitated():
    row = {"prompt": "q", "completion": "a", "images": ["1.png"]}
    assert sample(row, "supervised")[1] == Supervised([assistant("a")], [user([image("1.png"), text("q")])])
    llava = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}
    assert sample(llava, "supervised")[1] == Supervised([user([image("1.png"), text("q")]), assistant([text("a")])])


def test_corrections_as_aligner_learns_them():
    name, found = sample({"question": "q", "answer": "a", "correction": "c"}, "supervised")
    assert name == "aligner" and found.conversation == [assistant("c")]
    assert found.prompt[0]["content"].endswith(": q | a")


def test_self_play_and_feedback_pairs():
    row = {"real": [user("q"), assistant("a")], "generated": [user("q"), assistant("b")]}
    assert sample(row, "preference") == ("spin", Preference([user("q")], [assistant("a")], [assistant("b")]))
    row = {"prompt": "q", "response": "b", "refinement": "a"}
    assert sample(row, "preference")[1] == Preference([user("q")], [assistant("a")], [assistant("b")])


def test_a_pair_with_a_gold_answer():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "c"}
    tpo = find_formatter("auto", [*row], "data.train", (Triple,))[1]
    assert tpo(row) == Triple(Preference("q", "a", "b"), "c")
    whole = {"chosen": "q: a", "rejected": "q: b", "reference": "q: c"}
    assert tpo(whole) == Triple(Preference("q:", " a", " b"), " c")
    talk = {key: [user("q"), assistant(answer)] for key, answer in (("chosen", "a"), ("rejected", "b"), ("reference", "c"))}
    assert tpo(talk) == Triple(Preference([user("q")], [assistant("a")], [assistant("b")]), [assistant("c")])
    shown = tpo(row | {"image": "cat.png"})
    assert shown.gold == [assistant("c")] and shown.pair.chosen == [assistant("a")]
    with pytest.raises(Bad, match="`reference` does not begin"):
        tpo(whole | {"reference": "other"})
    assert find_formatter("auto", [*row], "data.train")[0] == "trl"


def test_margin_and_safety():
    assert sample({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, "preference")[1].margin == 2.0
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    row |= {"is_response_0_safe": True, "is_response_1_safe": False}
    assert sample(row, "preference")[1] == Preference([user("q")], [assistant("b")], [assistant("a")], safe=(-1, 1))
    with pytest.raises(Bad, match="neither 0 nor 1"):
        sample(row | {"better_response_id": 2}, "preference")


def test_judged_answers():
    assert sample({"prompt": "p", "completion": "c", "label": True}, "unpaired") == ("unpaired", Unpaired("p", "c", True))
    assert sample({"messages": TURNS, "label": False}, "unpaired")[1] == Unpaired(TURNS[:3], TURNS[3:], False)
    assert sample({"conversations": SHAREGPT, "label": 1}, "unpaired")[1] == Unpaired(TURNS[:3], TURNS[3:], 1)
    with pytest.raises(Bad, match="does not end with the assistant"):
        sample({"messages": TURNS[:3], "label": False}, "unpaired")
    pair = Preference("p", "c", "r")
    assert unpair(pair, 0) == Unpaired("p", "c", True) and unpair(pair, 1) == Unpaired("p", "r", False)


def test_samples_from_others():
    ranking = Ranked("p", ("a", "b", "c"))
    assert as_supervised(ranking) == Supervised("a", "p") and as_ranked(Preference("p", "a", "b")) == Ranked("p", ("a", "b"))
    for answers, reason in ((("a",), "at least two"), (("a", " "), "answer 2 is empty"), (("a", "b", "a"), "the same")):
        with pytest.raises(Bad, match=reason):
            as_ranked(Ranked("p", answers))
    for other in (Unpaired("p", "c", True), None):
        with pytest.raises(Bad, match="nothing to imitate"):
            as_supervised(other)


def test_scores_decide_whatever_the_order_and_ties_are_no_pair():
    """A formatter of a user's may give answers in any order."""
    ranking = Ranked("p", ("a", "b", "c"), (1.0, 3.0, 2.0))
    assert as_ranked(ranking).completions == ("b", "c", "a") and as_ranked(ranking).scores == (3.0, 2.0, 1.0)
    assert as_preference(ranking) == Preference("p", "b", "a") and as_supervised(ranking) == Supervised("b", "p")
    for scores, reason in (((2.0, 2.0), "tie: all 2 answers have the score 2.0"), ((1.0, float("nan")), "not finite"), ((1.0,), "1 scores for 2")):
        with pytest.raises(Bad, match=reason):
            as_preference(Ranked("p", ("a", "b"), scores))
    row = {"prompt": "q", "completions": ["a", "b"], "scores": [4, 4]}
    with pytest.raises(Bad, match="tie"):
        as_preference(sample(row, "preference")[1])


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_options_reach_the_samples_within_a_sample():
    """Tools of rows for TPO and SSO are not lost."""
    talk = lambda answer: [user("q"), assistant(answer)]
    row = {"chosen": talk("a"), "rejected": talk("b"), "reference": talk("c"), "tools": TOOLS}
    assert find_formatter("tpo", [*row], "data.train", (Triple,))[1](row).pair.template == {"tools": TOOLS}
    row = {"p_system": "+", "n_system": "-", "chosen": talk("a"), "rejected": talk("b"), "raw": talk("c"), "tools": TOOLS}
    found = find_formatter("sso", [*row], "data.train", (TwoSided,), {"thinking": False})[1](row)
    assert found.good.template == found.bad.template == {"thinking": False, "tools": TOOLS}
    model = tiny.text_model("{{ tools | length }}" + tiny.CHATML)
    triple = as_triple(Triple(Preference([user("q")], [assistant("a")], [assistant("b")], template={"tools": TOOLS}), [assistant("c")]))
    encoded = ENCODERS["triple"].encode(triple, model, {})
    assert model.assets.tokenizer.decode(encoded.prompt).startswith("1")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_message_keeps_what_it_was_thought_of_with(name):
    """Servers and datasets have three names for it; all of them reach a template that reads one."""
    row = {"messages": [user("hi"), assistant("yes") | {name: "so it seems"}]}
    sample = find_formatter("auto", [*row], "data.train", (Supervised,))[1](row)
    model = tiny.text_model("{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}{{ m.content + eos_token }}{% endfor %}")
    encoded = encode_supervised(sample, model.assets)
    assert "so it seemsyes</s>" in model.assets.tokenizer.decode(encoded.answers[0])


def test_a_message_keeps_what_else_a_template_reads():
    extras = {"tool_responses": [{"name": "f", "response": 6}], "tool_plan": "ask", "recipient": "browser", "end_turn": False}
    row = {"messages": [user("hi"), assistant("yes") | extras | {"id": 7, "name": None}]}
    sample = find_formatter("auto", [*row], "data.train", (Supervised,))[1](row)
    assert sample.conversation == [user("hi"), assistant("yes") | extras]


def test_a_message_that_only_calls_needs_no_content():
    """OpenAI's and TRL's rows may leave it out, or have null there; a message that says and calls nothing is a broken row."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    for message in (call, call | {"content": None}):
        row = {"messages": [user("hi"), message, assistant("yes")]}
        assert find_formatter("auto", [*row], "data.train", (Supervised,))[1](row).conversation[1] == call | {"content": ""}
    row = {"messages": [user("hi"), {"role": "assistant"}]}
    with pytest.raises(Bad, match="missing column: a message of 'assistant' without content"):
        find_formatter("auto", [*row], "data.train", (Supervised,))[1](row)


def test_options_that_are_not_the_templates():
    row = {"prompt": [user("q")], "chosen": "a", "rejected": "b", "chat_template_kwargs": {"add_generation_prompt": True}}
    with pytest.raises(Bad, match="unexpected value: chat_template_kwargs sets add_generation_prompt"):
        sample(row, "preference")
    with pytest.raises(UserError, match=r"config.data.train.template sets shown"):
        find_formatter("auto", ["text"], "data.train", (Document,), {"shown": 1})


def test_half_a_character_in_any_part_of_a_sample():
    for broken in (Triple(Preference("p", "a", "b"), "\ud800"), Triple(Preference("p", "\ud800", "b"), "c"), Stepwise("p", ("\ud800",), (True,))):
        with pytest.raises(Bad, match="half a character"):
            check(broken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":x", "cannot be imported"),
        ("nowhere:x", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "is a float, no function"),
        ("fractions:Fraction.x", "cannot be imported"),
        ("aligner.data.samples:Document", "cannot be imported"),
    ],
)
def test_a_formatter_that_is_none(name, message):
    with pytest.raises(UserError, match=rf"config.data.train.formatter: {name} {message}"):
        find_formatter(name, ["text"], "data.train")


def test_ids_that_are_numbers_of_another_type():
    """Tables write whole numbers with a point where one is missing."""
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1.0}
    assert sample(row, "preference")[1] == Preference([user("q")], [assistant("b")], [assistant("a")])
    with pytest.raises(Bad, match="tie"):
        find_formatter("PKUSafeRLHF", [*row], "data.train")[1](row | {"better_response_id": 0.5})


def test_a_seed_of_zero_is_a_seed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(50)))

    def taken(own, seed):
        section = tiny.source(path, fraction=0.2, seed=own)
        rows = open_samples(section, "data.train", ENCODERS["text"], seed)
        return [rows.read(i).text for i in range(len(rows))]

    assert taken(0, 7) == taken(0, 8) == taken(None, 0) != taken(None, 7)


def test_a_formatter_of_another_kind():
    with pytest.raises(UserError, match=r"'alpaca' makes samples of type Supervised, but config.algorithm takes Preference or Ranked"):
        find_formatter("alpaca", ["instruction", "output"], "data.train")
