"""`python -m distill plan RECIPE`: what a run will take of memory and of time, before it is begun.

A process's memory is put together as `distill.distributed` and the stages lay it out; what calls of the networks take
is counted in `distill.calls`. Nothing is downloaded and nothing is computed.

A plan is of blocks that are not compiled: where they are, less is kept, and it is an upper bound.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from distill import distributed
from distill.calls import BF16, FP32, Calls, Network, Passed, Teacher, Weights, held, network_of, one_expert, without
from distill.calls import teacher_of as teacher_of
from distill.config import DEV_CLIPS, SHAPES, ConfigError, DistillConfig, FitConfig, OptimiserConfig
from distill.distributed import World
from distill.stages import heads
from distill.stages.watch import CHUNK, SHOWN

GB = 1e9
KEPT_FREE = 0.08
"""Share of a processor's memory that is not planned with: for the driver's context, buffers of the collectives, and
gaps between tensors. An assumption."""
MOST_GPUS = 1024
SHARED_BY = (1, 2, 4, 8)
"""Processes for a clip's tokens, that are tried."""
PEAK_TFLOPS = {"a100": 312.0, "h100": 989.4, "h200": 989.4, "b200": 2250.0, "l40s": 362.05}
"""Dense bf16, by NVIDIA's data sheets: A100 312; H100 and H200 (SXM) 1,979 with sparsity, which is twice as much; B200
4,500 with sparsity; L40S 362.05."""
_UNITS = {"MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30, "TB": 1e12, "TiB": 2**40}


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: so many equal processors, a process for each."""

    processes: int
    memory_bytes: int
    peak_tflops: float
    """Of one of them."""
    efficiency: float
    """Share of its peak that it keeps up. An assumption."""
    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class Phase:
    """A part of a stage, and what each process holds in it."""

    name: str
    bytes_by_part: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.bytes_by_part.values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    steps: int
    flops_per_step: float
    """Of all processes."""
    flops_beside: float
    """Of samples and other looks, in the whole stage."""
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    recipe: str
    machine: Machine
    teacher: str
    """Its name, and where its shape is known from."""
    tokens: int
    """Of a clip: of its video."""
    parameters: dict[str, int]
    clips: tuple[int, int]
    """Of one update, of stages II and III."""
    stages: tuple[StagePlan, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that a process holds."""
        return max(stage.peak.total_bytes for stage in self.stages)

    @property
    def usable_bytes(self) -> int:
        """Of a processor's memory, what is planned with."""
        return int(self.machine.memory_bytes * (1 - KEPT_FREE))

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def needed_bytes(self) -> int:
        """The least memory of a processor that it fits into."""
        return math.ceil(self.peak_bytes / (1 - KEPT_FREE))

    def step_s(self, stage: StagePlan) -> float:
        """Seconds of one step."""
        return stage.flops_per_step / self._flops_per_s

    def hours(self, stage: StagePlan) -> float:
        """Of the whole stage."""
        return (stage.steps * stage.flops_per_step + stage.flops_beside) / self._flops_per_s / 3600

    def gpu_hours(self, stage: StagePlan) -> float:
        """The same of all processors together."""
        return self.hours(stage) * self.machine.processes

    @property
    def _flops_per_s(self) -> float:
        return self.machine.processes * self.machine.peak_tflops * 1e12 * self.machine.efficiency


def machine(
    processes: int, memory: str, gpu: str, peak_tflops: float | None, efficiency: float, device: Literal["cuda", "cpu"]
) -> Machine:
    """As the command line asks for it. Raises ``ConfigError``."""
    if processes < 1:
        raise ConfigError(f"--gpus {processes}: a run is of one process at least")
    if gpu not in PEAK_TFLOPS:
        raise ConfigError(f"--gpu {gpu}: known are {', '.join(PEAK_TFLOPS)}; of another one give --peak-tflops")
    peak = PEAK_TFLOPS[gpu] if peak_tflops is None else peak_tflops
    if not (peak > 0 and 0 < efficiency <= 1):
        raise ConfigError(
            f"--peak-tflops {peak:g} --efficiency {efficiency:g}: the first is above 0, the other in (0, 1]"
        )
    return Machine(processes, parse_memory(memory), peak, efficiency, device)


def with_clips_of(teacher: Teacher, size: str) -> Teacher:
    """The teacher as if it made clips of another size, "832x480x81". Raises ``ConfigError``."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", size)
    if found is None:
        raise ConfigError(f"--clip {size}: give width, height and frames, for example 832x480x81")
    width, height, frames = map(int, found.groups())
    return replace(teacher, call={**teacher.call, "width": width, "height": height, "num_frames": frames})


def parse_memory(text: str) -> int:
    """Bytes of "80GB". Raises ``ConfigError``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ConfigError(f"--memory {text}: give a size with its unit ({', '.join(_UNITS)}), for example 80GB")
    return int(float(found[1]) * units[found[2].lower()])


def check(config: DistillConfig, machine: Machine) -> None:
    """Whether the processes can share the work.

    Raises:
        ConfigError: they cannot, as a run under `torchrun` would say.
    """
    context = config.context_parallel
    if machine.processes < 1 or machine.processes % context:
        raise ConfigError(f"context_parallel={context} does not divide --gpus {machine.processes}")
    distributed.check(config, World(size=machine.processes, context=context))


def make(config: DistillConfig, machine: Machine, teacher: Teacher, calls: Calls | None = None) -> Plan:
    """The plan of a run.

    Args:
        calls: of the same teacher and the same kind of machine, where some were made before.

    Raises:
        ConfigError: the batches cannot be shared by the processes.
    """
    check(config, machine)
    planned = _Planned(config, machine, teacher, calls or calls_of(config, machine, teacher))
    return Plan(
        recipe=config.name,
        machine=machine,
        teacher=f"{teacher.name} ({teacher.source})",
        tokens=_tokens(teacher),
        parameters={"teacher": planned.whole.parameters, "student": planned.student.parameters,
                    "lora": sum(map(math.prod, planned.adapters)) if planned.has_lora else 0},
        clips=(config.pruning.fit.batch * config.pruning.fit.accumulate,
               config.matching.fit.batch * config.matching.fit.accumulate),
        stages=(planned.importance(), planned.pruning(), planned.matching()),
    )  # fmt: skip


def calls_of(config: DistillConfig, machine: Machine, teacher: Teacher) -> Calls:
    """What ``make`` makes its calls with; they do not depend on the number of processes."""
    return Calls(teacher, config.precision, machine.device == "cpu", config.matching.critic.rank)


class _Planned:
    """A run's networks, and where they lie."""

    def __init__(self, config: DistillConfig, machine: Machine, teacher: Teacher, calls: Calls) -> None:
        self.config, self.machine, self.teacher, self.calls = config, machine, teacher, calls
        self.whole = network_of(teacher)
        self.pruned = without(self.whole, config.importance.rho)
        self.student = self.pruned if config.experts == "both" else one_expert(self.pruned)
        self._n = machine.processes
        self._ranks = machine.processes // config.context_parallel
        self._sharded = machine.processes > 1

    # --- where things lie ---

    @property
    def _frozen_itemsize(self) -> int:
        """Of weights that are not trained, and of gathered ones."""
        return BF16 if self._sharded and self.config.precision == "bfloat16" else FP32

    @property
    def has_lora(self) -> bool:
        """Or a whole network for a critic."""
        return self.config.matching.critic.kind == "lora"

    @cached_property
    def adapters(self) -> Weights:
        """The critic's LoRA, of all blocks."""
        of_kind = self.calls.adapters()
        return [shape for kind, _ in self.whole.blocks for shape in of_kind[kind]]

    def _frozen(self, network: Network) -> int:
        return held(network.shapes, self._n) * self._frozen_itemsize

    def _trained(self, weights: Weights, of: str, optimiser: OptimiserConfig, keeps_good: bool) -> dict[str, int]:
        """Weights, the optimiser's moments, the running average, and the last good average where it is kept beside."""
        numbers = held(weights, self._n)
        moments = 2 * numbers
        if optimiser.optimiser == "muon":
            moments -= sum(math.prod(shape) for shape in self._matrices(weights))
        parts = {f"{of}: weights": numbers * FP32, f"{of}: optimiser": moments * FP32, f"{of}: EMA": numbers * FP32}
        if keeps_good and self.machine.device == "cpu":
            parts[f"{of}: last good weights"] = numbers * FP32
        return parts

    def _matrices(self, weights: Weights) -> Iterator[Any]:
        within = {id(shape) for _, block in (*self.whole.blocks, *self.student.blocks) for shape in block}
        return (shape for shape in weights if id(shape) in within and len(shape) == 2)

    def _gradients(self, weights: Weights, of: str) -> dict[str, int]:
        return {f"{of}: gradients": held(weights, self._n) * FP32}

    def _gathered(self, network: Network, lora: bool = False, trained: bool = False) -> dict[str, int]:
        """Two blocks and what is beside them, whole; where it is trained also the gradient of one, before and while it
        is summed."""
        if not self._sharded:
            return {}
        beside = sum(map(math.prod, network.beside)) // network.models
        adapter = max(sum(map(math.prod, of)) for of in self.calls.adapters().values()) if lora else 0
        block = network.largest_block() + adapter
        parts = {"gathered blocks": (2 * block + beside) * self._frozen_itemsize}
        if trained:
            parts["gathered gradients"] = (adapter if lora else block) * (self._frozen_itemsize + FP32)
        return parts

    @cached_property
    def _resident(self) -> dict[str, int]:
        vae = FP32 * sum(p.numel() for p in self.teacher.pipe.vae.parameters())
        encoders = {"text encoders": self.teacher.encoder_bytes} if self.config.data == SHAPES else {}
        return {"VAE": vae, **encoders}

    def _picture_bytes(self) -> int:
        """What is drawn for people: the videos of teacher and student, and the contact sheet, three rows of six frames
        a clip, as numbers, as bytes and at twice the size."""
        call, watched = self.teacher.call, self.config.watched
        videos = 2 * watched * self.teacher.backbone.frames_of(call)
        sheet = min(watched, SHOWN) * 3 * 6 * (1 + 3 + 7 / 4)
        return int(FP32 * 3 * call["height"] * call["width"] * (videos + sheet))

    @property
    def _chunk(self) -> int:
        return min(CHUNK, self.config.looked_at, self.config.watched)

    # --- calls ---

    def _call(self, network: Network, trained: Any, clips: int, depth: float = 1.0, **how: Any) -> Passed:
        depths = {kind: count * depth for kind, count in network.depths().items()}
        whole = not self._sharded
        return self.calls.take(depths, trained, clips, whole=whole, processes=self.config.context_parallel, **how)

    def _mixed(self, fit: FitConfig) -> int:
        """Clips that go through a network, of a batch at different noise levels: of two experts each is asked."""
        own = fit.batch // self._ranks
        return max(own, 2) if self.whole.models > 1 and fit.batch > 1 else own

    # --- stages ---

    def importance(self) -> StagePlan:
        """Stage I: one step is all of it."""
        config = self.config.importance
        forward = self._call(self.whole, "nothing", self.config.looked_at)
        masks = 1 + len(self.whole.blocks)
        if config.greedy:
            gone = len(self.whole.blocks) - len(self.pruned.blocks)
            masks += sum(len(self.whole.blocks) - round_ for round_ in range(gone))
        flops = forward.forward_flops / self.config.looked_at
        parts = {**self._resident, "teacher": self._frozen(self.whole), **self._gathered(self.whole)}
        parts["activations"] = int(forward.forward_bytes)
        calls = masks * config.clips * config.sigmas * config.noises
        return StagePlan("I importance", 1, calls * flops, 0.0, (Phase("calls", parts),))

    def pruning(self) -> StagePlan:
        """Stage II."""
        config, fit = self.config.pruning, self.config.pruning.fit
        clips, weights = self._mixed(fit), self.whole.shapes
        target = self._call(self.whole, "all" if config.target == "self" else "nothing", clips, watched=False)
        whole = self._call(self.whole, "all", clips, again=self.config.checkpoint_activations)
        held_all = {**self._resident, "teacher": self._frozen(self.whole),
                    **self._trained(weights, "network", fit, keeps_good=True)}  # fmt: skip
        gradients = self._gradients(weights, "network")
        between = gradients if fit.accumulate > 1 else {}
        gathered = self._gathered(self.whole, trained=True)
        looked_at = self._call(self.whole, "all", self.config.looked_at, watched=False)
        activations = int(max(whole.forward_bytes, whole.backward_bytes))
        phases = (
            Phase(
                "target",
                {**held_all, **between, **self._gathered(self.whole), "activations": int(target.forward_bytes)},
            ),
            Phase("forward and back", {**held_all, **between, **gathered, "activations": activations}),
            Phase("update", {**held_all, **gradients, **gathered}),
            Phase("looks", {**held_all, **self._gathered(self.whole), "activations": int(looked_at.forward_bytes)}),
        )
        depth = 1 - self._mean_skipped()
        mean = self._call(self.whole, "all", clips, depth, again=self.config.checkpoint_activations)
        looks = math.ceil(fit.steps / fit.sample_every) * DEV_CLIPS * 3 * target.forward_flops / clips
        per_step = fit.accumulate * self._ranks * (target.forward_flops + mean.flops)
        return StagePlan("II pruning", fit.steps, per_step, looks, phases)

    def _mean_skipped(self) -> float:
        """Share of the blocks that a step of stage II does without."""
        rho, config = self.config.importance.rho, self.config.pruning
        may = min(max(config.unimportant * rho, rho), 1.0)
        q = config.deployed_probability
        return q * rho + (1 - q) * config.skip_probability * may

    def matching(self) -> StagePlan:
        """Stage III."""
        config, fit = self.config.matching, self.config.matching.fit
        own, clips = fit.batch // self._ranks, self._mixed(fit)
        again, gan = self.config.checkpoint_activations, config.gan.student_weight > 0
        source, critic_of = config.scores.source, self.pruned if config.critic.pruned else self.whole
        kind = "lora" if self.has_lora else "all"

        rollout = self._call(self.student, "all", own, watched=False)
        student = self._call(self.student, "all", own, again=again)
        critic = self._call(critic_of, kind, clips, again=again, head=True)
        scores = self._call(self.whole, "nothing", clips)
        fake = self._call(critic_of, kind, clips, watched=False, head=True)
        guided = self.teacher.backbone.guidance_at(self.teacher.network, self.teacher.call, 1.0) > 1
        sampled = self._call(self.whole, "nothing", self._chunk * (1 + guided))
        looked_at = self._call(self.student, "all", self._chunk, watched=False)

        head = [p.shape for p in heads.token_head(self.teacher.backbone.width(self.teacher.models[0])).parameters()]
        critics = (self.adapters if self.has_lora else self.whole.shapes) + head
        frozen = {"base": self._frozen(self.whole)}
        teacher = {"teacher": self._frozen(self.whole)}
        if source == "teacher" or not self._sharded:
            frozen |= teacher
        held_all = {
            **self._resident, **frozen,
            **self._trained(self.student.shapes, "student", fit, keeps_good=True),
            **self._trained(critics, "critic's LoRA" if self.has_lora else "critic", config.critic, keeps_good=False),
        }  # fmt: skip
        of_student = self._gradients(self.student.shapes, "student")
        of_critic = self._gradients(critics, "critic's LoRA" if self.has_lora else "critic")
        between = fit.accumulate > 1
        by_critic = self._gathered(self.whole, lora=self.has_lora, trained=True)
        by_student = self._gathered(self.student, trained=True)
        by_scores = self._gathered(self.whole, lora=self.has_lora)

        critic_bytes = max(critic.forward_bytes, critic.backward_bytes, rollout.forward_bytes) + gan * critic.kept_bytes
        scored_bytes = student.kept_bytes + max(scores.forward_bytes, fake.forward_bytes)
        back_bytes = max(student.forward_bytes, student.backward_bytes)
        if gan:
            back_bytes = max(back_bytes, student.kept_bytes + max(critic.forward_bytes, critic.backward_bytes))
        left = of_student | (of_critic if gan else {})
        first = {**self._resident, **teacher, **({} if self._sharded else frozen), **self._gathered(self.whole)}
        phases: tuple[Phase, ...] = (
            Phase("teacher's videos", {**first, "activations": int(sampled.forward_bytes)}),
            Phase(
                "critic", {**held_all, **(of_critic if between else {}), **by_critic, "activations": int(critic_bytes)}
            ),
            Phase("critic's update", {**held_all, **of_critic, **by_critic}),
            Phase("scores", {**held_all, **(left if between else {}), **by_scores, "activations": int(scored_bytes)}),
            Phase("student", {**held_all, **(left if between else {}), **by_student, "activations": int(back_bytes)}),
            Phase("student's update", {**held_all, **left, **by_student}),
            Phase("looks", {**held_all, **self._gathered(self.student), "activations": int(looked_at.forward_bytes)}),
            Phase("decoding", {**held_all, "activations": self.calls.decoding_bytes(self._chunk)}),
        )
        if self.machine.device == "cpu":  # else they are in the host's memory
            phases += (Phase("pictures", {**held_all, "activations": self._picture_bytes()}),)

        per_step = self._flops_of_matching(own, clips, student, scores, critic)
        call, few = self.teacher.call, self.config.student.num_inference_steps
        samples = math.ceil(fit.steps / fit.sample_every) * few * student.forward_flops / own
        samples += call["num_inference_steps"] * (1 + guided) * scores.forward_flops / clips
        return StagePlan("III matching", fit.steps, per_step, self.config.watched * samples, phases)

    def _flops_of_matching(self, own: int, clips: int, student: Passed, scores: Passed, critic: Passed) -> float:
        """Of one step: of the critic's updates and the student's."""
        config, fit = self.config.matching, self.config.matching.fit
        gan, source = config.gan.student_weight > 0, config.scores.source
        asked = clips * self._ranks / fit.batch  # experts, each of which is run for every clip
        forward, both_ways = student.forward_flops / own, student.flops / own
        score, fake, critic_both_ways = (n / clips for n in (scores.forward_flops, critic.forward_flops, critic.flops))
        pruned = self._call(self.pruned, "nothing", clips).forward_flops / clips
        # A and N, and P.
        real = 2 * {"pruned": pruned, "interpolated": score + pruned}.get(source, score)
        real += pruned if any(config.scores.beta_2) or config.scores.intra_mode == "interpolate" else 0.0
        before = 0.0 if config.rollout == "data" else (self.config.student.num_inference_steps - 1) / 2
        of_student = before * forward + both_ways + asked * (real + fake + gan * critic_both_ways)
        of_critic = (before + 1) * forward + asked * (1 + gan) * critic_both_ways
        return fit.accumulate * fit.batch * (of_student + config.critic.updates * of_critic)


# --- what would make it fit -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """Another way to make the run, that fits."""

    settings: tuple[str, ...]
    """Of `--set`."""
    plan: Plan

    more_gpus: bool

    def __str__(self) -> str:
        gpus = [f"--gpus {self.plan.machine.processes}"] if self.more_gpus else []
        return " ".join([*gpus, *(f"--set {setting}" for setting in self.settings)])


def remedy(config: DistillConfig, machine: Machine, teacher: Teacher, calls: Calls) -> Remedy | Plan:
    """The first way that fits: computing blocks again, fewer clips a process, a clip's tokens shared, more processors.

    Where none does, the plan of those that takes least.
    """
    least: Plan | None = None
    processes = machine.processes
    while processes <= max(MOST_GPUS, machine.processes):
        for other, settings in (way for more in (False, True) for way in _ways(config, processes, teacher, more)):
            try:
                plan = make(other, replace(machine, processes=processes), teacher, calls)
            except ConfigError:
                continue
            if plan.fits:
                return Remedy(settings, plan, processes != machine.processes)
            if least is None or plan.peak_bytes < least.peak_bytes:
                least = plan
        processes *= 2
    return least or make(config, machine, teacher, calls)


def _ways(
    config: DistillConfig, processes: int, teacher: Teacher, more_clips: bool
) -> Iterator[tuple[DistillConfig, tuple[str, ...]]]:
    """Settings that change memory, the least costly first: what an update sees stays, or ``more_clips`` are wanted."""
    for context in SHARED_BY:
        if context < config.context_parallel or processes % context or not _can_share(teacher, context):
            continue
        ranks = processes // context
        before = {name: getattr(config, name).fit for name in ("pruning", "matching")}
        shared = {name: _shared(fit, ranks, more_clips) for name, fit in before.items()}
        for fits in (shared,) if more_clips or shared == before else (before, shared):
            parts = {name: getattr(config, name).model_copy(update={"fit": fit}) for name, fit in fits.items()}
            for again in sorted({config.checkpoint_activations, True}):
                changed = {**parts, "checkpoint_activations": again, "context_parallel": context}
                other = config.model_copy(update=changed)
                yield other, tuple(_changed(config, other))


def _can_share(teacher: Teacher, context: int) -> bool:
    if context == 1:
        return True
    model = teacher.models[0]
    return (
        getattr(model, "_cp_plan", None) is not None
        and _tokens(teacher) % context == 0
        and model.config.num_attention_heads % context == 0
    )


def _shared(fit: FitConfig, ranks: int, more_clips: bool) -> FitConfig:
    """A clip at a time for each process: as many an update as before, or one for each process where those are more."""
    clips = fit.batch * fit.accumulate
    if clips % ranks == 0:
        return fit.model_copy(update={"batch": ranks, "accumulate": clips // ranks})
    return fit.model_copy(update={"batch": ranks, "accumulate": 1}) if more_clips and clips < ranks else fit


def _changed(config: DistillConfig, other: DistillConfig) -> Iterator[str]:
    for name in ("checkpoint_activations", "context_parallel"):
        if getattr(config, name) != getattr(other, name):
            yield f"{name}={json.dumps(getattr(other, name))}"
    for stage in ("pruning", "matching"):
        for name in ("batch", "accumulate"):
            before, after = (getattr(getattr(of, stage).fit, name) for of in (config, other))
            if before != after:
                yield f"{stage}.fit.{name}={after}"


def _tokens(teacher: Teacher) -> int:
    shape = teacher.backbone.latent_shape(teacher.pipe, teacher.call)
    config = teacher.models[0].config
    patch = config.patch_size
    steps = patch if isinstance(patch, (tuple, list)) else (config.patch_size_t, patch, patch)
    return math.prod(size // step for size, step in zip(shape[1:], steps, strict=True))


# --- as text ----------------------------------------------------------------------------------------------------------


def text(plan: Plan, found: Remedy | Plan | None) -> str:
    """For a person, with what to do where it does not fit."""
    machine, million = plan.machine, 1e6
    counts = ", ".join(f"{name} {count / million:,.1f}" for name, count in plan.parameters.items() if count)
    lines = [
        f"{plan.recipe}: {machine.processes} processes of {machine.memory_bytes / GB:.1f} GB and "
        f"{machine.peak_tflops:g} TFLOPS each, at an efficiency of {machine.efficiency:g}, which is an assumption",
        f"teacher: {plan.teacher}; parameters in millions: {counts}",
        f"a clip has {plan.tokens:,} tokens; an update sees {plan.clips[0]} clips in stage II, {plan.clips[1]} in III",
    ]
    for stage in plan.stages:
        peak = stage.peak
        lines += ["", f'stage {stage.name}, GB of each process at its peak, which is "{peak.name}":']
        lines += [f"  {name:<32}{size / GB:9.2f}" for name, size in peak.bytes_by_part.items() if size]
        left = plan.usable_bytes - peak.total_bytes
        lines.append(f"  {'all of it':<32}{peak.total_bytes / GB:9.2f}   left: {left / GB:.2f}")
        hours, steps = plan.gpu_hours(stage), "1 step" if stage.steps == 1 else f"{stage.steps:,} steps"
        lines.append(
            f"  {steps} of {plan.step_s(stage):,.2f} s ({stage.flops_per_step / 1e12:,.1f} TFLOP): "
            f"{hours:,.1f} GPU-hours, {hours / 24:,.2f} GPU-days"
        )
    hours = sum(map(plan.gpu_hours, plan.stages))
    days = hours / machine.processes / 24
    lines += ["", f"in all {hours:,.1f} GPU-hours, {hours / 24:,.2f} GPU-days: {days:,.2f} days on these processors"]
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(
        f"{verdict}: {plan.peak_bytes / GB:.2f} GB of {plan.usable_bytes / GB:.2f} ({KEPT_FREE:.0%} are kept free)"
    )
    if found is not None:
        lines.append(_advice(found))
    return "\n".join(lines)


def _advice(found: Remedy | Plan) -> str:
    if isinstance(found, Plan):
        return (
            f"no setting makes it fit, on up to {found.machine.processes} GPUs: with all of them each needs "
            f"{found.needed_bytes / GB:.1f} GB"
        )
    clips = " and ".join(map(str, sorted(set(found.plan.clips))))
    return f"it fits with {found}: {found.plan.peak_bytes / GB:.2f} GB, {clips} clips an update"


def as_json(plan: Plan, found: Remedy | Plan | None) -> dict[str, Any]:
    """For programs, likewise."""
    stages = {
        stage.name: {
            "steps": stage.steps,
            "flops_per_step": stage.flops_per_step,
            "step_s": plan.step_s(stage),
            "gpu_hours": plan.gpu_hours(stage),
            "peak": stage.peak.name,
            "peak_bytes": stage.peak.total_bytes,
            "phases": {phase.name: phase.bytes_by_part for phase in stage.phases},
        }
        for stage in plan.stages
    }
    return {
        "recipe": plan.recipe, "machine": asdict(plan.machine), "teacher": plan.teacher, "tokens": plan.tokens,
        "parameters": plan.parameters, "stages": stages, "peak_bytes": plan.peak_bytes,
        "usable_bytes": plan.usable_bytes, "fits": plan.fits,
        "gpu_hours": sum(map(plan.gpu_hours, plan.stages)), "advice": None if found is None else _advice(found),
    }  # fmt: skip
