"""How many clips of the world `shapes` are drawn a second: `python -m benchmarks.renderer`."""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from distill.data import shapes


def main() -> None:
    """Median of seven runs of 128 clips, drawn from indices to pixels."""
    rates = []
    for run in range(8):
        started = time.perf_counter()
        shapes.clips(0, range(20_000 + 128 * run, 20_000 + 128 * (run + 1)))
        rates.append(128 / (time.perf_counter() - started))
    sys.stdout.write(f"{statistics.median(rates[1:]):.0f} clips/s on {os.cpu_count()} cores (the first run left out)\n")


if __name__ == "__main__":
    main()
