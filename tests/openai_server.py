"""A tiny OpenAI-compatible server on the loopback, real HTTP, that misbehaves as it is told; and what it saw.

It answers chats with texts, or completions of token ids with choices.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Misbehave:
    """Ways to fail, each a function of the handler that answers the request in place of a text."""

    @staticmethod
    def status(code: int, **headers: str):
        return lambda handler: handler.send(code, b'{"error": "no"}', headers)

    @staticmethod
    def stall(seconds: float):
        def wait(handler):
            time.sleep(seconds)
            handler.close_connection = True

        return wait

    @staticmethod
    def hang_up(handler):
        handler.close_connection = True

    @staticmethod
    def body(text: str):
        return lambda handler: handler.send(200, text.encode(), {})


class Server:
    """Answers `answer(question text)`; `plan(question text, how often it was asked)` may return a misbehaviour
    instead. With `complete` it answers completions by `complete(body)`, a choice, and is healthy; the question text is
    then the prompt's ids as JSON.
    """

    def __init__(
        self,
        answer: Callable[[str], str] = str.upper,
        plan=lambda text, tries: None,
        models=("tiny",),
        key: str | None = None,
        complete: Callable[[dict], dict] | None = None,
    ):
        self.answer, self.plan, self.models, self.key, self.complete = answer, plan, models, key, complete
        self.asked: Counter = Counter()
        self.bodies: list[dict] = []
        self.moments: list[float] = []
        self.lock = threading.Lock()

    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def _handler(server: Server) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, code: int, body: bytes, headers: dict) -> None:
            self.send_response(code)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def allowed(self) -> bool:
            if server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}":
                return True
            self.send(401, b'{"error": "key"}', {})
            return False

        def do_GET(self):
            if server.complete is not None and self.path == "/health":
                self.send(200, b"", {})
            elif self.allowed() and self.path == "/v1/models":
                self.send(200, json.dumps({"data": [{"id": name} for name in server.models]}).encode(), {})
            elif self.path != "/v1/models":
                self.send(404, b"<html>not here</html>", {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            if self.path != ("/v1/chat/completions" if server.complete is None else "/v1/completions"):
                self.send(404, b"<html>not here</html>", {})
                return
            text = body["messages"][-1]["content"] if server.complete is None else json.dumps(body["prompt"])
            with server.lock:
                server.asked[text] += 1
                server.bodies.append(body)
                server.moments.append(time.monotonic())
                tries = server.asked[text]
            misbehave = server.plan(text, tries)
            if misbehave is not None:
                misbehave(self)
                return
            if server.complete is not None:
                choice = server.complete(body)
            else:
                choice = {"message": {"role": "assistant", "content": server.answer(text)}}
            self.send(200, json.dumps({"choices": [choice]}).encode(), {})

    return Handler


@contextmanager
def serve(*args, port: int = 0, **kwargs):
    """A `Server` that runs while the `with` is open."""
    server = Server(*args, **kwargs)
    http = ThreadingHTTPServer(("127.0.0.1", port), _handler(server))
    http.daemon_threads = True
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
