"""What a request costs, and what service and queue add to calling the model directly: `make bench`.

Needs the running stack (`make up`) and times three things in turn, each several times, in one run on one machine:
the pipeline called in this process; `POST /generate` with `Prefer: wait`, one after another; and the difference. The
worker is asked for its own timings through each video's manifest. Writes Markdown to the given file.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does

import httpx
from PIL import Image

from worker import video
from worker.pipeline import Options, VideoPipeline
from worker.settings import Settings

IMAGE = Path(__file__).resolve().parent.parent / "models" / "examples" / "red-circle.png"
PROMPT = "a red circle moves right quickly, static camera"


def main() -> int:
    """Exit code 1: the stack does not answer, or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('PORT') or 8000}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("serving.md"))
    options = parser.parse_args()
    settings = Settings()
    with httpx.Client(base_url=options.url, timeout=120) as client:
        try:
            [model] = client.get("/models").raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError) as error:
            sys.stderr.write(f"error: {options.url} does not answer ({error}); start the stack with `make up`\n")
            return 1
        pipeline = VideoPipeline(settings.model[0], Options.of(settings))
        if pipeline.card.sha256 != model["sha256"]:
            sys.stderr.write(f"error: the stack serves {model['name']}, and MODEL here is another model\n")
            return 1
        pipeline.warm_up()
        _request(client)
        # In turn, so that whatever else the machine does falls on both alike.
        direct, served, phases = [], [], []
        for _ in range(options.repeats):
            direct.append(_direct(pipeline))
            seconds, timings = _request(client)
            served.append(seconds)
            phases.append(timings)
    table = _table(pipeline, direct, served, phases)
    options.out.write_text(table)
    sys.stdout.write(table)
    return 0


def _direct(pipeline: VideoPipeline) -> float:
    """The same work without service and queue: decode the PNG, run the model, write the MP4 and the thumbnail."""
    started = time.perf_counter()
    with Image.open(io.BytesIO(IMAGE.read_bytes())) as image:
        result = pipeline(image.convert("RGB"), PROMPT, seed=1)
    video.encode_mp4(result.frames_THWC, pipeline.card.video.fps)
    video.encode_thumbnail(result.frames_THWC[0])
    return time.perf_counter() - started


def _request(client: httpx.Client) -> tuple[float, dict[str, float]]:
    """Seconds from sending the request to holding the finished record, and the worker's own timings."""
    body = {
        "image": f"data:image/png;base64,{base64.b64encode(IMAGE.read_bytes()).decode()}",
        "prompt": PROMPT,
        "seed": 1,
    }
    started = time.perf_counter()
    answer = client.post("/generate", json=body, headers={"Prefer": "wait=60"}).raise_for_status().json()
    seconds = time.perf_counter() - started
    if answer["status"] != "succeeded":
        raise SystemExit(f"error: {answer['id']} is {answer['status']}: {answer['error']}")
    timings: dict[str, float] = client.get(answer["manifest_url"]).json()["timings_s"]
    return seconds, timings


def _table(pipeline: VideoPipeline, direct: list[float], served: list[float], phases: list[dict[str, float]]) -> str:
    def ms(values: list[float]) -> str:
        return f"{1000 * statistics.median(values):.0f}"

    added = [s - sum(p.values()) for s, p in zip(served, phases, strict=True)]
    rows = [(f"`{name}`", [p[name] for p in phases]) for name in phases[0]]
    rows += [("service and queue (request minus the phases)", added), ("**request, in all**", served)]
    rows += [("the pipeline called directly, same work", direct)]
    lines = "\n".join(f"| {name} | {ms(values)} | {1000 * max(values):.0f} |" for name, values in rows)
    card = pipeline.card
    return f"""# A warm request, by phase

`make up && make bench`: {len(direct)} requests one after another, each beside one direct call in the same run.
{card.name}, {card.call["num_inference_steps"]} steps, guidance {card.call["guidance_scale"]}, \
{card.video.num_frames} frames of {card.video.width} x {card.video.height}, {pipeline.engine}, \
{pipeline.threads} torch threads, {os.cpu_count()} cores ({platform.machine()}), torch {version("torch")}, \
diffusers {version("diffusers")}, Python {platform.python_version()}. GPU: not measured.

| part | median ms | slowest ms |
|---|---:|---:|
{lines}

Request over direct call, ratio of medians: {statistics.median(served) / statistics.median(direct):.3f}; \
median of the paired differences: {1000 * statistics.median(s - d for s, d in zip(served, direct, strict=True)):.0f} ms.
"""


if __name__ == "__main__":
    raise SystemExit(main())
