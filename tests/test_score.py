"""`python -m aligner.score` end to end on a tiny model: values, order, what cannot be scored, and going on after a kill."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import aligner
from aligner import by_row, convert, score
from aligner.data.by_columns import scores
from aligner.data.filters import plain
from aligner.data.samples import Ranked
from aligner.data.sources import Rows
from aligner.models import from_hf
from scripts.make_tiny_checkpoint import make_llama
from tests.data import tiny as data_tiny
from tests.models import tiny
from tests.models.text_configs import FIRST, hf_config

PAIRS = [
    {"prompt": "Which is larger, 3 or 5?", "chosen": "It is 5.", "rejected": "It is 3, I do not know.", "note": i} for i in range(7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a reward model, and rows of which two cannot be scored."""
    folder = tmp_path_factory.mktemp("score")
    make_llama(folder / "lm", hidden_size=32, layers=1, heads=2, kv_heads=1)
    model, disk = convert.open_model(folder / "lm", score_head=True)
    convert.save(model, convert.load_params(model, disk), folder / "rm")
    rows = [{**row, "prompt": row["prompt"] + " One" * (i % 3)} for i, row in enumerate(PAIRS)]
    rows[2]["chosen"] = None
    rows[5]["prompt"] = "long " * 300
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder, out, model="rm", *more):
    return ["--model", str(folder / model), "--data", str(folder / "rows.jsonl"), "--out", str(folder / out), "--dtype", "float32",
            "--max-length", "200", "--batch-size", "4", *more]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_rewards_from_the_command_line(folder):
    done = subprocess.run([sys.executable, "-m", "aligner.score", *command(folder, "scored.jsonl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read(folder / "scored.jsonl")
    assert [row["note"] for row in found] == list(range(7))
    assert found[5]["not_scored"].startswith("too long") and "not_scored" in found[2]
    model, params = aligner.load(folder / "rm")
    for i in (0, 4):
        for answer, value in zip(("chosen", "rejected"), found[i]["rewards"]):
            ids = model.assets.tokenizer(found[i]["prompt"] + found[i][answer] + "</s>")["input_ids"]
            assert value == pytest.approx(float(model.logits(params, {"input_ids": [ids]})[0, -1, 0]), rel=1e-4, abs=1e-6)
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.settings"))


def test_log_probabilities_and_going_on(folder, monkeypatch):
    monkeypatch.setattr(score, "ROWS_PER_BLOCK", 3)
    whole = command(folder, "whole.jsonl", "lm", "--kind", "logprob")
    assert score.main(whole) == 0
    rows = read(folder / "whole.jsonl")
    model, params = aligner.load(folder / "lm")
    start, end = (model.assets.tokenizer(text)["input_ids"] for text in (PAIRS[0]["prompt"], PAIRS[0]["prompt"] + "It is 5.</s>"))
    logits = np.asarray(model.logits(params, {"input_ids": [end]})[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    shared = next((i for i, (a, b) in enumerate(zip(start, end)) if a != b), len(start))
    expected = sum(logp[i - 1, end[i]] for i in range(shared, len(end)))
    assert rows[0]["lengths"][0] == len(end) - shared and rows[0]["logps"][0] == pytest.approx(expected, rel=1e-4)

    class Kill(Exception):
        pass

    def torn(row, found, kind):
        if row["note"] == 5:
            raise Kill
        return json.dumps({**row, **found}, ensure_ascii=False) + "\n"

    again = command(folder, "again.jsonl", "lm", "--kind", "logprob")
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(score, "line", torn)
        score.main(again)
    partial = folder / "again.jsonl.partial"
    assert len(read(partial)) == 3
    partial.write_text(partial.read_text() + '{"half a li')
    other = command(folder, "again.jsonl", "lm", "--kind", "logprob", "--max-length", "100")
    assert score.main(other) == 2, "other settings must not go on with it"
    assert score.main(again) == 0
    assert read(folder / "again.jsonl") == rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"--out": "rows.jsonl"}, "is there already"), ({"--model": "lm"}, "use --kind logprob"), ({"--data": "row.jsonl"}, "error: --data: ")],
)
def test_bad_input_is_one_sentence(folder, capsys, changes, words):
    arguments = command(folder, "none.jsonl")
    for name, value in changes.items():
        arguments[arguments.index(name) + 1] = str(folder / value)
    assert score.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_rewards_stand_in_the_order_of_a_rows_answers():
    """Not in that of their scores: whoever reads the file puts them beside `completions`."""
    row = {"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}
    assert [plain(answer) for answer in score.answers_of(scores(row))[1]] == ["a", "b", "c"]


def test_why_rows_were_not_scored_is_told_by_the_commonest_reason():
    failed = [*["z: 41 tokens"] * 9, *"abcde"]
    lines = by_row.told(failed, 20, "scored")
    assert lines[:2] == ["6 of 20 rows scored", "  not scored, z: 9"] and len(lines) == 6


def test_a_row_scored_again_is_not_said_to_have_failed():
    before = {"prompt": "p", "not_scored": "too long"}
    assert json.loads(score.line(before, {"rewards": [1.0]}, "reward")) == {"prompt": "p", "rewards": [1.0]}


def test_a_row_that_fails_when_scored_again_keeps_no_score_of_before():
    before = {"prompt": "p", "rewards": [1.0], "logps": [-3.0]}
    assert json.loads(score.line(before, {"not_scored": "too long"}, "reward")) == {"prompt": "p", "logps": [-3.0], "not_scored": "too long"}


def test_another_chat_template_does_not_go_on_with_a_file(folder, monkeypatch):
    template = folder / "t.jinja"
    template.write_text("{{ messages }}")
    again = command(folder, "template.jsonl", "lm", "--kind", "logprob", "--chat-template", str(template))

    def torn(row, found, kind):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "line", torn)
        assert score.main(again) == 130
    template.write_text("{{ messages }}!")
    assert score.main(again) == 2


def test_a_row_is_scored_with_what_its_template_is_told(folder):
    """Tools and other arguments of a row's template stand in the text that a reward model was trained on."""
    told = folder / "told.jinja"
    told.write_text("{{ bos_token }}{{ mood }}{{ tools | map(attribute='name') | join }}{% for m in messages %}{{ m.content }}{% endfor %}")
    message = lambda role, content: [{"role": role, "content": content}]
    row = {"prompt": message("user", "3 or 5?"), "chosen": message("assistant", "5"), "rejected": message("assistant", "3")}
    row |= {"tools": [{"name": "Which"}], "chat_template_kwargs": {"mood": "larger"}}
    (folder / "tools.jsonl").write_text(json.dumps(row) + "\n")
    arguments = command(folder, "tools_scored.jsonl", "rm", "--chat-template", str(told))
    arguments[arguments.index("--data") + 1] = str(folder / "tools.jsonl")
    assert score.main(arguments) == 0
    model, params = aligner.load(folder / "rm")
    [found] = read(folder / "tools_scored.jsonl")
    for value, answer in zip(found["rewards"], "53", strict=True):
        ids = model.assets.tokenizer(f"<s>largerWhich3 or 5?{answer}", add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(float(model.logits(params, {"input_ids": [ids]})[0, -1, 0]), rel=1e-4, abs=1e-6)


def test_conversations_that_end_in_one_answer_or_in_several(folder):
    """ShareGPT's and LLaVA's rows and ranked ones have the same columns."""
    for name, answers in (("one", "5"), ("several", ["5", "3"])):
        row = {"conversations": [{"from": "human", "value": "3 or 5?"}, {"from": "gpt", "value": answers}]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        arguments = command(folder, f"{name}_scored.jsonl")
        arguments[arguments.index("--data") + 1] = str(folder / f"{name}.jsonl")
        assert score.main(arguments) == 0
    [[one], [best, _]] = (read(folder / f"{name}_scored.jsonl")[0]["rewards"] for name in ("one", "several"))
    assert one == pytest.approx(best, rel=1e-4)


def test_a_long_answer_does_not_turn_its_neighbours_prompt():
    """Ropes that go by the length of a text (longrope, dynamic): each answer of a pair is worth what it is alone."""
    hf = hf_config("phi3", **FIRST["phi3"], vocab_size=340)
    assert hf.rope_parameters["original_max_position_embeddings"] == 8
    model = dataclasses.replace(from_hf(hf), assets=data_tiny.text_model().assets)
    params = tiny.perturbed(model)
    prompt, answers = "what is", (" it", " the house of a dog and a cat, in one picture")

    def logps(*answers):
        rows = Rows(lambda i: Ranked(prompt, answers), 1, ".", "", "")
        [(_, batch)] = score.batches(range(1), rows, lambda row: row, model, 64, 1, 8, {})
        return score.make_score(model, "logprob")(params, batch)[0]["logps"]

    np.testing.assert_allclose(logps(*answers), [*logps(answers[0]), *logps(answers[1])], rtol=1e-5)
