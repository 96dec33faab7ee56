"""How fast the world `shapes` is drawn, and how well it is found again in drawn clips: `python -m benchmarks.world`.

Fits the world to clips of the test split and compares what was found with what they were drawn with. Writes Markdown
beside this file. Times are medians of several runs in one process; who measures them should leave the machine alone.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from distill import fitting, metrics
from distill.data import shapes

OUT = Path(__file__).with_suffix(".md")


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512)
    options = parser.parse_args()
    drawn_hz = _clips_per_second()
    drawn = shapes.clips(0, shapes.SPLITS["test"][: options.clips])
    found, seconds = [], []
    for i in range(0, options.clips, 64):
        started = time.perf_counter()
        found.append(fitting.fit(drawn.video_BCTHW[i : i + 64], drawn.scene[i : i + 64]))
        seconds.append((time.perf_counter() - started) / len(found[-1].law))
    OUT.write_text(_report(drawn, found, drawn_hz, statistics.median(seconds)))
    sys.stdout.write(OUT.read_text())
    return 0


def _clips_per_second() -> float:
    rates = []
    for run in range(8):
        started = time.perf_counter()
        shapes.clips(0, range(20_000 + 128 * run, 20_000 + 128 * (run + 1)))
        rates.append(128 / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def _report(drawn: shapes.Clips, found: list[fitting.Fit], drawn_hz: float, fit_s: float) -> str:
    law = [metrics.LAW_OF[caption.motion] for caption in drawn.captions]
    found_law = [name for part in found for name in part.law]
    found_camera = [name for part in found for name in part.camera]
    direction_B = torch.cat([part.direction_B for part in found])
    pace_B = torch.cat([part.pace_B for part in found])
    psnr_B = torch.cat([part.explained_psnr_db_B for part in found])
    seen_B = torch.cat([(part.visible_BT > 0.3).sum(1) for part in found])

    true_pace_B = fitting.paces(drawn.scene, law)
    true_direction_B = torch.atan2(drawn.scene.travel_B2[:, 1], drawn.scene.travel_B2[:, 0])
    apart_B = torch.remainder(direction_B - true_direction_B + math.pi, 2 * math.pi) - math.pi
    travels_B = torch.tensor([a == b == "travels" for a, b in zip(law, found_law, strict=True)])
    paced_B = torch.tensor([a == b for a, b in zip(law, found_law, strict=True)]) & (true_pace_B > 0)
    close_B = (apart_B.abs().rad2deg() <= 5)[travels_B]
    steady_B = ((pace_B / true_pace_B - 1).abs() <= 0.05)[paced_B]
    cameras = [a == b for a, b in zip(found_camera, fitting.cameras(drawn.scene), strict=True)]
    laws = [a == b for a, b in zip(found_law, law, strict=True)]
    wrong = [i for i, same in enumerate(laws) if not same]

    return f"""# The world: drawing and finding again

`python -m benchmarks.world`: {len(law)} clips of the test split, {os.cpu_count()} cores, torch {torch.__version__}.

| | |
|---|---:|
| clips drawn a second (median of 7 x 128) | {drawn_hz:.0f} |
| seconds to fit a clip (batches of 64, median) | {fit_s:.2f} |
| camera found | {_share(cameras)} |
| law of motion found | {_share(laws)} |
| direction within 5 degrees, of {int(travels_B.sum())} | {_share(close_B.tolist())} |
| pace within 5 %, of {int(paced_B.sum())} | {_share(steady_B.tolist())} |

| error | median | 95 % | 99 % | largest |
|---|---:|---:|---:|---:|
| direction, degrees | {_quantiles(apart_B.abs().rad2deg()[travels_B])} |
| pace, % | {_quantiles(100 * (pace_B / true_pace_B - 1).abs()[paced_B])} |

Fitted clips explain the drawn ones to {psnr_B.median():.0f} dB (median); 95 % of them to {psnr_B.quantile(0.05):.0f}.

Clips whose law was not found: {"; ".join(_miss(drawn, found_law, seen_B, i) for i in wrong) or "none"}.
"""


def _share(right: list[bool]) -> str:
    return f"{sum(right) / len(right):.1%}"


def _quantiles(values: Tensor) -> str:
    return " | ".join(f"{v:.2f}" for v in [*values.quantile(torch.tensor([0.5, 0.95, 0.99])).tolist(), values.max()])


def _miss(drawn: shapes.Clips, found_law: list[str], seen_B: Tensor, i: int) -> str:
    return f'"{drawn.captions[i]}" ({found_law[i]}; seen in {seen_B[i]} frames)'


if __name__ == "__main__":
    raise SystemExit(main())
