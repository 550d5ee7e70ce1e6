"""Sides of a comparison as processes of their own, which take turns: each is set up as its users run it, and waits while another works.

A side reads a line, takes its turn of one or several pieces of work, and answers with a line of JSON: seconds and CPU seconds of all
threads for a piece, and memory. The first piece, unasked, compiles and warms up; peak memory is the highest resident memory after that,
`net` less what the process held after its imports. A turn of several pieces is the nearest to training, where a step follows a step: the
host takes back what a waiting process holds, and the first piece after a pause pays for that, as no step of a training run does. A
turn's time is therefore the median of its pieces; their mean, that first piece in it, stands beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from benchmarks import machine

MARK = "MEASURED "
NOTHING = MappingProxyType({})
TIMES = ("seconds", "mean", "cpu_seconds")  # of a piece: median and mean of a turn's, and the median of what all threads spent
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # the C library's setting that aligner's command line asks for


def answering(imported: float, turn: int = 1) -> Callable[..., None]:
    """What a side calls after each piece of work; it returns when the next one is wanted, and ends the process when none is.

    Args:
        imported: MiB that the process held after its imports.
        turn: pieces of work in a turn.
    """
    warm, spent = False, []

    def answer(seconds: float, cpu_seconds: float, result: Any = None) -> None:
        nonlocal warm
        spent.append((seconds, cpu_seconds))
        if warm and len(spent) < turn:
            return
        times, cpu_times = zip(*spent)
        found = dict(seconds=statistics.median(times), mean=statistics.mean(times), cpu_seconds=statistics.median(cpu_times), pieces=times)
        peak = machine.resident_mib(peak=True)
        print(MARK + json.dumps(found | dict(peak=peak, net=peak - imported, result=result)), flush=True)
        if not warm:
            machine.forget_peak()
        warm = True
        spent.clear()
        if not sys.stdin.readline():
            os._exit(0)  # a trainer's own loop has no other way out

    return answer


def serve(work: Callable[[], Any], answer: Callable[..., None]) -> None:
    """Work whenever asked; what `work` returns must be JSON's."""
    while True:
        start = time.perf_counter(), time.process_time()
        result = work()
        answer(time.perf_counter() - start[0], time.process_time() - start[1], result)


def take_turns(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    environment: Mapping[str, Mapping[str, str]] = NOTHING,
    interpreters: Mapping[str, str] = NOTHING,
) -> dict[str, list[dict]]:
    """What every side measured in every round.

    Args:
        commands: name of a side -> arguments behind `python -m`.
        rounds: how many turns each takes, after the first piece of work.
        environment: name of a side -> variables that it alone gets.
        interpreters: name of a side -> the Python that runs it, where that is not this one.
    """
    processes, found = {}, {name: [] for name in commands}

    def next_answer(name: str) -> dict[str, Any]:
        for line in processes[name].stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise SystemExit(f"{name} ended early")

    try:
        for name, command in commands.items():  # one after the other: each warms up alone
            variables = {**os.environ, **environment.get(name, {})}
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes[name] = subprocess.Popen([interpreters.get(name, sys.executable), "-m", *command], text=True, env=variables, **pipes)
            next_answer(name)
        for number in range(1, rounds + 1):
            for name in commands:
                print(file=processes[name].stdin, flush=True)
                found[name].append(next_answer(name))
            print(f"  round {number}: " + ", ".join(f"{name} {found[name][-1]['seconds']:.2f} s" for name in commands), flush=True)
    finally:
        for process in processes.values():
            process.kill()
    return found


def ratio(found: Mapping[str, list[dict]], base: str, name: str, key: str = "seconds") -> float:
    """How many times as fast as `base` a side is: the median over rounds, each paired with itself; nan where one did not run."""
    rounds = list(zip(found.get(base, []), found.get(name, [])))
    return statistics.median(a[key] / b[key] for a, b in rounds) if rounds else float("nan")


def summary(found: Mapping[str, list[dict]], bases: Sequence[str]) -> dict[str, dict]:
    """Medians of times, highest memory, and against each base the ratios of TIMES; printed as a table, too."""
    rows = {}
    for name, rounds in found.items():
        middle = {key: statistics.median(answer[key] for answer in rounds) for key in TIMES}
        highest = {key: max(answer[key] for answer in rounds) for key in ("peak", "net")}
        ratios = {base: [ratio(found, base, name, key) for key in TIMES] for base in bases}
        rows[name] = {**middle, **highest, **ratios, "rounds": rounds}
    heads = "".join(f" {base + '/side':>11} {'mean':>5} {'CPU':>5}" for base in bases)
    print(f"{'side':24} {'s/step':>7} {'CPU s':>7}{heads}  peak MiB  net MiB")
    for name, row in rows.items():
        ratios = "".join(" {:11.2f} {:5.2f} {:5.2f}".format(*row[base]) for base in bases)
        print(f"{name:24} {row['seconds']:7.2f} {row['cpu_seconds']:7.2f}{ratios} {row['peak']:9.0f} {row['net']:8.0f}", flush=True)
    return rows
