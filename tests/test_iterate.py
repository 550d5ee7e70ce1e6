"""Rounds of generate, judge, train on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import aligner.run
from aligner import by_row, generate, iterate, workdir
from aligner.data.by_columns import messages, prompt_completion
from aligner.stopping import Stopped
from aligner.types import UserError
from configs import common, grpo_llama3
from scripts.make_tiny_checkpoint import make_llama
from scripts.online_demo import make_words, question
from tests.resume.runs import ROOT


def test_self_play_prefers_the_datasets_answer():
    row = {"messages": [*question(1, 2), {"role": "assistant", "content": "3"}]}
    record = {**row, "prompt": question(1, 2), "completions": ["5"]}
    pair = iterate.spin_pair(messages, row, record)
    assert pair["chosen"] == [{"role": "assistant", "content": "3"}] and pair["rejected"] == [{"role": "assistant", "content": "5"}]
    assert iterate.spin_pair(messages, row, {**record, "completions": ["3"]}) is None, "nothing to prefer"
    assert iterate.spin_pair(messages, row, {"prompt": "x", "not_answered": "too long"}) is None
    thought = [{"role": "assistant", "content": "Well.", "reasoning_content": "1 and 2"}, {"role": "assistant", "content": "3"}]
    pair = iterate.spin_pair(messages, {"messages": [*question(1, 2), *thought]}, record)
    assert pair["chosen"] == thought, "all that answers the prompt, and how it was thought of"
    assert iterate.spin_pair(messages, {"messages": question(1, 2)}, record) is None, "no answer"
    plain = {"prompt": "1 + 2 =", "completion": " 3"}
    found = iterate.spin_pair(prompt_completion, plain, {**plain, "completions": [" 5"]})
    assert found == {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 5"}


def test_self_play_reads_answers_that_hold_what_python_takes_for_the_end_of_a_line(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 2 =", "completion": " 3"}) + "\n")
    answer = json.dumps({"prompt": "1 + 2 =", "completions": ["3\u2028or 4"]}, ensure_ascii=False)
    monkeypatch.setattr(generate, "run", lambda args: Path(args.out).write_text(answer + "\n", encoding="utf-8"))
    iterate.write_pairs(tmp_path / "pairs.jsonl", "model", str(tmp_path / "rows.jsonl"), "", 1, {})
    assert [pair["rejected"] for pair in by_row.records(tmp_path / "pairs.jsonl")] == ["3\u2028or 4"]


def test_one_judge_it_must_be(tmp_path):
    with pytest.raises(UserError, match="either --reward_model"):
        iterate.run(common.base(), tmp_path, 1, "x", "", False, 2)


def command(folder, *settings):
    """What `python -m aligner.iterate` does with a preset of random weights."""
    line = [sys.executable, "-m", "aligner.iterate", "--config=configs/dpo_llama3.py:tiny", f"--workdir={folder}", "--spin", *settings]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)


def test_from_the_command_line(tmp_path):
    done = command(tmp_path, "--prompts=x", "--rounds=0")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: --rounds is 0; it must be at least 1", done.stderr


def test_two_do_not_make_rounds_in_one_folder(tmp_path):
    """The second waits; asked to stop where there is no training that could save, it ends as the launcher expects."""
    line = [sys.executable, "-m", "aligner.iterate", "--config=configs/dpo_llama3.py:tiny", f"--workdir={tmp_path}", "--spin", "--prompts=x"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with workdir.alone(tmp_path):
        second = subprocess.Popen(
            [*line, "--config.checkpoint.requeue_code=75"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        told = second.stderr.readline()
        assert "another run works in" in told and "waiting for its end" in told, told + second.communicate()[1]
        second.terminate()
        assert second.wait(60) == 75, second.communicate()[1]
    assert "the same command goes on" in second.communicate()[1]


@pytest.mark.slow
def test_self_play_from_the_command_line(tmp_path):
    rows = [{"messages": [*question(a, a + 1), {"role": "assistant", "content": str(2 * a + 1)}]} for a in range(16)]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    sizes = ("--rounds=1", "--max_new_tokens=8", "--config.train.steps=2", "--config.data.batch_size=8", "--config.data.eval.path=")
    done = command(tmp_path / "spin", f"--prompts={tmp_path / 'messages.jsonl'}", *sizes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "spin" / "round-0" / "train" / "export" / "config.json").exists()


def test_rounds_that_cannot_be_are_refused(tmp_path):
    adapted = common.base()
    adapted.lora.rank, adapted.lora.adapter = 4, "adapter"  # the first answers were written without it, and the second round had it twice
    cases = ((common.base(), 0, "--rounds is 0"), (grpo_llama3.get_config(), 1, "grpo writes its own answers"))
    for config, rounds, words in (*cases, (adapted, 1, r"config\.lora\.adapter is adapter, but .* merge it into config\.model\.path first")):
        with pytest.raises(UserError, match=words):
            iterate.run(config, tmp_path, rounds, "x", "RM", False, 2)


def test_rounds_in_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="rounds are made in one process"):
        iterate.run(common.base(), tmp_path, 1, "x", "RM", False, 2)


def test_a_judge_that_prefers_nothing_is_told_of(tmp_path, monkeypatch):
    """The next command, with another model or more answers, does not find the empty file."""
    monkeypatch.setattr(generate, "run", lambda args: Path(args.out).write_text(""))
    with pytest.raises(UserError, match="RM finds no answer to any of x better than another"):
        iterate.write_pairs(tmp_path / "pairs.jsonl", "model", "x", "RM", 2, {})
    assert not list(tmp_path.iterdir())


def test_no_pairs_are_not_learned_from_after_a_kill(tmp_path, monkeypatch):
    """The judge preferred nothing, and the run was killed before it could say so."""
    pairs = tmp_path / "runs" / "round-0" / "pairs.jsonl"
    pairs.parent.mkdir(parents=True)
    pairs.write_text("")
    monkeypatch.setattr(aligner.run, "run", lambda config, workdir: pytest.fail("there is nothing to train on"))
    with pytest.raises(UserError, match="RM finds no answer to any of x better than another"):
        iterate.run(common.base(), tmp_path / "runs", 1, "x", "RM", False, 2)


def test_rounds_go_on_where_they_were_moved(tmp_path, monkeypatch):
    """The model of the round before, the pairs and what else stands in the workdir are known again."""
    old, new = tmp_path / "old" / "runs", tmp_path / "new" / "runs"

    def train(config, folder):
        config = workdir.resolve(config, folder)
        assert workdir.check(config, folder) == []
        paths.append((config.model.path, config.data.train.path))
        workdir.record(config, folder)
        (folder / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        if len(paths) > 1:  # the last round is killed before its end
            raise Stopped(15)
        (folder / "export").mkdir()

    monkeypatch.setattr(iterate, "write_pairs", lambda path, *args: path.write_text("{}\n"))
    monkeypatch.setattr(aligner.run, "run", train)
    config, paths = common.base(), []
    config.model.path = "{workdir}/demo/model"
    for folder in ("demo/model", "round-0", "round-1"):
        (old / folder).mkdir(parents=True)
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    with pytest.raises(Stopped):
        iterate.run(config, old, 2, str(tmp_path / "prompts.jsonl"), "RM", False, 2)
    there = [(old / "demo" / "model", old / "round-0" / "pairs.jsonl"), (old / "round-0" / "train" / "export", old / "round-1" / "pairs.jsonl")]
    assert [tuple(map(os.path.realpath, pair)) for pair in paths] == [tuple(map(os.path.realpath, pair)) for pair in there]
    new.parent.mkdir()
    old.rename(new)
    with pytest.raises(Stopped):
        iterate.run(config, new, 2, f"{tmp_path}/./prompts.jsonl", "RM", False, 2)  # the same file
    assert os.path.realpath(paths[-1][0]) == os.path.realpath(new / "round-0" / "train" / "export")


def test_pictures_are_looked_for_beside_the_prompts(tmp_path, monkeypatch):
    """The pairs, which name them too, stand elsewhere."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "rows.jsonl").write_text("{}\n")
    seen = []
    monkeypatch.setattr(iterate, "write_pairs", lambda path, model, prompts, judge, n, options: seen.append(options["image_folder"]))
    monkeypatch.setattr(aligner.run, "run", lambda config, workdir: seen.append(config.data.train.image_folder))
    iterate.run(common.base(), tmp_path / "runs", 1, str(tmp_path / "prompts" / "rows.jsonl"), "RM", False, 2)
    assert seen == [str(tmp_path / "prompts")] * 2


