"""Rows that cannot be learned from: each is counted under its reason and named by its number; nothing is left where all are so."""

import re

import pytest

from aligner.types import UserError
from tests.data import tiny
from tests.data.test_kinds import judged, load, ranked, talks, write


def pairs(count):
    return [{"prompt": f"what is {i}", "chosen": " yes", "rejected": " no"} for i in range(count)]


def told(*turns):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), turns)]


def ranking(*answers):
    return {"conversations": [{"from": "human", "value": "which?"}, {"from": "gpt", "value": list(answers)}]}


def safe(number, first=True):
    row = {"prompt": f"q {number}", "response_0": "a", "response_1": "b", "safer_response_id": 0}
    return row | {"is_response_0_safe": first, "is_response_1_safe": False}


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 3}}}]}
# name -> (kind of sample, good rows, the bad row, reason, what is said of it)
CASES = {
    "equal answers": ("preference", pairs, {"prompt": "q", "chosen": " a", "rejected": " a"}, "answers are equal", "are the same"),
    "an empty answer": ("preference", pairs, {"prompt": "q", "chosen": "  ", "rejected": " a"}, "empty answer", "chosen is empty"),
    "no shared prompt": (
        "preference", lambda n: [{"chosen": f"q {i} yes", "rejected": f"q {i} no"} for i in range(n)],
        {"chosen": "one", "rejected": "two"}, "empty prompt", "nothing stands before the answers",
    ),
    "a label that is none": ("unpaired", judged, judged(1)[0] | {"label": "good"}, "label is neither true nor false", "'good'"),
    "a label in between": ("unpaired_alone", judged, judged(1)[0] | {"label": 0.5}, "label is neither true nor false", "0.5"),
    "a list of one": ("ranked", ranked, ranking("only"), "no ranked answers", "at least two"),
    "a list of equals": ("ranked", ranked, ranking("a", "b", "a"), "answers are equal", "two of the ranked answers are the same"),
    "nothing imitated": ("supervised", talks, {"messages": told("hm")}, "nothing to imitate", ""),
    "a call that its template leaves out": (
        "supervised", talks, {"messages": told("2 times 3?", "") + [CALL]}, "tool calls", "the chat template leaves them out",
    ),
    "an empty turn": ("supervised", talks, {"messages": told("", "")}, "empty text", "only white space"),
    "no safety label": (
        "cost_last", lambda n: [safe(i) for i in range(n)], safe(0, first=None), "no safety label", "whether they are safe",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.text_model()


@pytest.mark.parametrize("name", CASES)
def test_is_counted_and_named(name, model, tmp_path):
    needs, good, bad, reason, detail = CASES[name]
    rows = good(6)
    rows.insert(3, bad)
    options = {"formatter": "safe_rlhf_cost"} if needs == "cost_last" else {}
    dataset = load(write(tmp_path / "rows.jsonl", rows), needs, model, **options)
    assert dataset.dropped == {reason: (1, [3])} and 3 not in dataset.row_ids
    assert any(f"{reason}: 1 (row" in line and "row 3" in line and detail in line for line in dataset.report), dataset.report
    with pytest.raises(UserError, match=rf"2 of 2 rows .*none is left: {re.escape(reason)}: 2 .*row 0") as error:
        load(write(tmp_path / "bad.jsonl", [bad, bad]), needs, model, **options)
    assert "\n" not in str(error.value)
