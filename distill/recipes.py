"""One function per run, each returning a whole configuration. pydantic only, no torch."""

from __future__ import annotations

from distill.config import CallConfig, ConfigError, FitConfig, TeachConfig, TransformerConfig, VaeConfig


def teach_shapes() -> TeachConfig:
    """A teacher of the procedural world `shapes`: about an hour and a half on two cores."""
    frames = FitConfig(
        steps=3300,
        batch=8,
        learning_rate=5e-4,
        warmup_steps=50,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.0,
        log_every=50,
        checkpoint_every=250,
        sample_every=1100,
    )
    return TeachConfig(
        name="shapes-teacher",
        seed=0,
        vae=VaeConfig(
            base_dim=24,
            z_dim=16,
            kl_weight=1e-6,
            frames=frames,
            clips=frames.model_copy(
                update=dict(
                    steps=800, batch=4, learning_rate=1.5e-4, ema_decay=0.99, log_every=10, checkpoint_every=100,
                    sample_every=400,
                )
            ),
        ),
        transformer=TransformerConfig(
            num_layers=10,
            num_attention_heads=4,
            attention_head_dim=48,
            ffn_dim=768,
            text_dim=128,
            text_layers=2,
            max_sequence_length=32,
            text_drop=0.1,
            shift=5.0,
            num_clips=5000,
            fit=frames.model_copy(
                update=dict(
                    steps=1500, batch=32, learning_rate=6e-4, warmup_steps=100, weight_decay=0.01, ema_decay=0.995,
                    log_every=25, checkpoint_every=200, sample_every=400,
                )
            ),
        ),
        call=CallConfig(num_inference_steps=10, guidance_scale=2.0),
    )  # fmt: skip


TEACHERS = {"shapes": teach_shapes}


def load_teacher(name: str) -> TeachConfig:
    """The configuration of ``distill teach NAME``. Raises ``ConfigError`` for a name that there is not."""
    if name not in TEACHERS:
        raise ConfigError(f"no teacher recipe {name!r}; there are: {', '.join(TEACHERS)}")
    return TEACHERS[name]()
