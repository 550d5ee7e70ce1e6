"""Serve rewards over HTTP: a reward model or a function on one machine, training on another.

    python -m aligner.serve_reward --reward runs/reward_llama3/export --port 8500
    python -m aligner.main --config configs/grpo_llama3.py ... --config.algorithm.reward_funcs="('http://HOST:8500/reward',)"

POST /reward  {"prompts": [...], "responses": [...], "golden": [...]}  ->  {"rewards": [...]}; prompts are texts or lists of messages,
golden (what answers may be compared to) may be left out. GET /health answers {"status": "ok"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aligner.commandline import arguments, ended
from aligner.data.samples import Bad, Unpaired, check
from aligner.rl.rewards import Reward, make_rewards, value
from aligner.types import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        "python -m aligner.serve_reward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--reward", required=True, help='reward model, "math", "format" or "package.module:function"')
    top.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    top.add_argument("--port", type=int, default=8500, help="0 takes a free one (default: %(default)s)")
    top.add_argument("--timeout", type=float, default=60.0, help="seconds that a request may take (default: %(default)s)")
    top.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of a reward model (default: %(default)s)")
    return top


def asked(data: bytes) -> tuple[list, list[str], list]:
    """(prompts, responses, golden) of a request.

    Raises:
        ValueError: it is no JSON, or holds something else than these lists.
        UserError: the lists are not of one length.
    """
    body = json.loads(data)
    if not isinstance(body, dict):
        raise ValueError(f"it is a {type(body).__name__}, not a JSON object of prompts and responses")
    lists = prompts, responses, golden = [body.get("prompts"), body.get("responses"), body.get("golden") or []]
    for name, found in zip(("prompts", "responses", "golden"), lists):
        if not isinstance(found, list):
            raise ValueError(f"its {name} are a {type(found).__name__}, not a list" if name in body else f"it has no {name}")
    golden = golden or [None] * len(responses)
    if not len(prompts) == len(responses) == len(golden):
        raise UserError(f"{len(prompts)} prompts, {len(responses)} responses and {len(golden)} golden answers")
    for number, (prompt, response) in enumerate(zip(prompts, responses)):
        if not isinstance(response, str):
            raise ValueError(f"response {number} is a {type(response).__name__}, not a text")
        try:
            check(Unpaired(prompt, response, True))
        except Bad as bad:
            raise ValueError(f"of pair {number}, {bad.detail}") from None
    return prompts, responses, golden


def told(message: str) -> str:
    """A message about a config's settings in the words of this program."""
    own = {"config.algorithm.reward_timeout": "--timeout of the server", "config.algorithm.reward_funcs": "--reward"}
    return re.sub("|".join(map(re.escape, own)), lambda match: own[match[0]], message)


def make_server(reward: Reward, host: str, port: int, timeout: float) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`; its reward is asked by one request at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # whoever asked has gone, as a training that was stopped
                super().handle()

        def do_GET(self) -> None:
            self.answer(*((200, {"status": "ok"}) if self.path == "/health" else (404, {"error": f"there is no {self.path}"})))

        def do_POST(self) -> None:
            try:
                prompts, responses, golden = asked(self.rfile.read(max(0, int(self.headers.get("Content-Length", 0)))))
                with lock:
                    found = value([reward], prompts, responses, {"ground_truth": golden}, timeout)[:, 0] if responses else []
                self.answer(200, {"rewards": [None if one != one else float(one) for one in found]})
            except (ValueError, RecursionError) as error:
                self.answer(400, {"error": f"the request cannot be read: {error}"})
            except UserError as error:
                self.answer(422, {"error": told(str(error))})

        def answer(self, code: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 stopped by Ctrl-C as it is meant to be, 2 bad input, 130 Ctrl-C before it served."""
    args = arguments(parser(), argv)

    def serve() -> None:
        if not args.timeout > 0:
            raise UserError(f"--timeout is {args.timeout}; it must be above 0")
        try:
            [reward] = make_rewards([args.reward], dtype=args.dtype)
        except OSError as error:
            raise UserError(str(error)) from None
        try:
            server = make_server(reward, args.host, args.port, args.timeout)
        except (OSError, OverflowError) as error:  # the second: a port that is none
            where = f"--host {args.host} --port {args.port}"
            raise UserError(f"cannot serve at {where}: {error}; name others, --port 0 takes a free one") from None
        print(f"serving {args.reward} at http://{args.host}:{server.server_address[1]}/reward", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()

    return ended(serve, told)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a reward model that is still asked runs in threads, which the interpreter's own end would turn into an abort
