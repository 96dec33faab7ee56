"""What a run is made of: frozen models, one per stage, no defaults that mean "not set". pydantic only, no torch.

A recipe (`distill.recipes`) returns one of these; `--set a.b=c` changes a field of it; the resolved one is written into
the run's folder. Whoever may only ask for a run changes what is ``Tunable``: no path, and nothing beyond its bounds.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEV_CLIPS = 96
"""Held-out clips that a distillation looks at on the way. What is chosen is chosen on them."""
MAX_STEPS, MAX_BATCH, MAX_CLIPS = 1_000_000, 4096, 1_000_000
"""More is a slip of the hand, and would take the machine for a month."""

ValueT = TypeVar("ValueT")
Tunable = Annotated[ValueT, Field(json_schema_extra={"tunable": True})]
"""A field that `recipes.check` lets be changed."""


SHAPES = "shapes"
"""Data that is drawn when it is needed."""


class ConfigError(ValueError):
    """A setting that does not exist or does not fit; the message says which and what was wanted."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        """Its path, where `recipes.check` raises this."""


class Config(BaseModel):
    """Base of all configurations: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def sha256(self) -> str:
        """Hash of every value: two runs with the same one do the same work."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class OptimiserConfig(Config):
    """How one network's weights follow its loss."""

    optimiser: Literal["adamw", "muon"] = Field(description="muon: for the matrices within blocks, AdamW for the rest")
    learning_rate: Tunable[float] = Field(gt=0, description="peak; linear warm-up, then a cosine down to 5 % of it")
    warmup_steps: int = Field(ge=0)
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(ge=0, lt=1, description="of the weights that are saved; 0 saves the trained ones")


class FitConfig(OptimiserConfig):
    """One optimisation (`distill.loop.fit`)."""

    steps: Tunable[int] = Field(gt=0, le=MAX_STEPS, description="updates of the weights")
    batch: Tunable[int] = Field(gt=0, le=MAX_BATCH, description="clips that the loss sees at a time")
    accumulate: int = Field(default=1, gt=0, description="losses whose gradients are averaged in one update")
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


class AdoptConfig(Config):
    """A downloaded pipeline as a teacher (`distill.adopt`). None: the stock pipeline's own default."""

    name: str | None = Field(default=None, description="the folder's")
    task: Literal["ti2v", "t2v"] | None = Field(default=None, description="of Wan2.2-TI2V-5B, which is for both")
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: float | None = Field(default=None, ge=1, description="of Hunyuan the one that is fed in")
    guidance_scale_2: float | None = Field(default=None, ge=1, description="of Wan's low-noise expert")
    true_cfg_scale: float | None = Field(default=None, ge=1, description="of Hunyuan, classifier-free guidance")
    width: int | None = Field(default=None, gt=0)
    height: int | None = Field(default=None, gt=0)
    num_frames: int | None = Field(default=None, gt=0)
    max_sequence_length: int | None = Field(default=None, gt=0)
    negative_prompt: str | None = None
    fps: int = Field(default=16, gt=0, description="the pipelines do not know it")
    help: str = "say what the video shows and how it moves"
    examples: tuple[str, ...] = Field(default=("a boat on a lake rocks in the wind",), min_length=1)


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


class ImportanceConfig(Config):
    """Stage I: which blocks matter least (`distill.stages.importance`)."""

    clips: int = Field(gt=0, le=DEV_CLIPS)
    sigmas: int = Field(gt=0, description="noise levels for each clip, one in each of so many equal parts")
    noises: int = Field(gt=0, description="draws of the noise for each clip and level")
    sigma_min: float = Field(gt=0, lt=1)
    sigma_max: float = Field(gt=0, lt=1)
    weighting: Tunable[Literal["elbo", "uniform_v", "x0"]] = Field(
        description="of the squared velocity error at each level"
    )
    greedy: Tunable[bool] = Field(description="measure anew after each removal: single importances do not add up")
    rho: Tunable[float] = Field(gt=0, lt=1, description="share of all block parameters that has to go")

    @model_validator(mode="after")
    def _levels_are_in_order(self) -> Self:
        _in_order("sigma_min and sigma_max", (self.sigma_min, self.sigma_max))
        return self


