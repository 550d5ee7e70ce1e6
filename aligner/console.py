"""What the user sees: lines, bars, traces."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from tqdm import tqdm

from aligner.stopping import unread


def say(*lines: str) -> None:
    """A line for the user, from process 0 only, above the progress bar. Where nobody reads on, the work goes on nevertheless."""
    if jax.process_index() == 0:
        tell(*lines)


def tell(*lines: str) -> None:
    """A line for the user, whatever process this is."""
    for line in lines:
        try:
            tqdm.write(line, file=sys.stderr)
        except BrokenPipeError:
            if not unread():
                raise


@contextlib.contextmanager
def counted(total: int, title: str, unit: str = "row", shown: bool = True, first: float = 3, every: float = 30) -> Iterator[Callable]:
    """A bar for what is mostly done at once; where there is no terminal, a line after `first` seconds and one every `every` seconds.

    Yields:
        update(n): so many more are done.
    """
    terminal = sys.stderr.isatty()
    done, due = 0, time.monotonic() + first
    with tqdm(total=total, desc=title, unit=f" {unit}s", delay=2, leave=False, disable=not (shown and terminal)) as steps:

        def update(n: int = 1) -> None:
            nonlocal done, due
            done += n
            steps.update(n)
            if shown and not terminal and time.monotonic() >= due:
                due = time.monotonic() + every
                tell(f"{title}: {done} of {total} {unit}s")

        yield update


def bar(total: int, title: str, unit: str, start: int = 0, **options) -> tqdm:
    """A progress bar on process 0's terminal; where there is no terminal, a line at the start."""
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    if not terminal and title:
        say(f"{title}: {total} {unit}es" if unit.endswith("ch") else f"{title}: {total} {unit}s")
    return tqdm(total=total, desc=title or None, unit=unit, initial=start, dynamic_ncols=True, disable=not terminal, **options)


def short(values: Mapping[str, float]) -> str:
    names = ("loss", "reward", "rewards/accuracies", "rewards/margins", "accuracy", "margin")
    return ", ".join(f"{name} {values[name]:.4g}" for name in names if name in values)


@contextlib.contextmanager
def progress(start: int, total: int) -> Iterator[Callable]:
    """A bar with loss, accuracy, tokens per second and time left; where there is no terminal, a line now and then.

    Tokens per second are those of the last 20 steps, saves and evaluations included.
    """
    every = max(1, total // 20)
    seen: deque[tuple[float, float]] = deque(maxlen=21)  # (time, tokens up to then) after each step; the first one compiles
    # Without the steps per second, all of it fits into the 80 columns of a common terminal.
    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    with bar(total, "", "step", start, bar_format=layout) as steps:

        def update(step: int, values: Mapping[str, float]) -> None:
            shown = {"loss": f"{values['loss']:.4f}"}
            for name in ("rewards/accuracies", "accuracy", "reward"):
                if name in values:
                    shown[name.rpartition("/")[2].replace("accuracies", "accuracy")] = f"{values[name]:.2f}"
            seen.append((time.monotonic(), values["num_tokens"] + (seen[-1][1] if seen else 0)))
            if len(seen) > 1:
                shown["tok/s"] = f"{(seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0]):,.0f}"
            steps.set_postfix(shown, refresh=False)
            steps.update(step - steps.n)
            if steps.disable and (step % every == 0 or step == total):
                say(f"step {step}/{total}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

        yield update


@contextlib.contextmanager
def tracing(steps: int, directory: str | Path) -> Iterator[Callable[[int], None]]:
    """`trace(step)` starts a profile after two warm steps and stops it `steps` later, or where the run ends; it opens in Perfetto."""
    seen = 0

    def trace(step: int) -> None:
        nonlocal seen
        seen += 1
        if steps and seen == 3:
            jax.profiler.start_trace(str(Path(directory) / "profile"), create_perfetto_trace=True)
        if steps and seen == 3 + steps:
            jax.profiler.stop_trace()

    try:
        yield trace
    finally:
        if steps and 3 <= seen < 3 + steps:
            jax.profiler.stop_trace()
        if steps and seen < 3:
            say(f"no profile: it begins with the third step after a start, and there were {seen}")
