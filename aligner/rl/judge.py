"""math-verify in a process of its own: a verdict on a mathematical answer within seconds, whatever a policy has written.

math-verify holds its time by signals, which only a process's main thread gets, and rewards are asked in threads; and nothing but the
end of its process stops a power tower that is being multiplied out.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading

LIMIT = 5.0  # seconds that a verdict may take; what takes longer is not right
START = 120.0  # seconds that the process may take to start

# A line of JSON in, [truth, text], and a line out; what the package prints itself goes to stderr. Its own time limits are off.
PROGRAM = """
import json, logging, os, sys
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
print("ready", file=out, flush=True)
for line in sys.stdin:
    truth, text = json.loads(line)
    try:
        right = bool(verify(parse(truth, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))
    except Exception:
        right = False
    print(json.dumps(right), file=out, flush=True)
"""


class Judge:
    """The process, which is started when it is first asked, and again after it had to be stopped."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def __call__(self, truth: str, text: str) -> bool:
        """Whether math-verify finds both the same; no where it does not come to an end, or its process dies of it."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=os.environ | paths, **pipes)
                if self.heard(START) != "ready\n":
                    raise RuntimeError("math-verify cannot be started; see what it said above, or uninstall it")
            try:
                self.process.stdin.write(json.dumps([truth, text]) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                return False
            return self.heard(LIMIT) == "true\n"

    def heard(self, seconds: float) -> str:
        """The next line; empty, and the process is gone, where there is none in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            self.process.wait()
        return line


right = Judge()