class PruningConfig(Config):
    """Stage II: weights that work at many depths (`distill.stages.pruning`)."""

    unimportant: float = Field(gt=0, description="blocks that may be skipped, in multiples of rho times all blocks")
    skip_probability: Tunable[float] = Field(gt=0, lt=1, description="p: of each of them, by itself")
    deployed_probability: Tunable[float] = Field(
        ge=0, le=1, description="q: of the mask that will be deployed; 0: the paper"
    )
    alpha: Tunable[float] = Field(
        ge=0, le=1, description="weight of the unpruned output against the data; 1: the paper's best"
    )
    target: Tunable[Literal["self", "frozen_teacher"]] = Field(description="whose unpruned output; self: the paper")
    drift_limit: Tunable[float] = Field(
        gt=0, description="mean square distance of the full-depth path from the teacher's that ends the stage, relative"
    )
    fit: FitConfig


class ScoresConfig(Config):
    """The real score of stage III: whose velocity is guided, how far and in which direction."""

    source: Tunable[Literal["full", "teacher", "pruned", "interpolated"]] = Field(
        description="A: stage II's weights at full depth, the original teacher, stage II's pruned, or halfway"
    )
    intra_mode: Tunable[Literal["extrapolate", "interpolate"]] = Field(description="beta_2 counts from A, or from P")
    cfg_unit: Tunable[Literal["extra", "standard"]] = Field(
        description="beta_1 = 0, or beta_1 = 1, is no text guidance"
    )
    beta_1: Tunable[tuple[float, float]] = Field(description="text guidance, drawn uniformly for each clip")
    beta_2: Tunable[tuple[float, float]] = Field(
        description="guidance of unpruned over pruned, drawn uniformly for each clip"
    )
    alpha_weak: Tunable[float] = Field(
        ge=0, le=1, description="share of the critic's LoRA in the real score (W2SVD); 0: none"
    )

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        _in_order("beta_1", self.beta_1)
        _in_order("beta_2", self.beta_2)
        return self


class CriticConfig(OptimiserConfig):
    """The fake score of stage III: follows what the student makes."""

    kind: Tunable[Literal["lora", "full"]] = Field(description="on stage II's weights, or a copy of them")
    rank: Tunable[int] = Field(gt=0, le=1024, description="of the LoRA")
    pruned: bool = Field(description="runs at the student's depth")
    updates: Tunable[int] = Field(gt=0, le=100, description="of the critic for each one of the student")


class GanConfig(Config):
    """The optional discriminator on the critic's features (DMD2)."""

    student_weight: Tunable[float] = Field(ge=0, description="of deceiving it; 0: none")
    critic_weight: Tunable[float] = Field(ge=0, description="of its own loss in the critic's")
    tokens: Literal["last", "middle"] = Field(
        default="last", description="what it reads: the critic's tokens after its last block, or at half its depth"
    )


class LimitsConfig(Config):
    """What the student's samples may be, as ratios to the teacher's for the same images, captions and noise."""

    motion: Tunable[tuple[float, float]] = Field(
        description="mean change from the first frame: below is static, above too much"
    )
    contrast: Tunable[tuple[float, float]] = Field(description="deviation of the pixels: below is a flat colour")
    saturation: Tunable[tuple[float, float]] = Field(description="distance of the pixels from grey")
    flicker: Tunable[tuple[float, float]] = Field(description="second difference over time")
    critic: Tunable[float] = Field(gt=0, description="largest loss of the critic")
    patience: Tunable[int] = Field(gt=0, description="alarms in a row that end the stage with the last good weights")

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        for name in ("motion", "contrast", "saturation", "flicker"):
            _in_order(name, getattr(self, name))
        return self


class MatchingConfig(Config):
    """Stage III: distribution matching with the well-guided teacher (`distill.stages.matching`).

    Raises:
        ValueError: the real score is to hold a share of a LoRA that the critic does not have, or the student to be
            drawn to a real clip that it was not given.
    """

    scores: ScoresConfig
    critic: CriticConfig
    gan: GanConfig
    limits: LimitsConfig
    rollout: Tunable[Literal["renoise", "euler", "data"]] = Field(
        description="what the student starts from: its own steps re-noised (DMD2), its own Euler steps as at "
        "inference, or noised real latents"
    )
    truth_weight: float = Field(
        default=0.0, ge=0, description="of the gradient towards the real clip (W2SVD's regularisation); 0: none"
    )
    score_shift: float = Field(gt=0)
    score_min: float = Field(gt=0, lt=1, description="noise levels of the scores are clamped to [min, max]")
    score_max: float = Field(gt=0, lt=1)
    fit: FitConfig

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _in_order("score_min and score_max", (self.score_min, self.score_max))
        if self.scores.alpha_weak > 0 and self.critic.kind != "lora":
            raise ValueError("scores.alpha_weak is a share of the critic's LoRA: set critic.kind=lora or alpha_weak=0")
        if self.truth_weight > 0 and self.rollout != "data":
            raise ValueError("truth_weight draws to the clip that was noised: set rollout=data or truth_weight=0")
        return self


