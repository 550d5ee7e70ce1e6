"""How a run ends before its time: a signal asks it to, or a step hangs. Imports nothing slow: programs call `end_quietly` first."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

# by a launcher: a preemption notice, SLURM's --signal=USR1@SECONDS; by a terminal that is closed, unless nohup says otherwise
ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
HUNG = 124  # exit status, as of timeout(1)


class Stopped(Exception):
    """The run was asked to stop (one of ASKED, Ctrl-C) and has saved what it must."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of ASKED that this process was not started to ignore."""
    return tuple(number for number in ASKED if signal.getsignal(number) != signal.SIG_IGN)


def unread() -> bool:
    """Whether stdout or stderr is a pipe that its reader has left, or a closed terminal; what is printed there goes nowhere then."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)
    left = [descriptor for descriptor, event in outputs.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for descriptor in left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(left)


def tell(sentence: str) -> None:
    """A line on stderr from wherever the process stands: print() may be what a signal interrupted."""
    unread()
    os.write(2, f"\n{sentence}\n".encode())


def end_quietly(number: int = signal.SIGINT, code: int = 128 + signal.SIGINT) -> None:
    """From here on a signal, Ctrl-C by default, ends this process with a sentence: all that is on disk is good for going on.

    At once, not by an exception, which an import or a thread may swallow or show as a traceback.
    """

    def end(number, frame):
        tell("stopped at once; the same command goes on from the newest checkpoint")
        os._exit(code)

    signal.signal(number, end)


@contextlib.contextmanager
def nothing_to_save(code: int) -> Iterator[None]:
    """While a run starts and reads its data, each of ASKED ends it with `code`, and Ctrl-C with 130."""
    before = {number: signal.getsignal(number) for number in (*heeded(), signal.SIGINT)}
    for number in heeded():
        end_quietly(number, code)
    end_quietly()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], None]]:
    """`check_stop()`, which raises Stopped once one of ASKED or Ctrl-C has come (to any process); a second Ctrl-C ends at once.

    Several processes must stop after the same step. JAX's preemption service, which has taken SIGTERM for itself, agrees on one
    without holding up the devices; the others are handed on to it.
    """
    import jax
    from jax.experimental import multihost_utils

    several = jax.process_count() > 1
    asked: list[int] = []
    checks = 0

    def note(number, frame):
        if asked and number == signal.SIGINT:  # as before this began: by KeyboardInterrupt, or of a program that calls `end_quietly`
            return before[number](number, frame) if callable(before[number]) else signal.default_int_handler(number, frame)
        asked.append(number)
        again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        tell(f"stopping: the state is being saved{again}")

    def check_stop() -> None:
        nonlocal checks
        checks += 1
        if multihost_utils.reached_preemption_sync_point(checks) if several else asked:
            raise Stopped(asked[0] if asked else signal.SIGTERM)

    numbers = [number for number in (*heeded(), signal.SIGINT) if not (several and number == signal.SIGTERM)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield check_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[bool], None]]:
    """`watch(True)` starts the clock anew, `watch(False)` stops it; `seconds` after its start the process is taken to hang.

    The stacks of all threads are then written and the process ends with status 124: whatever hangs, a lock, a file system, a collective
    whose other side is gone, it can no longer save, and what is on disk is good. Off where `seconds` is 0.
    """
    tick, waited, watching, left = min(1.0, seconds / 4), 0.0, False, threading.Event()

    def watch(on: bool) -> None:
        nonlocal watching, waited
        watching, waited = on, 0.0

    def look() -> None:
        nonlocal waited
        while not left.wait(tick):
            waited += tick  # and not by the clock: a process that was suspended meanwhile does not hang
            if watching and waited >= seconds:
                tell(f"no step for {seconds:g} s: the stacks of all threads, then this process ends with status {HUNG}; "
                     "the same command goes on from the newest checkpoint")  # fmt: skip
                faulthandler.dump_traceback(2, all_threads=True)
                os._exit(HUNG)

    if seconds:
        threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield watch
    finally:
        left.set()
