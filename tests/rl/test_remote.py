"""The reward server and its client over real sockets: values, a server that comes late, one that dies, one that talks nonsense."""

import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from aligner.rl import verifiers
from aligner.rl.remote import make_remote_reward
from aligner.rl.rewards import Reward, make_rewards, value
from aligner.serve_reward import main, make_server
from aligner.types import UserError
from tests.rl.http import listener


@pytest.fixture
def serve():
    """Start a server in a thread; gives its address."""
    running = []

    def start(server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/reward"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def answers(*responses):
    """A server that gives these (status, body) in turn, the last one for ever; None says nothing and hangs up."""
    left = list(responses)
    return listener(lambda path, body: left.pop(0) if len(left) > 1 else left[0])


def test_served_and_asked(serve):
    url = serve(make_server(Reward("math", verifiers.math), "127.0.0.1", 0, 5.0))
    prompts = ["1 + 1 =", [{"role": "user", "content": "2 + 2 ="}], "x"]
    found = value(make_rewards([url]), prompts, ["2", "5", "1"], {"ground_truth": ["2", "4", None]}, 5.0)
    np.testing.assert_array_equal(found, [[1], [0], [np.nan]])


def test_the_server_says_what_is_wrong_with_a_request(serve):
    url = serve(make_server(Reward("math", verifiers.math), "127.0.0.1", 0, 5.0))
    for body, status, words in (
        (b"{}", 400, "it has no prompts"),
        (b"[]", 400, "it is a list, not a JSON object"),
        (b"[" * 100_000, 400, "recursion"),
        (b'{"prompts": ["a"], "responses": []}', 422, "1 prompts, 0 responses"),
        (b'{"prompts": "abc", "responses": "xyz"}', 400, "its prompts are a str, not a list"),  # and not three pairs of letters
        (b'{"prompts": ["a", "b"], "responses": ["c", null]}', 400, "response 1 is a NoneType, not a text"),
        (b'{"prompts": [[{"content": "a"}]], "responses": ["b"]}', 400, "of pair 0, prompt holds a part that is neither text nor"),
        (b'{"prompts": [[{"role": "user"}]], "responses": ["b"]}', 400, "of pair 0, prompt holds a message without role or content"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(url, body), timeout=5)
        assert error.value.code == status and words in error.value.read().decode()


def test_whoever_asks_may_leave(serve, capsys):
    """A training that is stopped, before it has said all or before it has its answer."""
    gone = threading.Event()
    server = make_server(Reward("slow", lambda prompts, completions, **_: [float(gone.wait(5))]), "127.0.0.1", 0, 5.0)
    server.daemon_threads = False  # so that its end waits for them
    serve(server)
    for body, length in ((b'{"prompts": ["a"], "responses": ["b"]}', 38), (b"{", 99), (b"", -1)):
        with socket.create_connection(server.server_address) as asking:
            asking.sendall(b"POST /reward HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (length, body))
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed without a farewell
            time.sleep(0.1)
    gone.set()
    server.shutdown()
    server.server_close()
    assert capsys.readouterr() == ("", "")


def test_a_slow_reward_names_the_servers_own_option(serve):
    url = serve(make_server(Reward("slow", lambda prompts, completions, **_: [time.sleep(0.5)]), "127.0.0.1", 0, 0.1))
    with pytest.raises(UserError, match="make it quicker, or raise --timeout of the server"):
        make_remote_reward(url, timeout=5)(["a"], ["b"])


def endless(prompts, completions, **columns):
    """A model that is being asked."""
    import jax

    double = jax.jit(lambda x: x @ x)
    while True:
        double(np.eye(300)).block_until_ready()


def test_ctrl_c_while_a_model_is_asked():
    """What runs in its threads must not turn the end into an abort."""
    command = [sys.executable, "-m", "aligner.serve_reward", "--reward", "tests.rl.test_remote:endless", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().rpartition(":")[2].removesuffix("/reward\n"))
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.sendall(b'POST /reward HTTP/1.1\r\nContent-Length: 38\r\n\r\n{"prompts": ["a"], "responses": ["b"]}')
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            assert (process.wait(20), process.stderr.read()) == (0, "")


def test_asked_again_until_the_server_is_there(serve):
    """It is busy, hangs up, hangs up within its answer, answers."""
    url = serve(answers((503, {}), None, (200, b'{"rewards"'), (200, {"rewards": [0.5]})))
    assert make_remote_reward(url, timeout=5, wait=0.01)(["a"], ["b"]) == [0.5]


def test_a_server_that_died_is_told_in_one_sentence():
    start = time.monotonic()
    with pytest.raises(UserError, match=r"gives no answer after 3 tries .*give the same command again"):
        make_remote_reward("http://127.0.0.1:9/reward", timeout=1, retries=2, wait=0.01)(["a"], ["b"])
    assert time.monotonic() - start < 10


def test_nonsense_is_refused(serve):
    with pytest.raises(UserError, match="answered without `rewards`; its keys are scores"):
        make_remote_reward(serve(answers((200, {"scores": [1]}))), wait=0.01)(["a"], ["b"])
    with pytest.raises(UserError, match=r"400: .*bad"):
        make_remote_reward(serve(answers((400, {"error": "bad"}))), wait=0.01)(["a"], ["b"])


def test_a_port_that_cannot_be_had_is_named(capsys):
    with make_server(make_rewards(["math"])[0], "127.0.0.1", 0, 60.0) as server:
        port = server.server_address[1]
        assert main(["--reward", "math", "--port", str(port)]) == 2
    assert f"cannot serve at --host 127.0.0.1 --port {port}: " in (told := capsys.readouterr().err) and "--port 0 takes a free one" in told
