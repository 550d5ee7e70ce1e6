"""Arrays kept in files: whole, or known not to be."""

import os
import subprocess

import numpy as np
import pytest

from aligner import arrays


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "kept.npz"
    arrays.write(path, ids=np.arange(5), sizes=np.ones((2, 3), np.int32), words="a text")
    found = arrays.read(path)
    assert found.keys() == {"ids", "sizes", "words"} and str(found["words"]) == "a text"
    assert np.array_equal(found["ids"], np.arange(5)) and found["sizes"].dtype == np.int32
    with np.load(path) as plain:  # and by NumPy alone
        assert np.array_equal(plain["ids"], np.arange(5))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npz"], "nothing is left beside it"


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "kept.npz"
    arrays.write(path, ids=np.arange(40), words="a text")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert arrays.read(path) is None, place
    for damaged in (b"", whole[:3], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        assert arrays.read(path) is None
    path.unlink()
    assert arrays.read(path) is None


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    node = os.uname().nodename
    left, ours, other = (tmp_path / f"rows.tokens.{name}.part" for name in (f"{node}.{ended.pid}", f"{node}.{os.getpid()}", "elsewhere.1"))
    for path in (left, ours, other):
        path.touch()
    arrays.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([ours, other])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with arrays.whole(tmp_path / "a.txt") as part:
        part.write_text("all")
    with pytest.raises(KeyboardInterrupt), arrays.whole(tmp_path / "b.txt") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "all")]
