"""Which teacher is being taught by: clips sampled from stage III's real score itself, without any student.

    python -m benchmarks.guidance RUN

takes the first two stages of a `distill run shapes RUN` and samples the guided velocity R = A + beta_1 (A - N) + beta_2
(A - P) on held-out clips, with the same noise for every variant: direction and strength of the intra term, and whose A
and N they are. What R's clips look like is what a student is pulled towards. Writes Markdown beside this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from distill import evaluate, metrics, sampler
from distill.backbones import wan
from distill.config import DEV_CLIPS, DistillConfig
from distill.data import shapes
from distill.loop import Run
from distill.stages import importance, matching, pruning
from distill.stages.given import Given

OUT = Path(__file__).with_suffix(".md")
SHOWN = (
    "score", "prompt_following", "motion_amount", "subject_consistency", "imaging_quality", "validity",
    "explained_psnr_db", "dynamic_degree", "flicker",
)  # fmt: skip
CHUNK = 32
Variant = dict[str, Any]
VARIANTS: list[Variant] = [
    *({"source": "full", "intra_mode": mode, "beta_1": 1.0, "beta_2": beta_2}
      for mode in ("extrapolate", "interpolate") for beta_2 in (0.0, 0.25, 0.75)),
    *({"source": source, "intra_mode": "extrapolate", "beta_1": 1.0, "beta_2": 0.0}
      for source in ("teacher", "pruned", "interpolated")),
    *({"source": "teacher", "intra_mode": "extrapolate", "beta_1": beta_1, "beta_2": beta_2}
      for beta_1, beta_2 in ((1.0, 0.25), (1.0, 0.75), (1.0, 1.5), (0.5, 0.75))),
]  # fmt: skip


def main() -> int:
    """Sample and measure every variant and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=96, choices=range(2, DEV_CLIPS + 1), metavar="N")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    config = DistillConfig.model_validate_json((options.run / "config.json").read_text())
    run = Run(options.run, config.seed)
    with run.handling_signals():
        given = Given(run, config)
        found = importance.run(run, given, config.importance, config.pruning.unimportant)
        base = pruning.run(run, given, found, config.pruning)  # read, where it is finished
        critic = matching.Critic(given.backbone, base, config.matching.critic, found.pruned)
        rows = [_row(given, critic, found.pruned, variant, options.clips, options.steps) for variant in VARIANTS]
    options.out.write_text(_report(rows, config, options.clips, options.steps))
    sys.stdout.write(options.out.read_text())
    return 0


@torch.no_grad()
def _row(given: Given, critic: matching.Critic, pruned: list[int], variant: Variant, clips: int, steps: int) -> Any:
    """The variant and its metrics, each ``[clips]``."""
    config = given.config.matching.scores.model_copy(
        update={"source": variant["source"], "intra_mode": variant["intra_mode"], "cfg_unit": "extra"}
    )
    scores = matching.Scores(given, critic.transformer, critic, pruned, config)
    scheduler = given.pipe.scheduler
    scheduler.set_timesteps(steps)
    made: list[Tensor] = []
    for first in range(0, clips, CHUNK):
        rows = torch.arange(first, min(first + CHUNK, clips))
        batch = given.batch(given.dev, rows)
        x_BCTHW = sampler.draw_noise(given.backbone, given.pipe, rows.tolist(), given.card.call).to(given.device)
        beta_1_B, beta_2_B = (torch.full((len(rows),), variant[name]) for name in ("beta_1", "beta_2"))
        for sigma, after in pairwise(scheduler.sigmas.tolist()):
            sigma_B = torch.full((len(rows),), sigma, device=given.device)
            x_BCTHW = x_BCTHW + (after - sigma) * scores.real(x_BCTHW, sigma_B, batch, beta_1_B, beta_2_B)
        x0_BCTHW = given.backbone.with_given(x_BCTHW, batch.image)
        made.append(wan.decode_latents(given.pipe.vae, x0_BCTHW).cpu())
    truth = shapes.clips(given.config.seed, shapes.SPLITS["dev"][:clips])
    values = metrics.measure(torch.cat(made), truth, evaluate.reconstruction(given.pipe)).values
    sys.stderr.write(f"{variant}: score {values['score'].mean():.3f}\n")
    return variant, values


def _report(rows: list[Any], config: DistillConfig, clips: int, steps: int) -> str:
    lines = [
        "# The real score of stage III",
        "",
        f"`python -m benchmarks.guidance RUN --clips {clips} --steps {steps}`: clips of the guided velocity itself, "
        f"{clips} clips of the dev split, the same noise for every row, {steps} Euler steps, {config.precision}; 95 % "
        "intervals over clips; in brackets the paired difference to the first row of the same source, where its "
        f"interval excludes 0. RUN: stage II {config.pruning.sha256[:12]}, {config.pruning.fit.steps} updates, seed "
        f"{config.seed}. torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}).",
        "",
        "| A, N | beta_2 counts from | beta_1 | beta_2 | " + " | ".join(SHOWN) + " |",
        "|---|---|---:|---:|" + "---|" * len(SHOWN),
    ]
    firsts: dict[str, dict[str, Tensor]] = {}
    for variant, values in rows:
        first = firsts.setdefault(variant["source"], values)
        origin = "A (extrapolate)" if variant["intra_mode"] == "extrapolate" else "P (interpolate)"
        cells = []
        for name in SHOWN:
            mean, low, high = evaluate.interval(values[name][None].numpy())
            change, least, most = evaluate.interval((values[name] - first[name])[None].numpy())
            apart = f" [{change:+.3f}]" if least > 0 or most < 0 else ""
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f}){apart}")
        said = f"{variant['source']} | {origin} | {variant['beta_1']:g} | {variant['beta_2']:g}"
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
