"""Several processes of one run on this machine: to try what a cluster will do, or one process for each GPU.

    python launch/local.py --processes 2 -- --config configs/dpo_llava.py:tiny --workdir runs/two --config.mesh.fsdp=2
    python launch/local.py --processes 8 --gpus -- --config configs/dpo_llava.py --workdir runs/dpo --config.mesh.fsdp=8

All end when one of them fails, with its exit status. What asks a run to stop (Ctrl-C, SIGTERM, SIGUSR1, a terminal that is closed) is
handed on, so that they save and stop together.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    usage = "%(prog)s --processes N [--gpus] -- ARGUMENTS"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="one GPU for each process, of CUDA_VISIBLE_DEVICES if that is set")
    parser.add_argument("arguments", nargs="+", help="behind --: what follows python -m aligner.main")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1")
    visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))) or [str(rank) for rank in range(options.processes)]
    if options.gpus and len(visible) < options.processes:
        parser.error(f"--processes {options.processes}: CUDA_VISIBLE_DEVICES has only {len(visible)} GPUs, {','.join(visible)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(rank: int) -> subprocess.Popen:
        world = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(options.processes), "JAX_PROCESS_ID": str(rank)}
        own = {"CUDA_VISIBLE_DEVICES": visible[rank]} if options.gpus else {}
        command = [sys.executable, "-m", "aligner.main", *options.arguments]
        # in sessions of their own: Ctrl-C then comes once, from here
        return subprocess.Popen(command, env={**os.environ, **world, **own}, start_new_session=True)

    processes, told = [], []

    def hand_on(number, frame):
        told.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, hand_on)
    for rank in range(options.processes):
        processes.append(start(rank))
        if told:  # while they were started
            hand_on(told[-1], None)
            break
    codes = lambda: [128 - code if (code := process.poll() or 0) < 0 else code for process in processes]
    alive = lambda: any(process.poll() is None for process in processes)
    first = 0
    while alive():
        if failed := [(rank, code) for rank, code in enumerate(codes()) if code]:
            first = first or failed[0][1]
            time.sleep(5)  # what it failed for may stop the others as well, in their own words
            if alive():
                print("process {} ended with status {}, so the others are ended too".format(*failed[0]), file=sys.stderr)
            hand_on(signal.SIGKILL, None)
        time.sleep(0.1)
    return first or next(filter(None, codes()), 0)


if __name__ == "__main__":
    sys.exit(main())