class StudentConfig(Config):
    """The few-step schedule that is trained for and saved: `FlowMatchEulerDiscreteScheduler` with these."""

    num_inference_steps: int = Field(ge=1)
    shift: float = Field(gt=0)
    shift_terminal: float | None = Field(
        gt=0, lt=1, description="the last noise level before 0; of one step it is 1; None: as the shift has it"
    )


class GroundTruthLimits(Config):
    """How much worse than the active student's clips a new one's may be, where the world can be fitted to them.

    Of the mean over clips of the paired differences in a metric of `distill.metrics`.
    """

    score: Tunable[float] = Field(
        default=0.03, gt=0, description="mean of all scored metrics; hides a single one that is lost"
    )
    prompt_following: Tunable[float] = Field(
        default=0.1, gt=0, description="share of what the caption fixes that is done"
    )
    motion_amount: Tunable[float] = Field(
        default=0.1, gt=0, description="nearness of the amount of motion to what is asked for"
    )
    subject_consistency: Tunable[float] = Field(default=0.1, gt=0, description="colour and outline of the shape")
    background_consistency: Tunable[float] = Field(default=0.05, gt=0, description="colours of the background")
    imaging_quality: Tunable[float] = Field(default=0.1, gt=0, description="sharpness without noise, colours in range")
    trajectory_error_px: Tunable[float] = Field(
        default=1.0, gt=0, description="may be larger by so much (closed captions)"
    )


