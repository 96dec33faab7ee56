"""A receiver of webhooks, in the test's own process, that can be down, slow, or broken."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook

from tests.stack import free_port


@dataclass(frozen=True)
class Message:
    """One that has come."""

    headers: dict[str, str]
    body: bytes

    def open(self, secret: str) -> dict[str, object]:
        """What it says. Raises where the signature is wrong."""
        return Webhook(secret).verify(self.body.decode(), self.headers)


class Receiver:
    """Listens between ``up`` and ``down``, always on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.messages: list[Message] = []
        self.secret = ""
        """With one, messages are opened when they come, into ``said``: signatures are good for five minutes."""
        self.said: list[dict[str, object]] = []
        self.answer = threading.Event()
        """Nothing is answered until it is set."""
        self.answer.set()
        self._server: ThreadingHTTPServer | None = None

    def up(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                message = Message({name.lower(): value for name, value in self.headers.items()}, body)
                receiver.messages.append(message)
                if receiver.secret:
                    receiver.said.append(message.open(receiver.secret))
                receiver.answer.wait()
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
