"""What filters keep, and the command that applies them."""

import gzip
import itertools
import json
import tracemalloc

import numpy as np
import pytest

from aligner.data import __main__ as command
from aligner.data import filters
from aligner.data.__main__ import main
from aligner.data.samples import Ranked, Supervised


def test_duplicates():
    assert filters.first_of_equals(["A cat.", "a  CAT", "a dog", ""]).tolist() == [True, False, True, True]
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts = [" ".join(draw.choice(words, 100)) for _ in range(30)]
    changed = [text.replace(text.split()[50], "other", 1) for text in texts]  # five of 96 5-grams: Jaccard 0.9
    halves = [" ".join(text.split()[:50] + other.split()[50:]) for text, other in itertools.pairwise(texts)]  # Jaccard 0.3
    keep = filters.first_of_similar([*texts, *changed, *halves, "short", "short"], 0.8)
    assert keep[:30].all() and not keep[30:60].any() and keep[60:89].all() and keep[89:].tolist() == [True, False]
    assert filters.first_of_similar([*texts, *changed], 0.99).all()


def test_words_scripts_and_benchmarks():
    texts = ["I am ChatGPT.", "As an AI, I can", "a chatgpts", "这是一只猫", "café"]
    assert filters.without_words(texts, ["chatgpt", "as an ai"]).tolist() == [False, False, True, True, True]
    assert filters.without_words(texts, []).all()
    assert filters.mostly_ascii(texts, 0.3).tolist() == [True, True, True, False, True]
    question = "Janet's ducks lay sixteen eggs per day and she eats three for breakfast every morning"
    texts = [f"Solve: {question.upper()}!", "Janet's ducks lay eggs", "what is two plus two", "He said what is two plus two, no?"]
    assert filters.not_in(texts, [question, "What is two plus two?"]).tolist() == [False, True, False, False]


def test_characters_are_words_where_no_spaces_part_them():
    assert filters.words_of("这是猫 and カフェ2") == ["这", "是", "猫", "and", "カ", "フ", "ェ", "2"]
    texts = ["我是ChatGPT。", "这是一只猫", "猫和狗在房子里一起睡觉", "昨天猫和狗在房子里一起睡觉了"]
    assert filters.without_words(texts, ["chatgpt", "一只猫"]).tolist() == [False, False, True, True]
    assert filters.not_in(texts, [texts[2]], 11).tolist() == [True, True, False, False]
    assert filters.first_of_similar(texts, 0.6).tolist() == [True, True, True, False]


def test_pairs_of_scored_answers():
    assert filters.pair_of(Ranked("p", ("a", "b"), (1.0, 2.0))).chosen == "b"
    assert filters.pair_of(Ranked("p", ("a", "b"))) is None and filters.pair_of(Ranked("p", ("a", "b"), (1.0, float("nan")))) is None
    pair = filters.pair_of(Ranked("p", ("a", "b", "c"), (3.0, 2.0, 1.0)))
    assert (pair.chosen, pair.rejected, pair.margin) == ("a", "c", 2.0)
    assert filters.pair_of(Ranked("p", ("a", "b"), (1.0, 1.0))) is None and filters.pair_of(Ranked("p", ("a", "b"), (2.0, 1.0)), 1.0) is None


def test_statistics():
    found = filters.statistics([Supervised("one two", "a b c"), Supervised("one", "a")])
    assert found["samples"] == {"Supervised": 2}
    assert found["words asked"] == {"least": 1, "median": 2, "90 %": 2, "most": 3, "sum": 4}