class ReferenceLimits(Config):
    """What a new student's clips may be beside the teacher's of the same image, prompt and seed (any model).

    Pairs are the least and the largest ratio, of which the geometric mean over clips is held against; the others are
    how much worse the mean difference may be.
    """

    motion: Tunable[tuple[float, float]] = Field(
        default=(0.7, 1.4), description="optical flow: static below, exaggerated above"
    )
    flicker: Tunable[tuple[float, float]] = Field(
        default=(0.4, 1.6), description="of the colours of 8 x 8 cells over time"
    )
    sharpness: Tunable[tuple[float, float]] = Field(
        default=(0.6, 2.0), description="blurred or flat below, noisy above"
    )
    detail: Tunable[tuple[float, float]] = Field(
        default=(0.75, 3.0), description="of the Laplacian: edges washed out below, noise above"
    )
    warp_error: Tunable[tuple[float, float]] = Field(
        default=(0.5, 1.4), description="what changes without moving: nothing at all below, too much above"
    )
    saturation: Tunable[tuple[float, float]] = Field(
        default=(0.85, 1.18), description="washed out below, over-saturated above"
    )
    first_frame_ssim: Tunable[float] = Field(
        default=0.05, gt=0, description="the given image's likeness may be lower by this"
    )
    colour_drift: Tunable[float] = Field(
        default=0.03, gt=0, description="colours may go so much further from the given image's"
    )
    dead_frames: Tunable[float] = Field(
        default=0.02, gt=0, description="share of frames black or of one colour beyond its own"
    )
    other_motion: Tunable[float] = Field(
        default=0.7, gt=0, lt=1, description="0: the same flow, 1: none in common; above, the prompt is not heard"
    )
    broken_clips: Tunable[float] = Field(
        default=0.1, gt=0, description="share of clips that are nothing like the teacher's"
    )

    @model_validator(mode="after")
    def _one_is_allowed(self) -> Self:
        for name in ("motion", "flicker", "sharpness", "detail", "warp_error", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low < 1 < high:
                raise ValueError(f"{name}: a ratio of 1 has to lie between the two; got {low:g} and {high:g}")
        return self


class GateConfig(Config):
    """Whether a new student may replace the active one (`distill.gate`).

    A limit refuses when its whole 95 % interval lies beyond it, or the mean lies ``far`` times as far off as allowed.
    """

    clips_from: str = Field(
        default="shapes-1",
        description="shapes-1: fixed clips of the world `shapes`; else a folder of images, each with a .txt of the "
        "same name that holds its prompt (the reference form alone)",
    )
    clips: int = Field(default=24, ge=2, description="that the world is fitted to; every other one closed")
    reference_clips: int = Field(default=16, ge=2, description="that the teacher makes too: the first of them")
    seed: int = Field(default=0, ge=0, description="of the noise, the same for every model")
    far: Tunable[float] = Field(
        default=2.0, ge=1, description="a mean so many margins off refuses, however wide its interval"
    )
    ground_truth: GroundTruthLimits = GroundTruthLimits()
    reference: ReferenceLimits = ReferenceLimits()

    @model_validator(mode="after")
    def _reference_is_a_part(self) -> Self:
        if self.reference_clips > self.clips:
            raise ValueError(
                f"reference_clips={self.reference_clips} are the first of clips={self.clips}: give no more"
            )
        return self


class DistillConfig(Config):
    """A student from a teacher (`distill.run`)."""

    name: str
    preset: Literal["full", "quick", "smoke"]
    seed: Tunable[int] = Field(ge=0, lt=2**32, description="of everything random")
    teacher: str = Field(description="a model folder")
    data: str = Field(default=SHAPES, description="clips of the world shapes, or a folder of `distill prepare`")
    experts: Literal["both", "high", "low"] = Field(
        default="both", description="of a teacher of two experts, which the student is of; of one it is half as large"
    )
    num_clips: Tunable[int] = Field(gt=0, le=MAX_CLIPS, description="training clips whose latents are cached")
    text_drop: float = Field(
        ge=0, le=1, description="share of captions left out in stage II, where the negative prompt is empty"
    )
    shift: float = Field(gt=0, description="of the noise levels of stages I and II: the teacher's")
    compile: bool = Field(description="blocks go through torch.compile")
    checkpoint_activations: bool = Field(
        default=False, description="a block's inner values are computed again on the way back, not kept: a third slower"
    )
    context_parallel: int = Field(
        default=1, gt=0, description="processes that share a clip's tokens; the others of torchrun share the batch"
    )
    precision: Literal["float32", "bfloat16"] = Field(description="of the matrix products, by autocast")
    looked_at: int = Field(default=32, gt=0, description="held-out clips that go through a network at a time")
    watched: int = Field(
        gt=0, le=DEV_CLIPS, description="held-out clips that are drawn and compared with the teacher's on the way"
    )
    student: StudentConfig
    importance: ImportanceConfig
    pruning: PruningConfig
    matching: MatchingConfig
    gate: GateConfig = GateConfig()


# --- a prepared data set ----------------------------------------------------------------------------------------------


class FiltersConfig(Config):
    """Which videos `distill prepare` takes (`distill.data.videos`)."""

    min_scale: float = Field(
        default=1.0, gt=0, description="a video's size over the model's, below which it would be enlarged too much"
    )
    min_frame_rate: float = Field(
        default=0.75, ge=0, description="a video's frame rate over the model's, below which frames are shown twice"
    )
    min_motion: float = Field(
        default=0.01,
        ge=0,
        description="change from frame to frame, of the whole range, where a twentieth of the picture changes most; "
        "below, the video is static",
    )
    max_cut: float = Field(
        default=0.1, gt=0, description="largest change between frames beyond the median one: above, the scene is cut"
    )
    min_difference_bits: int = Field(
        default=32, ge=0, le=256, description="of a clip's hash of 256, from any before it: below, it is a copy"
    )


class PrepareConfig(Config):
    """What `distill prepare` makes of a source of videos and captions (`distill.prepare`)."""

    filters: FiltersConfig = FiltersConfig()
    held_out: float = Field(default=0.02, ge=0, lt=1, description="share of the sources that goes to the dev split")
    clips_per_file: int = Field(default=64, gt=0, description="of the source; an interrupted file is begun again")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="of the encoders, by autocast")
    text_dtype: Literal["float16", "bfloat16", "float32"] = Field(default="float16", description="as it is kept")
    decode_timeout_s: float = Field(default=120.0, gt=0, description="a video that takes longer is unreadable")
    from_teacher: bool = Field(default=False, description="the model itself samples the clips, from captions only")
    seed: int = Field(default=0, ge=0, description="of the noise that it samples them from")


# --- the comparison of methods ----------------------------------------------------------------------------------------


class EulerConfig(Config):
    """The teacher itself in few steps, undistilled: the control (`distill.baselines.euler`)."""

    kind: Literal["euler"] = "euler"
    guidance_scale: float = Field(ge=1, description="standard unit: 1 is none")


class LcmConfig(Config):
    """Consistency distillation (`distill.baselines.lcm`)."""

    kind: Literal["lcm"] = "lcm"
    solver_steps: int = Field(gt=1, description="Euler steps of the teacher's path, two neighbours at a time")
    guidance_scale: float = Field(ge=1, description="of the teacher's step, standard unit: 1 is none")
    huber: float = Field(gt=0, description="below this distance the loss is square, above it linear")
    fit: FitConfig


class IcmdConfig(Config):
    """Fewer blocks by matching features, as many steps as the teacher (`distill.baselines.icmd`)."""

    kind: Literal["icmd"] = "icmd"
    rho: float = Field(gt=0, lt=1, description="share of all block parameters that has to go")
    feature_weight: float = Field(ge=0)
    adversarial_weight: float = Field(ge=0)
    head: OptimiserConfig
    """Of the discriminator."""
    fit: FitConfig


