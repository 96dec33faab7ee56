"""The playground's example pictures: first frames of the world `shapes`, each with a sentence that fits it."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from distill.data import shapes

EXAMPLES = {
    "red-circle": "a red circle moves right quickly, static camera",
    "blue-star": "a blue star spins clockwise quickly, static camera",
    "yellow-triangle": "a yellow triangle grows quickly, static camera",
    "green-square": "a green square bounces quickly, static camera",
    "purple-ring": "a purple ring moves up slowly, camera pans left",
    "orange-circle": "a orange circle shrinks quickly, static camera",
    "white-star": "a white star moves left quickly, camera pans right",
    "cyan-square": "a cyan square moves down slowly, static camera",
    "red-triangle": "a red triangle spins counterclockwise slowly, camera zooms in",
    "green-ring": "a green ring wanders quickly",
    "blue-circle": "a blue circle drifts slowly, and a star enters",
    "yellow-square": "a yellow square moves right slowly, camera zooms out",
}
_FIRST_INDEX = 9_000
"""In the test split: no example was ever trained on."""


def write(folder: Path) -> None:
    """Draw every example as NAME.png, and list them in index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, (name, text) in enumerate(EXAMPLES.items()):
        caption = shapes.Caption.parse(text)
        _, scene = shapes.sample(0, [_FIRST_INDEX + number], caption)
        first_HWC = ((shapes.render(scene)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
        Image.fromarray(first_HWC.numpy()).save(folder / f"{name}.png")
        index.append({"name": name, "prompt": str(caption)})
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")
