"""What `aligner.score` and `aligner.generate` share: going on with a half-written file, alone."""

import json

import pytest

from aligner import by_row
from aligner.types import UserError


def test_one_writer_at_a_time(tmp_path):
    partial = tmp_path / "new" / "out.jsonl.partial"
    with by_row.going_on(partial, {"seed": 1}) as done:
        assert done == 0
        partial.write_text("{}\n{}\n")
        with pytest.raises(UserError, match=r"another process writes .*partial; wait for its end"), by_row.going_on(partial, {"seed": 1}):
            raise AssertionError("two at once")
    with by_row.going_on(partial, {"seed": 1}) as done:
        assert done == 2
    with pytest.raises(UserError, match="begun with another model, dataset or settings"), by_row.going_on(partial, {"seed": 2}):
        raise AssertionError("two commands in one file")


def test_what_a_kill_left_of_the_settings_is_no_other_command(tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.with_suffix(".settings").write_text('{"se')
    with by_row.going_on(partial, {"seed": 1}):
        partial.write_text("{}\n")
    with by_row.going_on(partial, {"seed": 1}) as done:
        assert done == 1


def test_only_whole_blocks_are_kept(tmp_path):
    """Rows of a block are computed in the same batches, wherever the run before was killed."""
    partial = tmp_path / "out.jsonl.partial"
    with by_row.going_on(partial, {}):
        partial.write_text('{"row": 0}\n{"row": 1}\n{"row": 2}\n{"row": 3}\n{"row": 4}\n{"ro')
    with by_row.going_on(partial, {}, 2) as done:
        assert done == 4 and partial.read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n{"row": 3}\n'
    with by_row.going_on(partial, {}, 5) as done:
        assert done == 0 and partial.read_text() == ""


def test_a_text_may_hold_ends_of_lines(tmp_path):
    rows = [{"text": "one\u2028two\x85three\r\nfour"}, {"text": "five"}]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [*by_row.records(tmp_path / "out.jsonl")] == rows


def test_another_command_that_ends_while_this_one_begins(tmp_path, monkeypatch):
    """It has removed the file that this one waits for: what is locked then is no file any more."""
    partial = tmp_path / "out.jsonl.partial"
    monkeypatch.setattr(by_row.locks, "take", lambda file: partial.with_suffix(".settings").unlink() is None)
    with pytest.raises(UserError, match=r"has written .*partial to its end meanwhile"), by_row.going_on(partial, {}):
        pass
