"""What the user sees and how the user stops: lines, bars, signals, traces."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved what it must."""


def say(*lines: str) -> None:
    """A line for the user, from process 0 only, above the progress bar."""
    if jax.process_index() == 0:
        for line in lines:
            tqdm.write(line, file=sys.stderr)


def bar(total: int, title: str, unit: str, start: int = 0, **options) -> tqdm:
    """A progress bar on process 0's terminal; where there is no terminal, a line at the start."""
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    if not terminal and title:
        say(f"{title}: {total} {unit}es" if unit.endswith("ch") else f"{title}: {total} {unit}s")
    return tqdm(total=total, desc=title or None, unit=unit, initial=start, dynamic_ncols=True, disable=not terminal, **options)


def short(values: Mapping[str, float]) -> str:
    names = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin")
    return ", ".join(f"{name} {values[name]:.4g}" for name in names if name in values)


@contextlib.contextmanager
def progress(start: int, total: int) -> Iterator[Callable]:
    """A bar with loss, accuracy, tokens per second and time left; where there is no terminal, a line now and then."""
    every = max(1, total // 20)
    with bar(total, "", "step", start) as steps:

        def update(step: int, values: Mapping[str, float], tokens_per_second: float) -> None:
            shown = {"loss": f"{values['loss']:.4f}"}
            for name in ("rewards/accuracies", "accuracy"):
                if name in values:
                    shown["accuracy"] = f"{values[name]:.2f}"
            shown["tok/s"] = f"{tokens_per_second:,.0f}"
            steps.set_postfix(shown, refresh=False)
            steps.update(step - steps.n)
            if steps.disable and (step % every == 0 or step == total):
                say(f"step {step}/{total}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

        yield update


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], None]]:
    """`check_stop()`, which raises Stopped once SIGTERM or Ctrl-C has come (to any process); a second Ctrl-C ends at once."""
    from jax.experimental import multihost_utils

    asked: list[int] = []
    checks = 0

    def note(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping: the state is being saved" + (" (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""))

    def check_stop() -> None:
        nonlocal checks
        stop = bool(asked)
        if jax.process_count() > 1:  # all must agree on the step
            checks += 1
            stop = multihost_utils.reached_preemption_sync_point(checks) or bool(multihost_utils.process_allgather(np.asarray(stop)).any())
        if stop:
            raise Stopped(asked[0] if asked else signal.SIGTERM)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def tracing(steps: int, directory: str | Path) -> Iterator[Callable[[int], None]]:
    """`trace(step)` starts a profile after two warm steps and stops it `steps` later; it opens in Perfetto."""
    seen = 0

    def trace(step: int) -> None:
        nonlocal seen
        seen += 1
        if steps and seen == 3:
            jax.profiler.start_trace(str(Path(directory) / "profile"), create_perfetto_trace=True)
        if steps and seen == 3 + steps:
            jax.profiler.stop_trace()

    yield trace
    if steps and 3 <= seen < 3 + steps:
        jax.profiler.stop_trace()
