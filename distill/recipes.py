"""One function per run, each returning a whole configuration. pydantic only, no torch."""

from __future__ import annotations

from distill.config import (
    CallConfig,
    ConfigError,
    EvaluateConfig,
    FeaturesConfig,
    FitConfig,
    TeachConfig,
    TransformerConfig,
    VaeConfig,
    VaePhase,
)


def teach_shapes() -> TeachConfig:
    """A teacher of the procedural world `shapes`: about seven hours on two cores."""
    frames = VaePhase(
        steps=6000,
        batch=16,
        optimiser="adamw",
        learning_rate=5e-4,
        warmup_steps=50,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.0,
        log_every=50,
        checkpoint_every=500,
        sample_every=1000,
        l1_weight=1.0,
        mse_weight=1.0,
    )
    clips = frames.model_copy(
        update=dict(
            steps=2600, batch=4, learning_rate=2e-4, ema_decay=0.995, log_every=20, checkpoint_every=100,
            sample_every=400,
        )
    )  # fmt: skip
    return TeachConfig(
        name="shapes-teacher",
        seed=0,
        vae=VaeConfig(
            base_dim=16,
            dim_mult=(2, 4, 5),
            z_dim=24,
            kl_weight=3e-5,
            compile=True,
            frames=frames,
            clips=clips,
            polish=clips.model_copy(update=dict(steps=3600, l1_weight=0.1, mse_weight=2.0)),
        ),
        transformer=TransformerConfig(
            num_layers=10,
            num_attention_heads=4,
            attention_head_dim=56,
            ffn_dim=448,
            text_dim=128,
            text_layers=2,
            max_sequence_length=32,
            text_drop=0.1,
            shift=5.0,
            num_clips=60000,  # of 12,000 it learns by heart what their captions leave open
            compile=True,
            fit=FitConfig(
                steps=20000, batch=32, optimiser="muon", learning_rate=8e-4, warmup_steps=100, betas=(0.9, 0.95),
                weight_decay=0.01, clip_norm=1.0, ema_decay=0.998, log_every=25, checkpoint_every=200,
                sample_every=2000,
            ),
        ),
        call=CallConfig(num_inference_steps=50, guidance_scale=2.0),
    )  # fmt: skip


def features_shapes() -> FeaturesConfig:
    """The classifier of `fvd_shapes`: six minutes on two cores."""
    return FeaturesConfig(
        seed=0,
        fit=FitConfig(
            steps=4000, batch=16, optimiser="adamw", learning_rate=2e-3, warmup_steps=50, betas=(0.9, 0.99),
            weight_decay=0.01, clip_norm=1.0, ema_decay=0.99, log_every=50, checkpoint_every=500, sample_every=500,
        ),
    )  # fmt: skip


def evaluate_shapes() -> EvaluateConfig:
    """The evaluation that reports quote: test split, 256 clips, 3 seeds, diversity on 32 pairs of 16 samples."""
    return EvaluateConfig(
        split="test",
        clips=256,
        seeds=3,
        num_inference_steps=(),
        guidance_scale=(),
        diversity_pairs=32,
        diversity_samples=16,
        precision="bfloat16",
    )


TEACHERS = {"shapes": teach_shapes}


def load_teacher(name: str) -> TeachConfig:
    """The configuration of ``distill teach NAME``. Raises ``ConfigError`` for a name that there is not."""
    if name not in TEACHERS:
        raise ConfigError(f"no teacher recipe {name!r}; there are: {', '.join(TEACHERS)}")
    return TEACHERS[name]()
