"""`python -m aligner.generate` on a tiny model: every form of prompt, what is written, going on after a kill, clear errors."""

import json
import shutil

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import aligner
from aligner import by_row, convert, generate, score
from aligner.data import templates
from aligner.generation import engine
from aligner.generation.sampling import Sampling
from scripts.make_tiny_checkpoint import make_llama

ROWS = [
    {"prompt": "Which is larger, 3 or 5?", "note": 1},
    {"prompt": [{"role": "user", "content": "Which is larger, 7 or 9?"}], "note": 2},
    {"prompt": "One. " * 200, "note": 3},
    {"prompt": "What is it?", "note": 4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, a reward model, prompts of which one is too long, and a ShareGPT file."""
    folder = tmp_path_factory.mktemp("generate")
    make_llama(folder / "lm", hidden_size=32, layers=1, heads=2, kv_heads=1)
    model, disk = convert.open_model(folder / "lm", score_head=True)
    convert.save(model, convert.load_params(model, disk), folder / "rm")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    talk = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    (folder / "sharegpt.jsonl").write_text(json.dumps({"conversations": talk}) + "\n" + json.dumps({"conversations": talk[:1]}) + "\n")
    return folder


def call(folder, out, *more, data="rows.jsonl"):
    fixed = ["--model", folder / "lm", "--data", folder / data, "--out", out, "--dtype", "float32", "--max-prompt-length", 64]
    return generate.main([str(part) for part in [*fixed, "--max-new-tokens", 8, "--batch-size", 8, *more]])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_scores_and_pairs(folder, tmp_path):
    assert call(folder, tmp_path / "a.jsonl", "--n", 3, "--reward-model", folder / "rm") == 0
    found = lines(tmp_path / "a.jsonl")
    assert [row["note"] for row in found] == [1, 2, 3, 4]
    assert "too long" in found[2]["not_answered"] and "completions" not in found[2]
    for row in (found[0], found[1], found[3]):
        assert len(row["completions"]) == len(row["rewards"]) == len(row["stopped"]) == 3
        assert all(1 <= length <= 8 for length in row["completion_lengths"])
    assert call(folder, tmp_path / "p.jsonl", "--n", 3, "--reward-model", folder / "rm", "--write", "preference") == 0
    for pair in lines(tmp_path / "p.jsonl"):
        [row] = [row for row in found if row["prompt"] == pair["prompt"]]
        by_reward = dict(zip(row["completions"], row["rewards"]))
        text = lambda answer: answer if isinstance(answer, str) else answer[0]["content"]
        assert by_reward[text(pair["chosen"])] == max(row["rewards"]) and by_reward[text(pair["rejected"])] == min(row["rewards"])
    assert isinstance(lines(tmp_path / "p.jsonl")[1]["chosen"], list)  # messages where the prompt is messages


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same(folder, tmp_path, monkeypatch):
    assert call(folder, tmp_path / "whole.jsonl", "--n", 2) == 0
    whole = generate.answer_rows

    def killed(block, *rest):
        for number, record in enumerate(whole(block, *rest)):
            if number == 2:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(generate, "answer_rows", killed)
    assert call(folder, tmp_path / "out.jsonl", "--n", 2) == 130
    monkeypatch.setattr(generate, "answer_rows", whole)
    written = []
    original = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: (written.append(k.get("ids")), original(*a, **k))[1])
    assert call(folder, tmp_path / "out.jsonl", "--n", 2) == 0
    assert written == [[3]], "what was written before is not written again (row 2 is too long)"
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.slow
def test_sharegpt_prompts_lose_the_answer_that_stands_there(folder, tmp_path):
    assert call(folder, tmp_path / "s.jsonl", "--temperature", 0, data="sharegpt.jsonl") == 0
    first, second = lines(tmp_path / "s.jsonl")
    assert first["completions"] == second["completions"] and first["prompt"] == [{"role": "user", "content": "Hello?"}]


@pytest.mark.parametrize("arguments, words", [
    (["--write", "best"], "--write best needs --reward-model"),
    (["--n", "0"], "--n is 0"),
    (["--chat-template", "nope"], "--chat-template is 'nope', which is no file"),
    (["--chat-template", "n" * 300], "which cannot be read"),
    (["--template", "kind"], "--template is 'kind'; it must be a JSON object"),
    (["--template", '{"add_generation_prompt": true}'], "--template sets add_generation_prompt"),
    (["--top-p", "1.5"], "--top-p is 1.5"),
    (["--n", "2", "--temperature", "0"], "would write the same answer 2 times"),
    (["--reward-model", "LM", "--n", "2"], "has no score head, so it is no reward model"),
])  # fmt: skip
def test_one_sentence_for_what_is_wrong(folder, tmp_path, capsys, arguments, words):
    assert call(folder, tmp_path / "x.jsonl", *[folder / "lm" if part == "LM" else part for part in arguments]) == 2
    assert words in capsys.readouterr().err


def test_pairs_keep_what_their_prompts_template_is_told(folder, tmp_path, monkeypatch):
    """The tools that an answer was written with are those that the reward model reads, and that are trained with."""
    row = {"prompt": [{"role": "user", "content": "3 or 5?"}], "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "kind"}}
    every = {"mood": "bad", "year": 1}  # a row's own come on top
    (folder / "tools.jsonl").write_text(json.dumps(row) + "\n")
    read, encode = [], templates.encode_answers
    monkeypatch.setattr(templates, "encode_answers", lambda *args: read.append(args[-1]) or encode(*args))
    rewarded = ("--n", 2, "--reward-model", folder / "rm", "--write", "preference", "--template", json.dumps(every))
    assert call(folder, tmp_path / "p.jsonl", *rewarded, data="tools.jsonl") == 0
    told = {"tools": row["tools"], "chat_template_kwargs": row["chat_template_kwargs"]}
    [pair] = lines(tmp_path / "p.jsonl")
    assert {name: pair[name] for name in told} == told
    assert read == [{"tools": row["tools"], "mood": "kind", "year": 1}] * 2


def test_what_is_written_can_be_scored(folder, tmp_path):
    """Plain prompts and messages are worth what --reward-model says of them; of a conversation it is what was written that counts, and not
    the answer that stood there."""
    talk = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    (folder / "talk.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    for data in ("rows.jsonl", "talk.jsonl"):
        written, scored = tmp_path / f"a-{data}", tmp_path / f"s-{data}"
        assert call(folder, written, "--n", 2, "--reward-model", folder / "rm", data=data) == 0
        rows = lines(written)
        expected = [row.pop("rewards", None) for row in rows]
        if data == "rows.jsonl":  # two that are the same are worth the same
            rows[0]["completions"], expected[0] = rows[0]["completions"][:1] * 2, expected[0][:1] * 2
        written.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert score.main([*map(str, ["--model", folder / "rm", "--data", written, "--out", scored, "--dtype", "float32"])]) == 0
        for row, rewards in zip(lines(scored), expected, strict=True):
            if rewards is None:
                assert row["not_scored"].startswith("not answered: too long")
            else:
                np.testing.assert_allclose(row["rewards"], rewards, rtol=1e-5)


def test_a_row_may_hold_what_python_takes_for_the_end_of_a_line(folder, tmp_path):
    prompt = "One\u2028two\x85 three?"
    (folder / "odd.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    assert call(folder, tmp_path / "odd.jsonl", "--max-new-tokens", 1, data="odd.jsonl") == 0
    [row] = by_row.records(tmp_path / "odd.jsonl")
    assert row["prompt"] == prompt and len(row["completions"]) == 1


def test_a_stop_string_may_be_a_special_token(folder, tmp_path):
    """As `<|im_end|>` is one: it does not stand in what is written, and ends it all the same."""
    model, params = aligner.load(folder / "lm")
    prompt = model.assets.tokenizer(ROWS[3]["prompt"])["input_ids"]
    made = engine.make_engine(model, Sampling(max_new_tokens=1, temperature=0), rows=1)
    [[answer]] = engine.generate_all(made, made.prepare(params), [engine.Prompt(np.array(prompt, np.int32))], jax.random.key(0))
    special = model.assets.tokenizer.convert_ids_to_tokens(int(answer.tokens[0]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    shutil.copytree(folder / "lm", tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    assert call(folder, tmp_path / "a.jsonl", "--model", tmp_path / "lm", "--temperature", 0, "--stop", special) == 0
    row = lines(tmp_path / "a.jsonl")[3]
    assert row["completion_lengths"] == [1] and row["stopped"] == [True] and row["completions"] == [""]
