"""Networks of a pipeline without memory for their weights (the meta device): all that is known of them but values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import transformers
from accelerate import init_empty_weights
from torch import nn


class Part(NamedTuple):
    """A component of a pipeline, as `model_index.json` and its own configuration say."""

    library: str
    kind: str
    """The class."""
    config: Mapping[str, Any]
    """Empty for what has none."""

    @property
    def is_encoder(self) -> bool:
        """Of texts or images: what is no longer needed once their conditions were prepared."""
        return self.library == "transformers"


def parts(folder: Path) -> dict[str, Part]:
    """The components of a pipeline's folder by name."""
    found = {}
    for name, value in json.loads((folder / "model_index.json").read_text()).items():
        if isinstance(value, list) and value[1] is not None:
            path = folder / name / "config.json"
            found[name] = Part(value[0], value[1], json.loads(path.read_text()) if path.exists() else {})
    return found


def network(part: Part) -> nn.Module | None:
    """One, or None for what is no network: a tokenizer, a scheduler."""
    of: Any = getattr({"diffusers": diffusers, "transformers": transformers}[part.library], part.kind, None)
    if not (isinstance(of, type) and issubclass(of, nn.Module)):
        return None
    with init_empty_weights():
        made: nn.Module = (
            of.from_config(part.config)  # type: ignore[attr-defined]
            if part.library == "diffusers"
            else of(of.config_class.from_dict(part.config))  # type: ignore[attr-defined]
        )
    return made.eval().requires_grad_(False)


def networks(of: Mapping[str, Part], wanted: Callable[[str, Part], bool]) -> dict[str, nn.Module]:
    """Those components that are networks, frozen, of those that are ``wanted``."""
    made = {name: network(part) for name, part in of.items() if wanted(name, part)}
    return {name: net for name, net in made.items() if net is not None}
