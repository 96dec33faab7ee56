"""One function per run, each returning a whole configuration. pydantic only, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from distill.config import (
    MAX_CLIPS,
    CallConfig,
    CompareConfig,
    ConfigError,
    CriticConfig,
    DistillConfig,
    EvaluateConfig,
    FeaturesConfig,
    FitConfig,
    GanConfig,
    GateConfig,
    ImportanceConfig,
    LimitsConfig,
    MatchingConfig,
    PruningConfig,
    ScoresConfig,
    StudentConfig,
    TeachConfig,
    TransformerConfig,
    TuneConfig,
    VaeConfig,
    VaePhase,
    override,
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


def distill_shapes() -> DistillConfig:
    """A 4-step student with 7 of 10 blocks from the bundled teacher: under two hours on one core.

    Learning rates and the rank of the critic are for 6.6 M parameters; 1e-5, 5e-7 (the paper's) and 128 are for 14 B.
    """
    return DistillConfig(
        name="shapes-4step",
        preset="full",
        seed=0,
        teacher="models/shapes-teacher",
        num_clips=12000,
        text_drop=0.1,
        shift=5.0,
        compile=True,
        precision="bfloat16",
        watched=24,
        student=StudentConfig(num_inference_steps=4, shift=2.5, shift_terminal=0.625),
        importance=ImportanceConfig(
            clips=96, sigmas=8, noises=1, sigma_min=0.02, sigma_max=0.98, weighting="elbo", greedy=False, rho=0.3
        ),
        pruning=PruningConfig(
            unimportant=2.0, skip_probability=0.5, deployed_probability=0.9, alpha=1.0, target="frozen_teacher",
            drift_limit=0.2,
            fit=FitConfig(
                steps=2400, batch=32, optimiser="muon", learning_rate=8e-4, warmup_steps=50, betas=(0.9, 0.95),
                weight_decay=0.0, clip_norm=1.0, ema_decay=0.99, log_every=25, checkpoint_every=100, sample_every=400,
            ),
        ),
        matching=MatchingConfig(
            scores=ScoresConfig(
                source="teacher", intra_mode="extrapolate", cfg_unit="extra", beta_1=(0.5, 1.5), beta_2=(0.25, 1.25),
                alpha_weak=0.0,
            ),
            critic=CriticConfig(
                kind="lora", rank=32, pruned=False, updates=3, optimiser="adamw", learning_rate=1e-3, warmup_steps=10,
                betas=(0.0, 0.99), weight_decay=0.0, clip_norm=1.0, ema_decay=0.0,
            ),
            gan=GanConfig(student_weight=0.0, critic_weight=0.0),
            limits=LimitsConfig(
                motion=(0.7, 1.4), contrast=(0.7, 1.3), saturation=(0.8, 1.25), flicker=(0.5, 1.6), critic=1.0,
                patience=2,
            ),
            rollout="euler",
            score_shift=5.0,
            score_min=0.02,
            score_max=0.98,
            fit=FitConfig(
                steps=450, batch=16, optimiser="adamw", learning_rate=1e-4, warmup_steps=20, betas=(0.0, 0.99),
                weight_decay=0.0, clip_norm=1.0, ema_decay=0.98, log_every=5, checkpoint_every=20, sample_every=50,
            ),
        ),
    )  # fmt: skip


def few_steps(steps: int, shift: float) -> StudentConfig:
    """The schedule of so many steps that visits shift_k(1 - j/n), as the scheduler has to be told it.

    Its levels run from 1 to ``shift_terminal`` along a curve of its own shift; both curves are Moebius transformations
    of j, so they are one where their poles are.
    """
    last = shift / steps / (1 + (shift - 1) / steps)
    if steps == 1:  # the only level is 1, whatever is said here
        return StudentConfig(num_inference_steps=1, shift=shift, shift_terminal=0.5)
    pole = steps * shift / ((shift - 1) * (steps - 1))
    return StudentConfig(num_inference_steps=steps, shift=pole / (pole - 1), shift_terminal=last)


def _real(name: str, shift: float, beta_1: tuple[float, float], **more: Any) -> DistillConfig:
    """A recipe of the paper's for a model of its size; where each value is from: docs/method.md, "Recipes"."""
    return DistillConfig(
        name=f"{name}-4step",
        preset="full",
        seed=0,
        teacher=f"models/{name}",
        data=f"data/{name}",
        num_clips=MAX_CLIPS,
        text_drop=0.1,
        shift=shift,
        compile=True,
        checkpoint_activations=True,
        precision="bfloat16",
        watched=8,
        looked_at=1,
        student=more.pop("student", few_steps(4, shift)),
        importance=ImportanceConfig(
            clips=8, sigmas=8, noises=1, sigma_min=0.02, sigma_max=0.98, weighting="elbo", greedy=False, rho=0.3
        ),
        pruning=PruningConfig(
            unimportant=2.0, skip_probability=0.5, deployed_probability=0.25, alpha=1.0, target="self",
            drift_limit=0.2,
            fit=FitConfig(
                steps=4000, batch=8, accumulate=2, optimiser="adamw", learning_rate=1e-5, warmup_steps=100,
                betas=(0.9, 0.999), weight_decay=0.01, clip_norm=1.0, ema_decay=0.99, log_every=10,
                checkpoint_every=100, sample_every=500,
            ),
        ),
        matching=MatchingConfig(
            scores=ScoresConfig(
                source="full", intra_mode="extrapolate", cfg_unit="extra", beta_1=beta_1, beta_2=(0.0, 0.5),
                alpha_weak=0.0,
            ),
            critic=CriticConfig(
                kind="lora", rank=128, pruned=False, updates=5, optimiser="adamw", learning_rate=1e-5,
                warmup_steps=10, betas=(0.0, 0.999), weight_decay=0.01, clip_norm=1.0, ema_decay=0.0,
            ),
            gan=GanConfig(student_weight=0.0, critic_weight=0.0),
            limits=LimitsConfig(
                motion=(0.5, 2.0), contrast=(0.7, 1.4), saturation=(0.7, 1.4), flicker=(0.3, 3.0), critic=2.0,
                patience=2,
            ),
            rollout="renoise",
            score_shift=shift,
            score_min=0.02,
            score_max=0.98,
            fit=FitConfig(
                steps=1000, batch=8, accumulate=2, optimiser="adamw", learning_rate=5e-7, warmup_steps=10,
                betas=(0.0, 0.999), weight_decay=0.01, clip_norm=1.0, ema_decay=0.99, log_every=5,
                checkpoint_every=50, sample_every=100,
            ),
        ),
        gate=GateConfig(clips_from=f"data/{name}-gate"),
        **more,
    )  # fmt: skip


def compare_shapes() -> CompareConfig:
    """The comparison as far as two cores go."""
    return CompareConfig(
        tier="cpu", budget=300, pruning_share=0.5, short_share=0.2, seeds=1, clips=256, noise_seeds=3, short_clips=64,
        diversity_pairs=16, diversity_samples=8, groups=("methods", "grid", "ablations"), rows=(),
        choices={}, precision="bfloat16",
    )  # fmt: skip


COMPARE_PRESETS = {
    "cpu": [],
    "gpu": ["tier=gpu", "budget=3000", "seeds=3", "diversity_pairs=32", "diversity_samples=16", "short_clips=256"],
    # Every method and one row of each other group, a few updates of each: whether all of it runs.
    "quick": [
        "tier=quick", "budget=2.5", "short_share=1", "clips=6", "noise_seeds=1", "short_clips=6", "diversity_pairs=2",
        "diversity_samples=2", "precision=float32",
    ],
}  # fmt: skip
"""Tiers: what each changes."""
QUICK_RECIPE = [
    "num_clips=64", "compile=false", "importance.clips=4", "importance.sigmas=2", "pruning.fit.batch=4", "watched=2",
    "matching.fit.batch=4", "matching.critic.updates=2",
]  # fmt: skip
"""What the quick tier changes of the recipe."""


def tune_shapes() -> TuneConfig:
    """The search for (alpha, beta_1, beta_2) as far as two cores go."""
    return TuneConfig(
        trials=12, budget=120, rungs=3, reduction=2, pruning_share=0.5, clips=64, diversity_pairs=8,
        diversity_samples=8, dynamic_degree=(0.9, 1.1), flicker=(0.7, 1.3), diversity=0.85, seed=0,
        precision="bfloat16",
    )  # fmt: skip


# Runs that are too short for a good student are not to be stopped for it.
_ANYTHING_GOES = [f"matching.limits.{name}=[0, 1e9]" for name in ("motion", "contrast", "saturation", "flicker")] + [
    "matching.limits.critic=1e9",
    "pruning.drift_limit=1e9",
]

PRESETS = {
    "full": [],
    # Five minutes on two cores: the whole way, too short for a good student.
    "quick": [
        "num_clips=1024", "importance.clips=32", "importance.sigmas=4", "pruning.fit.steps=40",
        "pruning.fit.warmup_steps=5", "pruning.fit.sample_every=40", "pruning.fit.checkpoint_every=20",
        "matching.fit.steps=15", "matching.fit.warmup_steps=2", "matching.fit.batch=8", "matching.critic.updates=2",
        "matching.fit.sample_every=15", "matching.fit.checkpoint_every=5", "watched=8", *_ANYTHING_GOES,
    ],
    # Half a minute: every step of the way, a few updates of each.
    "smoke": [
        "num_clips=32", "compile=false", "importance.clips=4", "importance.sigmas=2", "pruning.fit.steps=4",
        "pruning.fit.batch=4", "pruning.fit.log_every=1", "pruning.fit.checkpoint_every=2",
        "pruning.fit.sample_every=4", "matching.fit.steps=3", "matching.fit.batch=2", "matching.fit.log_every=1",
        "matching.fit.checkpoint_every=1", "matching.fit.sample_every=3", "matching.critic.updates=2", "watched=2",
        "gate.clips=3", "gate.reference_clips=3", "gate.far=4", *_ANYTHING_GOES,
    ],
}  # fmt: skip
"""How much of a recipe to run: what each changes of it."""

_HUNYUAN_STEPS = StudentConfig(num_inference_steps=4, shift=7.0, shift_terminal=None)
"""Its pipelines hand the scheduler 1 - j/n, which the shift alone moves."""

RECIPES: dict[str, Callable[[], DistillConfig]] = {
    "shapes": distill_shapes,
    "wan2.1-i2v-14b": partial(_real, "wan2.1-i2v-14b", 5.0, (2.5, 4.5)),
    "wan2.1-t2v-1.3b": partial(_real, "wan2.1-t2v-1.3b", 5.0, (2.5, 4.5)),
    "wan2.2-ti2v-5b": partial(_real, "wan2.2-ti2v-5b", 5.0, (2.5, 4.5)),
    "wan2.2-i2v-a14b": partial(_real, "wan2.2-i2v-a14b", 5.0, (2.5, 4.5)),
    "hunyuanvideo-i2v": partial(_real, "hunyuanvideo-i2v", 7.0, (1.0, 3.0), student=_HUNYUAN_STEPS),
    "hunyuanvideo-t2v": partial(_real, "hunyuanvideo-t2v", 7.0, (1.0, 3.0), student=_HUNYUAN_STEPS),
}
"""By name. `shapes` has its teacher and its data at hand; of the others the user downloads and prepares both."""
STAGES = ("latents", "importance", "pruning", "matching", "student")
"""What `events.jsonl` calls the steps of a distillation, in order."""


def load(name: str, assignments: list[str]) -> DistillConfig:
    """The configuration of ``distill run NAME``, with its preset (`preset=quick`) and then each ``a.b=c`` applied.

    Raises:
        ConfigError: no such recipe, preset or setting.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(RECIPES)}")
    presets = [text.partition("=")[2] for text in assignments if text.startswith("preset=")] or ["full"]
    if presets[-1] not in PRESETS:
        raise ConfigError(f"no preset {presets[-1]!r}; there are: {', '.join(PRESETS)}")
    return override(RECIPES[name](), [*PRESETS[presets[-1]], f"preset={presets[-1]}", *assignments])


def load_gate(name: str, assignments: list[str]) -> GateConfig:
    """The section `gate` of a recipe, changed as ``load`` changes it.

    Raises:
        ConfigError: no such recipe, preset or setting, or a setting of another section.
    """
    if others := [text for text in assignments if not text.startswith(("gate.", "preset="))]:
        raise ConfigError(f"--set {others[0]}: the gate has settings gate.* and preset= only")
    return load(name, assignments).gate


class TunableField(BaseModel):
    """A field of a recipe that whoever asks for a run may change, as a form needs it."""

    model_config = ConfigDict(frozen=True)

    path: str
    """`pruning.fit.steps`."""
    type: Literal["integer", "number", "boolean", "string", "pair"]
    """pair: two numbers, the smaller first."""
    default: Any
    minimum: int | float | None = None
    above: float | None = None
    """It has to be larger than this."""
    maximum: int | float | None = None
    below: float | None = None
    choices: list[str] | None = None
    description: str


def tunable(name: str, preset: str) -> list[TunableField]:
    """The fields that ``check`` takes, with their values in this preset; read off the configuration's own schema.

    Raises:
        ConfigError: no such recipe or preset.
    """
    values = load(name, [f"preset={preset}"]).model_dump(mode="json")
    return [_field(path, schema, _at(values, path)) for path, schema in _leaves() if schema.get("tunable")]


def check(name: str, preset: str, overrides: Mapping[str, Any]) -> DistillConfig:
    """The configuration with each field ``a.b`` of ``overrides`` changed, as somebody asks for it who is not trusted.

    Other than settings of the command line, values are of the field's type (a text is not read for a number in it), and
    only what is tunable can be changed.

    Raises:
        ConfigError: no such recipe, preset or field, or a value that does not fit; ``field`` says which one.
    """
    values = load(name, [f"preset={preset}"]).model_dump(mode="json")
    known = {path: schema.get("tunable", False) for path, schema in _leaves()}
    for path, value in overrides.items():
        if path not in known:
            near = get_close_matches(path, [other for other in known if known[other]], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the recipe {name} has no such field{hint}", path)
        if not known[path]:
            raise ConfigError("this field is not one that a request may change", path)
        *parents, last = path.split(".")
        _at(values, ".".join(parents))[last] = value
    try:
        # As JSON, in which pairs are lists; strict, or a "1" would be a number.
        return DistillConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        # Of a pair the place is one of its numbers; of two fields that do not fit each other, what both are part of.
        field = next((path for path in overrides if where == path or where.startswith(f"{path}.")), None)
        if field is None:
            field = next((path for path in overrides if path.startswith(where)), None)
            raise ConfigError(first["msg"].removeprefix("Value error, "), field) from None
        got = json.dumps(overrides[field])
        raise ConfigError(f"got {got if len(got) <= 64 else got[:64] + '...'}; {first['msg']}", field) from None


def _field(path: str, schema: Mapping[str, Any], default: Any) -> TunableField:
    bounds = {name: schema.get(name) for name in ("minimum", "maximum")}
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer":
        bounds = {
            "minimum": bounds["minimum"] if above is None else above + 1,
            "maximum": bounds["maximum"] if below is None else below - 1,
        }
        above = below = None
    return TunableField(
        path=path,
        type="pair" if schema["type"] == "array" else schema["type"],
        default=default,
        above=above,
        below=below,
        choices=schema.get("enum"),
        description=schema["description"],
        **bounds,
    )


def _leaves(definition: str | None = None, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and JSON schema of every value in a distillation's configuration, in order."""
    part = _SCHEMA["$defs"][definition] if definition else _SCHEMA
    for name, schema in part["properties"].items():
        if "$ref" in schema:
            yield from _leaves(schema["$ref"].rpartition("/")[2], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", schema


_SCHEMA = DistillConfig.model_json_schema()


def _at(values: dict[str, Any], path: str) -> Any:
    node: Any = values
    for name in filter(None, path.split(".")):
        node = node[name]
    return node


def teacher_of(config: DistillConfig) -> str:
    """What the teacher is called that a configuration names by its folder."""
    return config.teacher.rstrip("/").rpartition("/")[2]


def dataset_of(config: DistillConfig) -> str:
    """What the clips are called that a configuration learns from."""
    return config.data.rstrip("/").rpartition("/")[2]


TEACHERS = {"shapes": teach_shapes}


def load_teacher(name: str) -> TeachConfig:
    """The configuration of ``distill teach NAME``. Raises ``ConfigError`` for a name that there is not."""
    if name not in TEACHERS:
        raise ConfigError(f"no teacher recipe {name!r}; there are: {', '.join(TEACHERS)}")
    return TEACHERS[name]()