def test_the_command(tmp_path, capsys):
    long = "if a train leaves the station at noon and another one leaves an hour later when do they meet"
    rows = [
        {"question": "What is it?", "answer": "a cat"},
        {"question": "what is it", "answer": "A cat!"},
        {"question": "what is it?", "answer": "a dog"},
        {"question": "Who made you?", "answer": "OpenAI did."},
        {"question": "Now: " + long, "answer": "never"},
        {"question": None, "answer": "x"},
        {"question": "q", "answer": "y", "more": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bench.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": long.title()}).encode()))
    out = tmp_path / "out.jsonl"
    command = [str(tmp_path / "rows.jsonl"), "--out", str(out), "--exact", "--prompts", "--near", "0.9", "--without", "openai", "--stats"]
    assert main([*command, "--against", str(tmp_path / "bench.jsonl.gz")]) == 0
    told = capsys.readouterr().out
    for line in ("7 rows", "cannot be read, unexpected value: 1 (first row 5: ", "--exact: 1 (first row 1)", "--prompts: 1 (first row 2)",
                 "--near: 0", "--without: 1 (first row 3)", "--against: 1 (first row 4)", "written: 2 rows", '"Supervised": 2'):  # fmt: skip
        assert line in told, told
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], rows[6]]
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    assert main([command[0], "--stats", "--split", "test"]) == 2 and "is a single file and has no splits" in capsys.readouterr().err
    assert main([str(tmp_path / "rows.jsonl")]) == 2 and "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "kind", "asked"),
    [
        ({"prompt": "1 + 1", "completions": ["one", "and one"], "labels": [True, False]}, "Stepwise", 2),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "reference": "the gold one"}, "Triple", 1),
        ({"conversations": [{"from": "human", "value": "q r"}, {"from": "gpt", "value": "a"}]}, "Supervised", 2),
        ({"conversations": [{"from": "human", "value": "q r"}, {"from": "gpt", "value": ["a", "b"]}]}, "Ranked", 2),
    ],
)
def test_the_command_reads_every_type_of_sample(row, kind, asked, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main([str(tmp_path / "rows.jsonl"), "--stats"]) == 0
    assert f'samples: {{"{kind}": 1}}' in (told := capsys.readouterr().out) and f'words asked: {{"least": {asked},' in told


def test_the_command_makes_pairs(tmp_path, capsys):
    told = {"tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "kind"}}
    rows = [{"prompt": "q", "completions": ["a", "b"], "scores": scores, **told} for scores in ([1, 3], [2, 2])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(tmp_path / "rows.jsonl"), "--pairs", "--out", str(tmp_path / "pairs.jsonl")]) == 0
    (made,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert made["chosen"] == [{"role": "assistant", "content": "b"}] and made["margin"] == 2.0
    assert {name: made[name] for name in told} == told, "the pair is trained with what its prompt was answered with"
    assert "taken out by --pairs: 1 (first row 1)" in capsys.readouterr().out


@pytest.mark.parametrize("count", [2000])
def test_many_rows_are_no_quadratic_matter(count):
    texts = [f"the row number {i} holds the words {i * 7} and {i * 13} and nothing else at all" for i in range(count)]
    assert filters.first_of_similar(texts, 0.95).sum() > 0.9 * count


@pytest.mark.parametrize(("option", "value"), [("--near", "0"), ("--near", "1.5"), ("--ascii", "-1"), ("--ngram", "0"), ("--out", "nowhere/x.jsonl")])
def test_what_the_command_cannot_do(tmp_path, capsys, option, value):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert main([str(tmp_path / "rows.jsonl"), "--stats", option, value]) == 2
    assert f"error: {option}" in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_a_benchmark_is_found_by_every_length_of_its_runs():
    """Most texts are let go by the first words of its runs; what is left is judged by the whole runs, as all texts were before."""
    draw = np.random.default_rng(1)
    say = lambda count: " ".join(map(str, draw.integers(0, 3, count)))
    texts, held = [say(12) for _ in range(200)], [say(int(count)) for count in draw.integers(3, 9, 8)]
    runs = {run for text in held for run in filters.ngrams(text.split(), 5)}
    wanted = [not any(f" {run} " in f" {text} " for run in runs) for text in texts]
    assert filters.not_in(texts, held, 5).tolist() == wanted and 0 < sum(wanted) < 200
    assert filters.not_in(texts, [], 5).all()


def test_near_duplicates_do_not_hold_the_runs_of_all_texts():
    draw = np.random.default_rng(0)
    texts = [" ".join(map(str, draw.integers(0, 10**9, 60))) for _ in range(800)]
    tracemalloc.start()
    try:
        assert filters.first_of_similar(itertools.chain(texts, texts[:3])).tolist() == [True] * 800 + [False] * 3
        assert tracemalloc.get_traced_memory()[1] < 5e6  # the runs of all of them: 10 MB
    finally:
        tracemalloc.stop()


def test_rows_of_which_none_can_be_read_are_an_error(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": null, "answer": "x"}\n')
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(out := tmp_path / "out.jsonl")]) == 2 and not out.exists()
    assert "none of the 1 rows" in (told := capsys.readouterr().err) and "unexpected value: 1 (first row 0: " in told


def test_what_is_stopped_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "x"}\n' * 3)

    def line(row, number, pair):
        if number:
            raise KeyboardInterrupt
        return "{}\n"

    monkeypatch.setattr(command, "line", line)
    assert main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
