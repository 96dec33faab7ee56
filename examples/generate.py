"""An image and a sentence in, an MP4 out, with httpx:

python examples/generate.py models/examples/red-circle.png "a red circle moves right quickly, static camera"
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

URL = os.environ.get("FASTLIGHTGEN_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("FASTLIGHTGEN_KEY")
UNDER_WAY = ("queued", "running", "cancelling")
TRIES = 6


def submit(client: httpx.Client, image: Path, prompt: str) -> dict:
    """The job. However often the request is sent, it is one: each try has the same Idempotency-Key."""
    body = {"data": {"prompt": prompt}, "files": {"image": image.read_bytes()}}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    for attempt in range(TRIES):
        wait_s = 2.0**attempt
        try:
            answer = client.post("/generate", **body, headers=headers)
        except httpx.TransportError as error:
            problem = f"{URL}: {error}"
        else:
            if answer.is_success:
                return answer.json()
            problem = answer.text
            # A refusal that may be another one later says when: the rest is for good.
            if answer.is_client_error and "Retry-After" not in answer.headers:
                break
            wait_s = float(answer.headers.get("Retry-After", wait_s))
        if attempt + 1 < TRIES:
            print(f"trying again in {wait_s:g} s: {problem}", file=sys.stderr)
            time.sleep(wait_s)
    raise SystemExit(problem)


def follow(client: httpx.Client, job: dict) -> dict:
    """The job once it is over. A connection that breaks is made again, after the last event that came."""
    last_id = None
    while job["status"] in UNDER_WAY:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        try:
            # Something comes every 15 s: where nothing does, the connection is dead.
            with client.stream("GET", job["links"]["events"], headers=headers, timeout=45) as answer:
                if answer.is_client_error:
                    raise SystemExit(answer.read().decode())
                for event in events(answer.iter_lines()):
                    last_id, job = event["id"], json.loads(event["data"])
                    print(f"{job['status']} {job['progress']:.0%}", file=sys.stderr)
        except httpx.TransportError as error:
            print(f"connecting again: {error}", file=sys.stderr)
        if job["status"] in UNDER_WAY:
            time.sleep(2)
    return job


def events(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Server-sent events: fields, and an empty line at the end of each."""
    event: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, event[name] = line.partition(": ")
            continue
        if "data" in event:
            yield event
        event = {}


def main(image: str, prompt: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    with httpx.Client(base_url=URL, headers=headers, timeout=60, follow_redirects=True) as client:
        job = follow(client, submit(client, Path(image), prompt))
        if job["status"] != "succeeded":
            raise SystemExit(f"{job['status']}: {job['error']}")
        video = Path(f"{job['id']}.mp4").resolve()
        video.write_bytes(client.get(job["video_url"]).raise_for_status().content)
        print(video)


if __name__ == "__main__":
    main(*sys.argv[1:3])
