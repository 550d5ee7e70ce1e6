"""What people mistype, told in one line, by every program."""

import argparse

import pytest

from aligner import commandline, generate, score, serve_reward
from aligner.convert import __main__ as converter
from aligner.data import __main__ as data


@pytest.mark.parametrize(
    ("main", "given", "told"),
    [
        (generate.main, "--modle a --data b --out c", "there is no --modle; did you mean --model?"),
        (score.main, "--model a --data b --out c --batch_sise 3", "there is no --batch_sise; did you mean --batch-size?"),
        (data.main, "rows.jsonl --sttas", "there is no --sttas; did you mean --stats?"),
        (data.main, "--xyzzy=3", "there is no --xyzzy\n"),
        (converter.main, "to-hf --workdri a --out b", "there is no --workdri; did you mean --workdir?"),
        (serve_reward.main, "--rewrad math", "there is no --rewrad; did you mean --reward?"),
    ],
)
def test_a_misspelt_option_is_told_before_a_missing_one(capsys, main, given, told):
    with pytest.raises(SystemExit) as ended:
        main(given.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_what_argparse_takes_is_taken():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("rest", nargs="*")
    assert commandline.arguments(parser, ["--batch=3", "a"]) == argparse.Namespace(batch_size=3, rest=["a"])
    assert commandline.arguments(parser, ["--", "--odd"]).rest == ["--odd"]


@pytest.mark.parametrize("main", [generate.main, score.main, data.main])
def test_a_dash_is_no_file(tmp_path, monkeypatch, capsys, main):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    given = ["rows.jsonl"] if main is data.main else ["--model", "none", "--data", "rows.jsonl"]
    assert main([*given, "--out", "-"]) == 2
    assert "error: --out is -: what is written goes to a file" in capsys.readouterr().err and not (tmp_path / "-").exists()
