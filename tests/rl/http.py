"""A server that stands in for a real one: JSON in, JSON out."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, Any], tuple[int, Any] | None]


def listener(answer: Answer) -> ThreadingHTTPServer:
    """A server, not yet started, that answers POST requests with `answer(path, body)`: (status, body); None says nothing and hangs up, and
    bytes are the beginning of an answer that is not said to its end, if there are any."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            response = answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if response is None:
                self.connection.close()
                return
            status, body = response
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + bool(isinstance(body, bytes) and body)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The address of such a server, which runs meanwhile."""
    server = listener(answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
