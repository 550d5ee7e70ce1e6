"""A vLLM and an SGLang server, stood in for by one that speaks their protocol and writes with our own sampler."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from aligner.generation.engine import Prompt, generate_all, make_engine
from aligner.generation.sampling import Sampling
from aligner.rl.engines import Local, Server
from aligner.types import UserError

SAMPLING = Sampling(max_new_tokens=5, temperature=1.0, stop_tokens=(2,))


@pytest.fixture
def stand_in(llama):
    """(address, requests it got): answers /v1/completions as vLLM does, with log-probabilities."""
    engine = make_engine(llama.model, SAMPLING, rows=2)
    params, seen = engine.prepare(llama.params), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            self.reply({"/update_weights_from_disk": lambda: {"success": True, "message": "ok"},
                        "/collective_rpc": lambda: {"results": [None]}, "/v1/completions": lambda: self.write(body)}[self.path]())  # fmt: skip

        def write(self, body):
            prompt = Prompt(np.array(body["prompt"], np.int32))
            [answers] = generate_all(engine, params, [prompt], jax.random.key(body["seed"]), body["n"])
            return {"choices": [
                {"index": i, "token_ids": a.tokens.tolist(), "finish_reason": "stop" if a.stopped else "length",
                 "logprobs": {"token_logprobs": a.logps.tolist()}} for i, a in reversed(list(enumerate(answers)))]}  # fmt: skip

        def reply(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


def test_a_server_writes_what_the_engine_here_writes(llama, stand_in, tmp_path):
    url, seen = stand_in
    exported = []
    server = Server(url, "vllm", SAMPLING, tmp_path, lambda params, folder: exported.append(folder), every=2, wait=0.01)
    for version in range(4):
        server.update(llama.params, version)
    assert len(exported) == 2 and [path for path, _ in seen] == ["/collective_rpc"] * 2, "weights are refreshed at every second version"
    prompts = [Prompt(pair.prompt) for pair in llama.pairs[:2]]
    found = server.generate(prompts, 2, [0, 1])
    local = Local(make_engine(llama.model, SAMPLING, rows=2), jax.random.key(0))
    local.update(llama.params, 0)
    wanted = local.generate(prompts[:1], 2, [0])
    for ours, theirs in zip(found[0], wanted[0]):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.stopped == theirs.stopped
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-6)
    body = seen[-1][1]
    assert body["prompt"] == prompts[1].tokens.tolist() and body["stop_token_ids"] == [2] and body["return_token_ids"] is True


def test_sglang_takes_its_weights_from_disk(llama, stand_in, tmp_path):
    url, seen = stand_in
    Server(url, "sglang", SAMPLING, tmp_path, lambda params, folder: None).update(llama.params, 0)
    assert seen == [("/update_weights_from_disk", {"model_path": str(tmp_path)})]


def test_a_server_that_is_gone_is_told(tmp_path):
    server = Server("http://127.0.0.1:9", "vllm", SAMPLING, tmp_path, lambda *a: None, retries=1, wait=0.01)
    with pytest.raises(UserError, match="gives no answer after 2 tries"):
        server.generate([Prompt(np.array([3], np.int32))], 1, [0])