class F3Config(Config):
    """Training-free pruning by attention between frames (`distill.baselines.f3`)."""

    kind: Literal["f3"] = "f3"
    mode: Literal["block", "sublayer", "edges"] = Field(
        description="what goes where little attention crosses frames: the block, its self-attention, or what crosses"
    )
    rho: float = Field(gt=0, lt=1, description="share of all block parameters, or of all layers where no block goes")
    clips: int = Field(gt=0, le=DEV_CLIPS)
    sigmas: int = Field(gt=0, description="noise levels that attention is averaged over")
    queries: int = Field(gt=0, description="rows of the attention matrix, drawn for each layer, level and clip")


class MethodConfig(Config):
    """One row of the comparison as it is trained: a method, what it starts from, its settings."""

    method: Literal["euler", "lcm", "dmd2", "magic", "icmd", "f3", "fastlightgen"]
    weights: Literal["teacher", "pruned"] = Field(
        description="what the student starts as: the teacher, or stage II's weights without the pruned blocks"
    )
    recipe: DistillConfig
    """Teacher, data, stages I and II, the student's steps, and stage III of the methods that match distributions."""
    own: EulerConfig | LcmConfig | IcmdConfig | F3Config | None = Field(
        default=None, discriminator="kind", description="of the methods that do not"
    )

    @model_validator(mode="after")
    def _own_is_the_method_s(self) -> Self:
        matching = self.method in ("dmd2", "magic", "fastlightgen")
        if (self.own.kind if self.own else None) != (None if matching else self.method):
            raise ValueError(f"own: the settings of {self.method} are wanted; got {self.own!r}")
        return self


class CompareConfig(Config):
    """What `distill compare` trains, evaluates and reports."""

    tier: Literal["quick", "cpu", "gpu"] = Field(description="as the report says it")
    budget: float = Field(gt=0, description="of each trained method, in updates of the unpruned DMD2 student")
    pruning_share: float = Field(gt=0, lt=1, description="of the budget that stages I and II may use")
    short_share: float = Field(gt=0, le=1, description="budget of a row of the grid or of an ablation")
    seeds: int = Field(gt=0, description="of the training")
    clips: int = Field(ge=2, description="of the test split, half of them with closed captions")
    noise_seeds: int = Field(gt=0)
    short_clips: int = Field(ge=2, description="clips (and one seed) of a row of the grid or of an ablation")
    diversity_pairs: int = Field(ge=0, description="open (image, caption) pairs; 0 leaves diversity out")
    diversity_samples: int = Field(ge=2)
    groups: tuple[Literal["methods", "grid", "ablations"], ...]
    rows: tuple[str, ...] = Field(description="only these, by name; none: every row of the groups")
    choices: dict[str, tuple[str, ...]] = Field(description="by method, what `distill tune` chose, as A.B=C")
    searches: dict[str, tuple[int, float]] = Field(
        default={}, description="by method, of the search that chose: settings tried, budget of the last rung"
    )
    precision: Literal["float32", "bfloat16"]


class TuneConfig(Config):
    """What `distill tune` searches (`distill.tune`)."""

    trials: int = Field(gt=0, description="settings that are tried")
    budget: float = Field(gt=0, description="of a setting's last rung, in updates of the unpruned DMD2 student")
    rungs: int = Field(gt=0, description="each has `reduction` times the budget of the one before")
    reduction: int = Field(gt=1, description="one in so many settings goes on to the next rung")
    pruning_share: float = Field(gt=0, lt=1)
    clips: int = Field(ge=2, description="of the dev split, half of them closed")
    diversity_pairs: int = Field(ge=1)
    diversity_samples: int = Field(ge=2)
    dynamic_degree: tuple[float, float] = Field(description="allowed, over the teacher's")
    flicker: tuple[float, float] = Field(description="allowed, over the teacher's")
    diversity: float = Field(gt=0, description="least allowed, over the teacher's")
    seed: int = Field(ge=0)
    precision: Literal["float32", "bfloat16"]


def _in_order(names: str, ends: tuple[float, float]) -> None:
    if ends[0] > ends[1]:
        raise ValueError(f"{names}: the first of {ends} is the larger one; give them in order")


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
        got = "" if isinstance(first["input"], dict) else f"got {first['input']!r}; "
        raise ConfigError(f"--set {where}: {got}{first['msg']}") from None


def _paths(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}.*" if isinstance(v, dict) else k for k, v in values.items())
