"""Stage III: distribution matching with the well-guided teacher (DMD2 with FastLightGen's real score).

The student makes a clip; the clip is noised; the real score says where the guided teacher would move it, the fake score
where the student's own distribution is; the student follows the difference.

    R = A + beta_1 (A - N) + beta_2 (A - P)        A full depth, N empty caption, P without the pruned blocks
    g = (X_fake - R) / mean | y - R |               the gradient of the student's clip y

Both scores come from stage II's weights. The critic is a LoRA on them (or a full copy), switched off for the real one.
"""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill import distributed, losses, schedule
from distill.backbones.base import Backbone
from distill.backbones.conditions import Conditions
from distill.config import CriticConfig, MatchingConfig, ScoresConfig
from distill.loop import Rival, Run, fit
from distill.stages import heads, pruning, watch
from distill.stages.given import Batch, Given, noised

ADAPTER = "critic"


def run(
    run: Run, given: Given, pruned: Collection[int], base: Any, config: MatchingConfig, scheduler: Any,
    watched: watch.Watch, student: Any | None = None,
) -> Any:  # fmt: skip
    """Train the few-step student from stage II's weights; returns its transformer, the pruned blocks removed.

    Args:
        pruned: blocks that ``base`` can do without: the student is, and the real score's P.
        base: stage II's transformer, of full depth. It is not changed, but given the critic's adapter.
        student: what it starts as, where that is not ``base`` without the blocks ``pruned``.
        scheduler: the one that will be saved, set to its steps: the student is trained on just its noise levels.
        watched: what is looked at on the way; its alarms end the stage with the last good weights.
    """
    if not run.world.exists(run.folder / "matching.safetensors"):
        _ = watched.teachers  # before there is anything to lose
        if config.scores.source != "teacher":
            given.let_the_teacher_go()
    gc.collect()  # networks in parts, such as stage II's, refer to themselves
    sigmas = tuple(scheduler.sigmas.tolist())
    if student is None:
        student = given.without_blocks(base, pruned)
    student.train().requires_grad_(True)
    torch.manual_seed(run.seed)  # of the critic's head
    critic = Critic(given.backbone, base, config.critic, pruned, config.gan.tokens)
    critic.begin(run)
    scores = Scores(given, base, critic, pruned, config.scores)
    given.ready(run, student, base, critic.transformer)
    if run.world.is_sharded:
        _spread(run, given, pruned, student, base, critic)
    rollout = Rollout(given, student, sigmas, config.rollout)
    gan = config.gan.student_weight > 0

    def conditions(number: int) -> Batch:
        return given.mine(given.train, given.train.rows(run, number, config.fit.batch))

    def score_sigmas(batch: Batch, generator: torch.Generator) -> Tensor:
        sigma_B = batch.share.rows(schedule.sample_sigmas(batch.whole, config.score_shift, generator))
        return sigma_B.clamp(config.score_min, config.score_max).to(given.device)

    def critic_loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = conditions(number)
        with torch.no_grad():
            y_BCTHW = rollout(batch, generator)
        sigma_B, noise = score_sigmas(batch, generator), batch.noise(generator)
        velocity, fake_logit_B = critic(given, noised(y_BCTHW, noise, sigma_B), sigma_B, batch)
        made = batch.made(velocity, y_BCTHW, noise)
        value = losses.flow_matching(*made)
        values = gaps(losses.velocity_error(*(part.detach() for part in made)), sigma_B)
        if not gan:
            return value, values
        real = conditions(number + 1)  # others than those that y was made for
        noise = real.noise(generator)
        _, real_logit_B = critic(given, noised(real.x0_BCTHW, noise, sigma_B), sigma_B, real)
        told_apart = losses.discriminator(real_logit_B, fake_logit_B)
        return value + config.gan.critic_weight * told_apart, {**values, "discriminator": told_apart.item()}

    def student_loss(number: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = conditions(number)
        y_BCTHW = rollout(batch, generator)
        sigma_B, noise = score_sigmas(batch, generator), batch.noise(generator)
        beta_1_B, beta_2_B = (
            batch.share.rows(uniform(ends, batch.whole, generator))
            for ends in (config.scores.beta_1, config.scores.beta_2)
        )
        x_BCTHW = noised(y_BCTHW.detach(), noise, sigma_B)
        with torch.no_grad():
            real_v = scores.real(x_BCTHW, sigma_B, batch, beta_1_B, beta_2_B)
            fake_v = scores.fake(x_BCTHW, sigma_B, batch)
        real, fake = (losses.clean(x_BCTHW, sigma_B, v) for v in (real_v, fake_v))
        made, real, fake = batch.made(y_BCTHW, real, fake)
        gradient = losses.matching_gradient(made.detach(), real, fake)
        if config.truth_weight > 0:
            (x0,) = batch.made(batch.x0_BCTHW)
            gradient = gradient + config.truth_weight * losses.matching_gradient(made.detach(), x0, fake)
        value = losses.distribution_matching(made, gradient)
        values = {
            "gradient": gradient.abs().mean().item(),
            "score_gap": batch.made(real_v - fake_v)[0].square().mean().item(),
            "beta_1": beta_1_B.mean().item(),
            "beta_2": beta_2_B.mean().item(),
        }
        if gan:
            _, logit_B = critic(given, noised(y_BCTHW, noise, sigma_B), sigma_B, batch)
            deceived = losses.deceive(logit_B)
            value = value + config.gan.student_weight * deceived
            values["deceive"] = deceived.item()
        return value, values

    def sample(path: Path) -> dict[str, float]:
        return watched.look(student, path)

    rival = Rival("critic", critic, critic_loss, config.critic, config.critic.updates)
    fit(
        run, "matching", student, student_loss, config.fit, sample, rivals=[rival],
        alarm=lambda values: watch.alarm(values, config.limits), patience=config.limits.patience,
    )  # fmt: skip
    return student.eval().requires_grad_(False)


def _spread(run: Run, given: Given, pruned: Collection[int], student: Any, base: Any, critic: Critic) -> None:
    """Give the networks of this stage their parts of what stage II left."""
    left, whole = distributed.Stored.of_file(run.folder / pruning.LEFT), given.empty_teacher()
    of = whole if given.config.experts == "both" else given.backbone.one_expert(whole, given.config.experts)
    kept = {id(block) for i, block in enumerate(given.backbone.blocks(whole)) if i not in pruned}
    blocks = [block for block in given.backbone.blocks(of) if id(block) in kept]
    names = distributed.names_in(student, of, list(zip(given.backbone.blocks(student), blocks, strict=True)), whole)
    given.spread(student, left.renamed(names))
    for network in {id(n): n for n in (base, critic.transformer)}.values():
        given.spread(network, left, critic.fresh if network is critic.transformer else None)
    distributed.spread_whole(run.world, critic.head, given.device)


def gaps(error_B: Tensor, sigma_B: Tensor) -> dict[str, float]:
    """How far the critic is from the student, for each quarter of the noise levels that the batch has one of.

    `gap_s0` is of the least noise. What it has not learned yet misleads the student at just those levels.
    """
    quarter_B = (sigma_B * 4).long().clamp(max=3).tolist()
    errors: dict[int, list[float]] = defaultdict(list)
    for quarter, error in zip(quarter_B, error_B.tolist(), strict=True):
        errors[quarter].append(error)
    return {f"gap_s{quarter}": sum(found) / len(found) for quarter, found in sorted(errors.items())}


def uniform(ends: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """``[count]``, one draw for each clip; the same number where both ends are it."""
    low, high = ends
    return low + (high - low) * torch.rand(count, generator=generator)


class Rollout:
    """The student's own clips: it samples up to a step drawn for the batch and gives its clean estimate there.

    Only that last call has a gradient (Self-Forcing, Huang et al. 2025). The steps before it are those of DMD2's
    backward simulation (each clean estimate noised anew) or the deployed Euler steps; ``data`` starts from noised real
    latents instead (the figure of W2SVD).
    """

    def __init__(self, given: Given, student: Any, sigmas: tuple[float, ...], kind: str) -> None:
        self._given = given
        self._student = student
        self._sigmas = sigmas
        self._kind = kind

    def __call__(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Clean latents ``[B, C, T, H, W]``, the given first frame in its place."""
        stop = int(torch.randint(len(self._sigmas) - 1, (), generator=generator))
        x_BCTHW = batch.noise(generator)
        if self._kind == "data":
            return self._clean(noised(batch.x0_BCTHW, x_BCTHW, self._level(stop, batch)), stop, batch)
        x_BCTHW = self._given.backbone.starting(x_BCTHW, batch.image)
        for step in range(stop):
            with torch.no_grad():
                x0_BCTHW = self._clean(x_BCTHW, step, batch)
            after_B = self._level(step + 1, batch)
            if self._kind == "renoise":
                x_BCTHW = noised(x0_BCTHW, batch.noise(generator), after_B)
            else:  # x + (s' - s) v, with v = (x - x_0) / s
                x_BCTHW = x0_BCTHW + (x_BCTHW - x0_BCTHW) * (self._sigmas[step + 1] / self._sigmas[step])
        return self._clean(x_BCTHW, stop, batch)

    def _level(self, step: int, batch: Batch) -> Tensor:
        return torch.full((len(batch),), self._sigmas[step], device=batch.device)

    def _clean(self, x_BCTHW: Tensor, step: int, batch: Batch) -> Tensor:
        sigma_B = self._level(step, batch)
        velocity = self._given.velocity(self._student, x_BCTHW, sigma_B, batch)
        x0_BCTHW = losses.clean(x_BCTHW, sigma_B, velocity)
        return self._given.backbone.with_given(x0_BCTHW, batch.image)


def add_adapter(backbone: Backbone, network: Any, rank: int) -> None:
    """A LoRA on every linear layer within the blocks, of a strength of 1; in place."""
    within = {id(layer) for layer in backbone.blocks(network).modules() if isinstance(layer, nn.Linear)}
    for model in backbone.networks(network).values():
        targets = [name for name, layer in model.named_modules() if id(layer) in within]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), ADAPTER)


class Critic(nn.Module):
    """The fake score, a LoRA on the base (one copy of the weights serves both) or a copy, and a discriminator."""

    def __init__(
        self, backbone: Backbone, base: Any, config: CriticConfig, pruned: Collection[int], tokens: str = "last"
    ) -> None:
        super().__init__()
        self._backbone = backbone
        self.head = heads.token_head(backbone.width(base))
        self.fresh: dict[str, Tensor] = {}
        """The adapters' weights to begin with, by their names in ``transformer``."""
        self.lora = config.kind == "lora"
        self._skipped = pruned if config.pruned else ()
        base.requires_grad_(False)
        if self.lora:
            add_adapter(backbone, base, config.rank)
            self.transformer = base
        else:
            self.transformer = copy.deepcopy(base).train().requires_grad_(True)
        depth = len(backbone.blocks(base)) - len(self._skipped)
        self._read = -1 if tokens == "last" else depth // len(backbone.groups(base)) // 2 - 1
        if base.device.type != "meta":
            self.head.to(base.device)

    def begin(self, run: Run) -> None:
        """Draw the adapters' weights, as PEFT does, but each by its name: however the network lies in parts, they are
        the same."""
        for name, parameter in self.transformer.named_parameters():
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=run.generator(f"critic/{name}", 0))
                self.fresh[name] = (2 * drawn - 1) * bound
            elif ".lora_B." in name:
                self.fresh[name] = torch.zeros(parameter.shape)
            if name in self.fresh and parameter.device.type != "meta":
                parameter.data.copy_(self.fresh[name])

    def forward(self, given: Given, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Velocity, and one logit for each clip: does it look real?"""
        with (
            self._backbone.skipping(self.transformer, self._skipped),
            self._backbone.tokens_after(self.transformer, (self._read,)) as seen,
        ):
            velocity = given.velocity(self.transformer, x_BCTHW, sigma_B, batch)
        tokens_BND = seen[0].float()
        # Tokens of given frames are the condition.
        later = tokens_BND.shape[1] // x_BCTHW.shape[2] * self._backbone.GIVEN_FRAMES
        logit_B = self.head(tokens_BND[:, later:]).mean(dim=(1, 2))
        if isinstance(next(self.transformer.parameters()), DTensor):
            # The way back has to begin at the network's output: it gathers what the network has beside its blocks.
            logit_B = logit_B + 0 * velocity.mean()
        return velocity, logit_B

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Within it the base runs with so much of the LoRA; 0 is the base alone."""
        if not self.lora:
            yield
            return
        models = self._backbone.networks(self.transformer).values()
        for model in models:
            if scale == 0:
                model.disable_adapters()
            else:
                model.set_adapters(ADAPTER, scale)
        try:
            yield
        finally:
            for model in models:
                model.enable_adapters()
                model.set_adapters(ADAPTER, 1.0)


class Scores:
    """Velocities of the guided teacher and of the student's own distribution."""

    def __init__(self, given: Given, base: Any, critic: Critic, pruned: Collection[int], config: ScoresConfig) -> None:
        self._given = given
        self._base = base
        self._critic = critic
        self._pruned = pruned
        self._config = config
        # beta_1 in extra units (0 is no guidance), beta_2 from full depth.
        self._text_offset = -1.0 if config.cfg_unit == "standard" else 0.0
        self._intra_offset = -1.0 if config.intra_mode == "interpolate" else 0.0

    def real(self, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch, beta_1_B: Tensor, beta_2_B: Tensor) -> Tensor:
        """R = A + beta_1 (A - N) + beta_2 (A - P); see ``losses.guided``."""
        text_B = (beta_1_B + self._text_offset).to(x_BCTHW)
        intra_B = (beta_2_B + self._intra_offset).to(x_BCTHW)

        def velocity(mask: Collection[int], text: Conditions, network: Any = self._base) -> Tensor:
            with self._given.backbone.skipping(network, mask):
                return self._given.velocity(network, x_BCTHW, sigma_B, batch, text)

        def source(text: Conditions) -> Tensor:
            if self._config.source == "teacher":
                return velocity([], text, self._given.teacher)
            if self._config.source == "pruned":
                return velocity(self._pruned, text)
            full = velocity([], text)
            if self._config.source == "full":
                return full
            return (full + velocity(self._pruned, text)) / 2

        with self._critic.scaled(self._config.alpha_weak):
            full, uncond = source(batch.text), source(batch.empty)
            pruned = velocity(self._pruned, batch.text) if self._pruned and intra_B.any() else None
        return losses.guided(full, uncond, pruned, text_B, intra_B)

    def fake(self, x_BCTHW: Tensor, sigma_B: Tensor, batch: Batch) -> Tensor:
        """The critic's velocity, with the caption and without guidance."""
        return self._critic(self._given, x_BCTHW, sigma_B, batch)[0]
