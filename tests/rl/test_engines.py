"""A vLLM and an SGLang server, stood in for by one that speaks their protocol and writes with our own sampler."""

import base64
import contextlib
import io
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from aligner.generation.engine import Prompt, generate_all, make_engine
from aligner.generation.sampling import Sampling
from aligner.rl.engines import Local, Server
from aligner.types import UserError
from tests.generation.test_engine import pictures_of
from tests.rl.http import serving

SAMPLING = Sampling(max_new_tokens=5, temperature=1.0, stop_tokens=(2,))


@contextlib.contextmanager
def standing_in(f, prompts=()):
    """A server that answers as vLLM and SGLang do, and the (path, body) of its requests. With pictures it knows the `prompts`."""
    engine = make_engine(f.model, SAMPLING, rows=2)
    params, seen = engine.prepare(f.params), []
    one_at_a_time = threading.Lock()

    def written(prompt, seed, n):
        with one_at_a_time:
            return generate_all(engine, params, [prompt], jax.random.key(seed), n)[0]

    def known(images):
        return next(prompt for prompt in prompts if len(prompt.source[1]) == images)

    def completions(body):
        choices = []
        for i, a in reversed(list(enumerate(written(Prompt(np.array(body["prompt"], np.int32)), body["seed"], body["n"])))):
            choices.append({"index": i, "token_ids": a.tokens.tolist(), "finish_reason": "stop" if a.stopped else "length",
                            "logprobs": {"token_logprobs": a.logps.tolist()}})  # fmt: skip
        return {"choices": choices}

    def chat(body):
        prompt = known(sum(part["type"] == "image_url" for message in body["messages"] for part in message["content"]))
        choices = []
        for i, a in enumerate(written(prompt, body["seed"], body["n"])):
            choices.append({"index": i, "token_ids": a.tokens.tolist(), "finish_reason": "stop" if a.stopped else "length",
                            "logprobs": {"content": [{"token": "", "logprob": float(x)} for x in a.logps]}})  # fmt: skip
        return {"choices": choices, "prompt_token_ids": prompt.tokens.tolist()}

    def generate(body):
        prompt = known(len(body["image_data"])) if "image_data" in body else Prompt(np.array(body["input_ids"], np.int32))
        [a] = written(prompt, 0, 1)
        about = {"output_token_logprobs": [[float(x), t, None] for x, t in zip(a.logps, a.tokens.tolist())]}
        return {"output_ids": a.tokens.tolist(), "meta_info": about | {"finish_reason": {"type": "stop" if a.stopped else "length"}}}

    answers = {"/update_weights_from_disk": lambda body: {"success": True, "message": "ok"}, "/v1/completions": completions,
               "/collective_rpc": lambda body: {"results": [None]}, "/reset_prefix_cache": lambda body: b"", "/v1/chat/completions": chat, "/generate": generate}  # fmt: skip

    def answer(path, body):
        seen.append((path, body))
        return 200, answers[path](body)

    with serving(answer) as url:
        yield url, seen


@pytest.fixture
def stand_in(llama):
    with standing_in(llama) as found:
        yield found


def test_a_server_writes_what_the_engine_here_writes(llama, stand_in, tmp_path):
    url, seen = stand_in
    exported = []
    server = Server(url, "vllm", SAMPLING, tmp_path, lambda params, folder: exported.append(folder), every=2, wait=0.01)
    for version in range(4):
        server.update(llama.params, version)
    assert len(exported) == 2 and [path for path, _ in seen] == ["/collective_rpc", "/reset_prefix_cache"] * 2, "weights are refreshed at every second version"
    prompts = [Prompt(pair.prompt) for pair in llama.pairs[:2]]
    found = server.generate(prompts, 2, [0, 1])
    local = Local(make_engine(llama.model, SAMPLING, rows=2), jax.random.key(0))
    local.update(llama.params, 0)
    wanted = local.generate(prompts[:1], 2, [0])
    same(found[0], wanted[0])
    [body] = [body for path, body in seen if body.get("prompt") == prompts[1].tokens.tolist()]
    assert body["stop_token_ids"] == [2] and body["return_token_ids"] is True
    assert body["skip_special_tokens"] is False  # or no stop string could be one


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.stopped == theirs.stopped
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-6)


def here(f, prompts, n=1):
    local = Local(make_engine(f.model, SAMPLING, rows=2), jax.random.key(0))
    local.update(f.params, 0)
    return local.generate(prompts, n, [0] * len(prompts))


def test_sglang_writes_and_takes_its_weights_from_disk(llama, stand_in, tmp_path):
    url, seen = stand_in
    server = Server(url, "sglang", SAMPLING, tmp_path, lambda params, folder: None)
    server.update(llama.params, 0)
    assert seen == [("/update_weights_from_disk", {"model_path": str(tmp_path)})]
    prompts = [Prompt(pair.prompt) for pair in llama.pairs[:2]]
    same(server.generate(prompts, 1, [0, 1])[0], here(llama, prompts[:1])[0])
    body = next(body for path, body in seen if body.get("input_ids") == prompts[0].tokens.tolist())
    assert body["return_logprob"] is True and body["sampling_params"]["stop_token_ids"] == [2] and "image_data" not in body
    assert body["sampling_params"]["skip_special_tokens"] is False


def with_pictures(f):
    """A prompt with two pictures, as a server and as the model here take it, and the pictures."""
    pair = next(pair for pair in f.pairs if len(pair.media) == 2)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)) for _ in pair.media]
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}]
    return Prompt(pair.prompt, pictures_of(f, pair), (conversation, images)), images


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_pictures_are_sent_as_they_are(llava, tmp_path, kind):
    prompt, images = with_pictures(llava)
    placeholder = llava.model.media.placeholder
    with standing_in(llava, [prompt]) as (url, seen):
        server = Server(url, kind, SAMPLING, tmp_path, lambda *a: None, placeholder=placeholder, wait=0.01)
        same(server.generate([prompt], 1, [0])[0], here(llava, [prompt])[0])
        [(path, body)] = seen
        if kind == "sglang":
            urls = body["image_data"]
            assert path == "/generate" and body["input_ids"].count(placeholder) == 2
        else:
            parts = body["messages"][0]["content"]
            urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
            assert path == "/v1/chat/completions" and parts[1] == {"type": "text", "text": "or"}
        for sent, image in zip(urls, images, strict=True):
            data = base64.b64decode(sent.removeprefix("data:image/png;base64,"))
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
        other = prompt._replace(tokens=np.append(prompt.tokens, 9).astype(np.int32))
        if kind == "vllm":
            with pytest.raises(UserError, match="is its chat template another"):
                server.generate([other], 1, [0])
        with pytest.raises(UserError, match="later turns of an episode"):
            server.generate([prompt._replace(source=None)], 1, [0])


def test_a_server_that_keeps_what_old_weights_made_of_prompts_is_told(tmp_path):
    told = pytest.raises(UserError, match="still keeps what earlier weights made")
    with serving(lambda path, body: (200, {"success": False} if path == "/reset_prefix_cache" else {})) as url, told:
        Server(url, "vllm", SAMPLING, tmp_path, lambda *a: None).update({}, 0)


def test_a_server_that_is_gone_is_told(tmp_path):
    server = Server("http://127.0.0.1:9", "vllm", SAMPLING, tmp_path, lambda *a: None, retries=1, wait=0.01)
    with pytest.raises(UserError, match="gives no answer after 2 tries"):
        server.generate([Prompt(np.array([3], np.int32))], 1, [0])
