"""What the gate catches: `python -m benchmarks.gate`. Writes Markdown to the given file.

The bundled student's clips, as they are and spoiled in each way that image-to-video distillation is known to fail in,
before the limits of the recipe.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from distill import gate, recipes
from tests.stack import ROOT

MODELS = ROOT / "models"


def main() -> int:
    """Judge and write the table. Exit code 3: something got through, or the good student did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    began = time.monotonic()
    student, teacher = MODELS / "shapes-4step", MODELS / "shapes-teacher"
    config = recipes.load_gate("shapes", [])
    trial = gate.Trial(student, student, teacher, config, lambda _line: None)
    verdicts = gate.failures(trial)
    table = gate.catch_table(verdicts)
    sys.stdout.write(table)
    options.out.write_text(
        f"""# What the gate catches

`python -m benchmarks.gate`: `models/shapes-4step` against itself and its teacher, {config.clips} fixed clips for the
ground truth and {config.reference_clips} for the reference form, the limits of the recipe `shapes`. Took \
{(time.monotonic() - began) / 60:.1f} minutes.
After a refusal: the limits that are furthest exceeded, with what was found.

{table}"""
    )
    return 0 if gate.all_caught(verdicts) else 3


if __name__ == "__main__":
    raise SystemExit(main())
