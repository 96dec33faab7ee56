"""What a run is made of: frozen models, one per stage, no defaults that mean "not set". pydantic only, no torch.

A recipe (`distill.recipes`) returns one of these; `--set a.b=c` changes a field of it; the resolved one is written into
the run's folder.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message says which and what was wanted."""


class Config(BaseModel):
    """Base of all configurations: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def sha256(self) -> str:
        """Hash of every value: two runs with the same one do the same work."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class FitConfig(Config):
    """One optimisation (`distill.loop.fit`)."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0, description="clips an update")
    optimiser: Literal["adamw", "muon"] = Field(description="muon: for the matrices within blocks, AdamW for the rest")
    learning_rate: float = Field(gt=0, description="peak; linear warm-up, then a cosine down to 5 % of it")
    warmup_steps: int = Field(ge=0)
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(ge=0, lt=1, description="of the weights that are saved; 0 saves the trained ones")
    log_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    sample_every: int = Field(gt=0)


class VaePhase(FitConfig):
    """One phase of the autoencoder's training, with its loss."""

    l1_weight: float = Field(ge=0, description="of the absolute error: counts small errors, which are the background's")
    mse_weight: float = Field(ge=0, description="of the squared error: counts large errors, which are the shapes'")


class VaeConfig(Config):
    """The video autoencoder, `AutoencoderKLWan` in the style of Wan2.2: 8x in space, 4x in time."""

    base_dim: int
    dim_mult: tuple[int, int, int]
    """Channels at a half, a quarter and an eighth of the frame's size, in multiples of ``base_dim``."""
    z_dim: int
    kl_weight: float = Field(ge=0, description="weight of the mean divergence per latent number")
    compile: bool = Field(description="train through torch.compile")
    frames: VaePhase
    """First on single frames: spatial detail costs a twentieth there."""
    clips: VaePhase
    """Then on whole clips: what was never trained at a frame's position drifts there."""
    polish: VaePhase
    """Whole clips again, with the large errors weighing more: those of what moves."""


class TransformerConfig(Config):
    """The denoiser, `WanTransformer3DModel`, with its text encoder, trained together on cached latents."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    text_dim: int
    text_layers: int
    max_sequence_length: int
    text_drop: float = Field(ge=0, le=1, description="share of captions replaced by the empty one, for guidance")
    shift: float = Field(gt=0, description="of the noise levels, in training and in the saved scheduler")
    num_clips: int = Field(gt=0, description="training clips whose latents are cached")
    compile: bool = Field(description="train through torch.compile")
    fit: FitConfig


class CallConfig(Config):
    """Keyword arguments of the stock pipeline that this folder is meant to be called with."""

    num_inference_steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=1)


class TeachConfig(Config):
    """A teacher from nothing (`distill.teach`)."""

    name: str
    seed: int
    vae: VaeConfig
    transformer: TransformerConfig
    call: CallConfig


class FeaturesConfig(Config):
    """The classifier whose features `fvd_shapes` compares (`distill.features`)."""

    seed: int
    fit: FitConfig


class EvaluateConfig(Config):
    """What `distill evaluate` samples and measures."""

    split: Literal["test", "dev"]
    clips: int = Field(ge=2, description="half of them with closed captions")
    seeds: int = Field(ge=1, description="of the noise")
    num_inference_steps: tuple[int, ...] = Field(description="every one of them; none: the card's own")
    guidance_scale: tuple[float, ...] = Field(description="every one of them; none: the card's own")
    diversity_pairs: int = Field(ge=0, description="open (image, caption) pairs; 0 leaves diversity out")
    diversity_samples: int = Field(ge=2, description="samples of each pair")
    precision: Literal["float32", "bfloat16"]


ConfigT = TypeVar("ConfigT", bound=Config)


def override(config: ConfigT, assignments: list[str]) -> ConfigT:
    """Apply ``a.b=c`` settings, checked and converted by the field's own type.

    Raises:
        ConfigError: no such field, or a value that does not fit.
    """
    values: dict[str, Any] = config.model_dump()
    for assignment in assignments:
        path, found, text = assignment.partition("=")
        if not found:
            raise ConfigError(f"--set wants name=value, for example vae.clips.steps=100; got {assignment!r}")
        *parents, last = path.split(".")
        node = values
        for name in parents:
            node = node.get(name) if isinstance(node.get(name), dict) else {}  # type: ignore[assignment]
        if last not in node:
            raise ConfigError(f"--set {path}: no such setting; here there are: {', '.join(node) or _paths(values)}")
        try:
            node[last] = json.loads(text)
        except json.JSONDecodeError:
            node[last] = text
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--set {where}: got {first['input']!r}; {first['msg']}") from None


def _paths(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}.*" if isinstance(v, dict) else k for k, v in values.items())
