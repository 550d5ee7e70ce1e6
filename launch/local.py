"""Several processes of one run on this machine: to try what a cluster will do, or one process for each GPU.

    python launch/local.py --processes 2 -- --config configs/dpo_llava.py:tiny --workdir runs/two --config.mesh.fsdp=2
    python launch/local.py --processes 8 --gpus -- --config configs/dpo_llava.py --workdir runs/dpo --config.mesh.fsdp=8

All end when one of them fails; SIGTERM and Ctrl-C are handed on, so that they save and stop together.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="each process takes the GPU of its number, not all of them")
    parser.add_argument("arguments", nargs="+", help="behind --: what follows python -m aligner.main")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes}: at least 1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(rank: int) -> subprocess.Popen:
        world = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(options.processes), "JAX_PROCESS_ID": str(rank)}
        own = {"CUDA_VISIBLE_DEVICES": str(rank)} if options.gpus else {}
        command = [sys.executable, "-m", "aligner.main", *options.arguments]
        # in sessions of their own: Ctrl-C then comes once, from here
        return subprocess.Popen(command, env={**os.environ, **world, **own}, start_new_session=True)

    processes = [start(rank) for rank in range(options.processes)]

    def hand_on(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    codes = lambda: [128 - code if (code := process.poll() or 0) < 0 else code for process in processes]
    alive = lambda: any(process.poll() is None for process in processes)
    while alive():
        if failed := [(rank, code) for rank, code in enumerate(codes()) if code]:
            time.sleep(5)  # what it failed for may stop the others as well, in their own words
            if alive():
                print("process {} ended with status {}, so the others are ended too".format(*failed[0]), file=sys.stderr)
            hand_on(signal.SIGKILL, None)
        time.sleep(0.1)
    return next(filter(None, codes()), 0)


if __name__ == "__main__":
    sys.exit(main())