def test_the_first_rounds_answers_are_made_as_the_config_says(tmp_path, monkeypatch):
    make_llama(tmp_path / "model", hidden_size=32, layers=1, heads=2, kv_heads=1)
    config = common.base()
    config.model.path, config.model.revision, config.data.chat_template = str(tmp_path / "model"), "v2", "{{ messages }}"
    config.data.train.template = ConfigDict({"enable_thinking": False})
    seen = []
    monkeypatch.setattr(iterate, "write_pairs", lambda path, model, prompts, judge, n, options: seen.append(options))
    monkeypatch.setattr(aligner.run, "run", lambda config, workdir: None)
    iterate.run(config, tmp_path / "runs", 1, "x", "RM", False, 2)
    assert seen == [{"revision": "v2", "chat_template": "{{ messages }}", "template": '{"enable_thinking": false}'}]


def test_rounds_of_another_command_are_not_taken_for_those_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(iterate, "write_pairs", lambda *args: None)
    monkeypatch.setattr(aligner.run, "run", lambda config, workdir: (workdir / "export").mkdir(parents=True))
    iterate.run(common.base(), tmp_path, 1, "x", "RM", False, 2, temperature=1.0)
    iterate.run(common.base(), tmp_path, 2, "x", "RM", False, 2, temperature=1.0)  # more rounds are no other command
    with pytest.raises(UserError, match=r"another command: --n was 2 and is 4; --temperature was 1.0 and is 0.5. Use another --workdir"):
        iterate.run(common.base(), tmp_path, 2, "x", "RM", False, 4, temperature=0.5)


