"""Send requests to a running stack as a client would, check the videos that come back, and say how long each part took.

    python deploy/smoke.py [--url http://127.0.0.1:8000] [--requests N]

Where the service needs API keys, FASTLIGHTGEN_KEY holds one.

Standard library only, so that it runs wherever the service can be reached from.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

IMAGE = Path(__file__).resolve().parent.parent / "models" / "examples" / "red-circle.png"
PROMPT = "a red circle moves right quickly, static camera"

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> int:
    """Exit code 1: an answer was not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('PORT') or 8000}")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    try:
        runs = [_generate(options.url, options.image, options.prompt, seed) for seed in range(options.requests)]
    except (OSError, ValueError) as error:
        print(f"error: {options.url}: {error}", file=sys.stderr)
        return 1
    if len(runs) == 1:
        print(runs[0].pop("video_url"))
    _print_table(runs)
    return 0


def _generate(url: str, image: Path, prompt: str, seed: int) -> dict[str, Any]:
    """One request, start to MP4; seconds by part. Raises ``OSError`` or ``ValueError``."""
    body = {
        "image": f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}",
        "prompt": prompt,
        "seed": seed,
    }
    headers = {"Content-Type": "application/json", "Prefer": "wait=60"}
    if key := os.environ.get("FASTLIGHTGEN_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    started = time.perf_counter()
    job = json.loads(_read(urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)))  # noqa: S310
    answered = time.perf_counter()
    if job["status"] != "succeeded":
        raise ValueError(f"{job['id']} is {job['status']} after {answered - started:.0f} s: {job['error']}")
    video = _read(job["video_url"])
    fetched = time.perf_counter()
    if video[4:8] != b"ftyp" or not 0 < video.find(b"moov") < video.find(b"mdat"):
        raise ValueError(f"{job['video_url']} is no MP4 that plays while it loads")
    phases = json.loads(_read(job["manifest_url"]))["timings_s"]
    return {
        "video_url": job["video_url"],
        "request": answered - started,
        **phases,
        "service and queue": answered - started - sum(phases.values()),
        "download": fetched - answered,
    }


def _read(request: str | urllib.request.Request) -> bytes:
    try:
        with _OPENER.open(request, timeout=90) as response:
            return bytes(response.read())
    except urllib.request.HTTPError as error:
        raise ValueError(f"{error.code}: {error.read(500).decode(errors='replace')}") from None


def _print_table(runs: list[dict[str, Any]]) -> None:
    """Milliseconds by part: the middle of all requests, and the slowest."""
    parts = [name for name in runs[0] if name != "video_url"]
    print(f"{len(runs)} requests, one after another, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'part':20}{'median ms':>12}{'slowest ms':>12}")
    for part in parts:
        values = [1000 * run[part] for run in runs]
        print(f"{part:20}{statistics.median(values):12.1f}{max(values):12.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
