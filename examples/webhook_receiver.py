"""Receives the messages about jobs that are over, and fetches their videos. Needs the package `standardwebhooks`.

FASTLIGHTGEN_WEBHOOK_SECRET=whsec_... python examples/webhook_receiver.py 8900

The secret is what `python -m service keys webhook-secret ID` prints, and came with the key. A job's `webhook_url` is
this program's address: https, but for hosts that PRIVATE_HOSTS names.
"""

import os
import queue
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from standardwebhooks import Webhook, WebhookVerificationError

WEBHOOK = Webhook(os.environ["FASTLIGHTGEN_WEBHOOK_SECRET"])
MAX_BYTES = 64 * 1024
arrived: queue.Queue[tuple[str, dict]] = queue.Queue()


class Receiver(BaseHTTPRequestHandler):
    """Answers at once, and leaves the work to another thread: who is not answered within 10 s sends again."""

    timeout = 10

    def do_POST(self) -> None:
        try:
            body = self.rfile.read(min(int(self.headers["Content-Length"]), MAX_BYTES))
            # The bytes as they came. What is more than 5 minutes old is refused as well: somebody sends it again.
            message = WEBHOOK.verify(body, dict(self.headers))
        except (WebhookVerificationError, ValueError, TypeError) as error:
            print(f"refused: {error}", file=sys.stderr)
            self.send_response(400)
        else:
            arrived.put((self.headers["webhook-id"], message))
            self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: what counts is said below."""


def work() -> None:
    """One message after the other. Each arrives at least once, so those that are done already are left alone."""
    done: set[str] = set()  # in earnest: in a database
    while True:
        message_id, message = arrived.get()
        if message_id in done:
            continue
        job = message["data"]
        if message["type"] == "generation.succeeded":
            path = Path(f"{job['id']}.mp4").resolve()
            try:
                urllib.request.urlretrieve(job["video_url"], path)  # the link needs no key
            except OSError as error:
                print(f"{job['id']}: {error}; have the message sent again", file=sys.stderr)
                continue
            print(path, flush=True)
        else:
            print(f"{job['id']} {job['status']}: {job['error']}", file=sys.stderr)
        done.add(message_id)


if __name__ == "__main__":
    threading.Thread(target=work, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
