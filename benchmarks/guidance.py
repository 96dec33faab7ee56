"""Which teacher teaches best: short runs of stage III that differ in the real score alone.

    python -m benchmarks.guidance RUN

takes over the first two stages of a finished `distill run shapes RUN`, trains one student for each variant (direction
and strength of the intra term, source of the real score) and measures it on the dev split. Each variant's run and
evaluation is kept under `--out`, and the same command goes on. Writes Markdown beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

OUT = Path(__file__).with_suffix(".md")
SHOWN = (
    "score",
    "prompt_following",
    "motion_amount",
    "imaging_quality",
    "explained_psnr_db",
    "dynamic_degree",
    "flicker",
)
VARIANTS: dict[str, dict[str, Any]] = {
    f"{mode}, beta_2 = {beta_2:g}": {"intra_mode": mode, "beta_2": [beta_2, beta_2]}
    for mode in ("extrapolate", "interpolate")
    for beta_2 in (0.0, 0.25, 0.75)
} | {
    f"source: {source}, no intra term": {"source": source, "beta_2": [0.0, 0.0]}
    for source in ("teacher", "pruned", "interpolated")
}
"""What each variant sets of `matching.scores`. `full` without an intra term is the first of all."""


def main() -> int:
    """Exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("var/evaluations/guidance"))
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--clips", type=int, default=96)
    options = parser.parse_args()
    config = json.loads((options.run / "config.json").read_text())
    for number, changes in enumerate(VARIANTS.values()):
        folder = options.out / str(number)
        scores = {**config["matching"]["scores"], **changes}
        settings = {f"matching.scores.{name}": value for name, value in scores.items()} | {
            "matching.fit.steps": options.updates,
            "matching.fit.sample_every": options.updates,
        }
        assignments = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
        distil = ["run", "shapes", str(folder), "--from", str(options.run), *assignments]
        evaluate = ["evaluate", str(folder / "student"), "--out", str(folder / "evaluation"), "--split", "dev",
                    "--clips", str(options.clips), "--seeds", "1", "--pairs", "0"]  # fmt: skip
        for arguments in (distil, evaluate):
            if arguments is evaluate and (folder / "evaluation" / "report.json").exists():
                continue
            if code := subprocess.run([sys.executable, "-m", "distill", *arguments], check=False).returncode:  # noqa: S603
                return code
    OUT.write_text(_report(options.out, options.updates, options.clips, config["matching"]["scores"]))
    sys.stdout.write(OUT.read_text())
    return 0


def _report(out: Path, updates: int, clips: int, scores: dict[str, Any]) -> str:
    lines = [
        "# The real score of stage III",
        "",
        f"`python -m benchmarks.guidance RUN --updates {updates} --clips {clips}`: from the same first two stages, "
        f"{updates} updates of the student each, beta_1 drawn from {scores['beta_1']}, one training seed; "
        f"{clips} clips of the dev split, one seed of noise; 95 % intervals over clips.",
        "",
        "| | " + " | ".join(SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for number, name in enumerate(VARIANTS):
        found = json.loads((out / str(number) / "evaluation" / "report.json").read_text())
        summary = found["settings"][0]["summary"]["all"]
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*summary[metric]) for metric in SHOWN]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
