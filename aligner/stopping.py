"""How a run ends before its time: a signal asks it to, or a step hangs. Imports nothing slow: programs call `end_quietly` first."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator

ASKED = (signal.SIGTERM, signal.SIGUSR1)  # by a launcher: a preemption notice, SLURM's --signal=USR1@SECONDS
HUNG = 124  # exit status, as of timeout(1)


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1, Ctrl-C) and has saved what it must."""


def end_quietly(number: int = signal.SIGINT, code: int = 128 + signal.SIGINT) -> None:
    """From here on a signal, Ctrl-C by default, ends this process with a sentence: all that is on disk is good for going on.

    At once, not by an exception, which an import or a thread may swallow or show as a traceback.
    """

    def end(number, frame):
        os.write(2, b"\nstopped at once; the same command goes on from the newest checkpoint\n")
        os._exit(code)

    signal.signal(number, end)


@contextlib.contextmanager
def nothing_to_save(code: int) -> Iterator[None]:
    """While a run starts and reads its data, SIGTERM and SIGUSR1 end it with `code`, and Ctrl-C with 130."""
    before = {number: signal.getsignal(number) for number in (*ASKED, signal.SIGINT)}
    for number in ASKED:
        end_quietly(number, code)
    end_quietly()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], None]]:
    """`check_stop()`, which raises Stopped once SIGTERM, SIGUSR1 or Ctrl-C has come (to any process); a second Ctrl-C ends at once.

    Several processes must stop after the same step. JAX's preemption service, which has taken SIGTERM for itself, agrees on one
    without holding up the devices; the others are handed on to it.
    """
    import jax
    from jax.experimental import multihost_utils

    several = jax.process_count() > 1
    asked: list[int] = []
    checks = 0

    def note(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(2, f"\nstopping: the state is being saved{again}\n".encode())  # print() may be what the signal interrupted

    def check_stop() -> None:
        nonlocal checks
        checks += 1
        if multihost_utils.reached_preemption_sync_point(checks) if several else asked:
            raise Stopped(asked[0] if asked else signal.SIGTERM)

    numbers = [number for number in (*ASKED, signal.SIGINT) if not (several and number == signal.SIGTERM)]
    before = {number: signal.signal(number, note) for number in numbers}
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
                os.write(2, f"\nno step for {seconds:g} s: the stacks of all threads, then this process ends with status {HUNG}; "
                            "the same command goes on from the newest checkpoint\n".encode())  # fmt: skip
                faulthandler.dump_traceback(2, all_threads=True)
                os._exit(HUNG)

    if seconds:
        threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield watch
    finally:
        left.set()