@pytest.mark.slow
def test_two_rounds_of_self_play(tmp_path):
    make_llama(tmp_path / "model", tokenizer=make_words(), hidden_size=32, layers=1, heads=2, kv_heads=1)
    rows = [{"messages": [*question(a, b), {"role": "assistant", "content": str(a + b)}]} for a in range(6) for b in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = common.base()
    config.model.path = str(tmp_path / "model")
    config.model.dtype = "float32"
    config.data.max_length = 32
    config.data.pad_to_multiple = 8
    config.data.batch_size = 8
    config.train.steps = 2
    options = dict(max_new_tokens=4, temperature=1.0, dtype="float32")
    folder = iterate.run(config, tmp_path / "spin", 2, str(tmp_path / "rows.jsonl"), "", True, 1, **options)
    assert folder == tmp_path / "spin" / "round-1" / "train" / "export" and (folder / "config.json").exists()
    again = lambda: iterate.run(config, tmp_path / "spin", 2, str(tmp_path / "rows.jsonl"), "", True, 1, **options)
    config.log.every = 3  # which may differ
    assert again() == folder
    config.algorithm.beta = 0.5
    with pytest.raises(UserError, match=r"round-0/train belongs to a run with another config: config.algorithm.beta was 0.1 and is 0.5\."):
        again()
    pairs = [json.loads(line) for line in (tmp_path / "spin" / "round-1" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 20 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
