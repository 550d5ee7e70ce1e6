"""What a terminal shows."""

import sys
from types import SimpleNamespace

from tqdm import tqdm

from aligner import console


def test_the_bar_shows_everything_in_eighty_columns(monkeypatch, capfd):
    """Loss, accuracy, tokens per second and time left: a line cut short would lose the last of them."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(console, "tqdm", lambda **options: tqdm(**options | dict(dynamic_ncols=False, ncols=80, mininterval=0)))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=iter([1.0, 2.0]).__next__))
    with console.progress(0, 20000) as update:
        for step in (10001, 10002):
            update(step, {"loss": 0.6931, "rewards/accuracies": 0.5, "num_tokens": 104096})
    line = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    for part in (" 50%|", "10002/20000", "<", "loss=0.6931", "accuracy=0.50", "tok/s=104,096]"):
        assert part in line, line


def test_where_there_is_no_terminal_what_takes_long_is_told_in_lines(monkeypatch, capfd):
    """A log that stays empty for minutes looks like a run that hangs."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with console.counted(300, "reading data.train") as update:
        for now[0] in (1.0, 4.0, 20.0, 40.0):
            update(50)
    with console.counted(10, "reading data.eval", shown=False) as update:
        now[0] = 99.0
        update(10)
    assert capfd.readouterr().err.splitlines() == [f"reading data.train: {done} of 300 rows" for done in (100, 200)]
