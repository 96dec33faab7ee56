"""The three stages hold to the maths: what must be equal, zero or unchanged is, on tiny real networks."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from distill import losses, schedule
from distill.backbones import wan
from distill.config import ConfigError, StudentConfig
from distill.loop import Run
from distill.stages import importance, matching, pruning, watch
from distill.stages.given import noised
from tests.distill import tiny

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
PRUNED = [1, 3]


@pytest.fixture
def noisy(batch):
    generator = torch.Generator().manual_seed(1)
    sigma_B = torch.tensor([0.9, 0.5, 0.2])
    noise = batch.noise(generator)
    return noised(batch.x0_BCTHW, noise, sigma_B), sigma_B, noise


def found(pruned: list[int], unimportant: list[int]) -> importance.Importance:
    return importance.Importance(
        weighting="elbo", drop=[0.0] * tiny.NUM_LAYERS, standard_error=[0.0] * tiny.NUM_LAYERS, error=0.0,
        order=list(range(tiny.NUM_LAYERS)), pruned=pruned, unimportant=unimportant,
        block_parameters=[1] * tiny.NUM_LAYERS, block_ratio=0.6, ratio=0.7, rank_correlation={},
    )  # fmt: skip


def few_step_scheduler(given):
    few = given.config.student
    return schedule.few_step_scheduler(given.backbone, few)


def few_steps(given) -> tuple[float, ...]:
    return tuple(few_step_scheduler(given).sigmas.tolist())


def scores_of(given, base, critic, pruned, **changes):
    config = given.config.matching.scores.model_copy(update=changes)
    return matching.Scores(given, base, critic, pruned, config)


@pytest.fixture
def base(given):
    return copy.deepcopy(given.teacher)


@pytest.fixture
def critic(given, base):
    """A critic that has been trained: its LoRA is not zero."""
    made = matching.Critic(given.backbone, base, given.config.matching.critic, PRUNED)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return made


# --- depth ----------------------------------------------------------------------------------------------------------


def test_skipping_blocks_equals_removing_them_bit_for_bit(given, batch, noisy):
    x, sigma_B, _ = noisy
    smaller = wan.without_blocks(given.teacher, PRUNED)
    assert smaller.config.num_layers == tiny.NUM_LAYERS - 2
    with wan.skipping(given.teacher, PRUNED), torch.no_grad():
        skipped = given.velocity(given.teacher, x, sigma_B, batch)
    with torch.no_grad():
        removed = given.velocity(smaller, x, sigma_B, batch)
        whole = given.velocity(given.teacher, x, sigma_B, batch)
    assert torch.equal(skipped, removed)
    assert not torch.allclose(skipped, whole, atol=1e-3)  # the blocks do something, and they are back


def test_gradients_reach_the_blocks_that_are_run_and_no_other(given, batch, noisy):
    x, sigma_B, _ = noisy
    transformer = copy.deepcopy(given.teacher).requires_grad_(True)
    with wan.skipping(transformer, PRUNED):
        given.velocity(transformer, x, sigma_B, batch).square().mean().backward()
    reached = [all(p.grad is not None for p in block.parameters()) for block in transformer.blocks]
    assert reached == [i not in PRUNED for i in range(tiny.NUM_LAYERS)]


# --- stage I --------------------------------------------------------------------------------------------------------


def test_a_block_that_does_nothing_costs_nothing(given, run, monkeypatch):
    silent = copy.deepcopy(given.teacher)
    with torch.no_grad():
        # The residual branches of a block end in these layers; attention and feed-forward are gated besides.
        for layer in (silent.blocks[2].attn1.to_out[0], silent.blocks[2].attn2.to_out[0], silent.blocks[2].ffn.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    monkeypatch.setattr(given, "teacher", silent)
    result = importance.run(run, given, given.config.importance, unimportant=1.5)
    assert result.drop[2] == 0
    assert result.standard_error[2] == 0
    assert all(drop != 0 for block, drop in enumerate(result.drop) if block != 2)
    assert result.order == sorted(range(tiny.NUM_LAYERS), key=result.drop.__getitem__)
    assert result.rank_correlation["elbo"] == pytest.approx(1)
    assert json.loads((run.folder / "importance.json").read_text())["pruned"] == result.pruned
    assert (run.folder / "importance.png").stat().st_size > 5000
    # The second time it is read, not measured.
    monkeypatch.setattr(importance, "_errors", None)
    assert importance.run(run, given, given.config.importance, unimportant=1.5) == result


def test_the_budget_counts_block_parameters():
    order = [4, 1, 3, 0, 2]
    assert importance.smallest_prefix(order, [10] * 5, 0.3) == [4, 1]
    assert importance.smallest_prefix(order, [10] * 5, 0.4) == [4, 1]  # exactly two fifths
    assert importance.smallest_prefix(order, [10, 10, 10, 10, 60], 0.3) == [4]
    assert importance.smallest_prefix([], [10] * 5, 0.3) == []
    # The bundled teacher's ten equal blocks: three.
    assert len(importance.smallest_prefix(list(range(10)), [600_000] * 10, 0.3)) == 3


def test_greedy_order_measures_again_after_each_removal(given, run):
    config = given.config.importance.model_copy(update={"greedy": True})
    single = importance.run(run, given, given.config.importance, unimportant=1.5)
    (run.folder / "importance.json").unlink()
    greedy = importance.run(run, given, config, unimportant=1.5)
    assert greedy.order[0] == single.order[0]
    assert sorted(greedy.order) == list(range(tiny.NUM_LAYERS))
    errors, sigmas = importance._errors(
        run, given, config, [(greedy.order[0], block) for block in range(tiny.NUM_LAYERS) if block != greedy.order[0]]
    )
    costs = importance._weighted(errors, sigmas, given.config.shift, "elbo").mean(-1)
    left = [block for block in range(tiny.NUM_LAYERS) if block != greedy.order[0]]
    assert greedy.order[1] == left[int(costs.argmin())]


def test_a_budget_that_leaves_no_block_is_one_clear_error(given, run):
    config = given.config.importance.model_copy(update={"rho": 0.9})
    with pytest.raises(ConfigError, match=r"lets stage II skip 7 of 5 blocks; at least one has to stay"):
        importance.run(run, given, config, unimportant=1.5)


def test_weights_of_the_error_are_those_of_the_bound():
    sigma = torch.linspace(0.02, 0.98, 200_001, dtype=torch.float64)
    density = 5 / (5 - 4 * sigma).square()
    # The mean over shifted levels of the weights is the integral of (1 - s) / s.
    wanted = torch.trapezoid((1 - sigma) / sigma, sigma)
    got = torch.trapezoid(losses.error_weight(sigma, 5.0, "elbo") * density, sigma)
    assert got == pytest.approx(wanted.item(), rel=1e-6)
    assert losses.error_weight(sigma, 5.0, "x0").equal(sigma.square())


# --- stage II -------------------------------------------------------------------------------------------------------


def test_with_an_empty_mask_the_loss_of_stage_two_is_zero(given, batch, noisy):
    _, sigma_B, noise = noisy
    config = given.config.pruning.model_copy(update={"target": "self"})
    arguments = given, given.teacher, batch, noise, sigma_B
    assert pruning.depth_loss(*arguments, frozenset(), config).item() == 0
    assert pruning.depth_loss(*arguments, frozenset(PRUNED), config).item() > 0


def test_alpha_mixes_the_unpruned_output_with_the_data():
    generator = torch.Generator().manual_seed(0)
    pruned, unpruned, x0, noise = torch.randn(4, 2, 3, 5, 4, 4, generator=generator)
    apart = (pruned - unpruned).square().mean()
    truth = (pruned - (noise - x0)).square().mean()
    for alpha in (0.0, 0.5, 1.0):
        got = losses.depth_matching(pruned, unpruned, x0, noise, alpha)
        assert got.item() == pytest.approx((alpha * apart + (1 - alpha) * truth).item(), rel=1e-6)


def test_masks_are_drawn_as_configured(given):
    config = given.config.pruning.model_copy(update={"deployed_probability": 0.25, "skip_probability": 0.5})
    which = found(pruned=[0, 1], unimportant=[0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    masks = [pruning.draw_mask(which, config, generator) for _ in range(4000)]
    assert all(mask <= {0, 1, 2} for mask in masks)
    share = sum(mask == {0, 1} for mask in masks) / 4000
    assert share == pytest.approx(0.25 + 0.75 / 8, abs=0.03)
    assert sum(2 in mask for mask in masks) / 4000 == pytest.approx(0.75 / 2, abs=0.03)
    literal = config.model_copy(update={"deployed_probability": 0.0})
    assert len({pruning.draw_mask(which, literal, generator) for _ in range(400)}) == 8


def test_the_untrained_full_path_has_not_drifted_and_the_pruned_one_differs(given, run):
    values = pruning.drift(run, given, copy.deepcopy(given.teacher), PRUNED)
    assert values["drift_full"] == 0
    assert values["dev_loss_full"] == values["dev_loss_teacher"]
    assert values["drift_pruned"] > 0


# --- stage III: the scores ------------------------------------------------------------------------------------------


def test_without_pruning_and_beta_2_the_gradient_is_that_of_dmd2(given, batch, noisy, base, critic):
    """Against DMD2's own formula, written out: x - s v, classifier-free guidance, difference over mean distance."""
    x, sigma_B, _ = noisy
    beta_1 = torch.tensor([3.5, 0.5, 0.0])
    with torch.no_grad():
        ours = scores_of(given, base, critic, []).real(x, sigma_B, batch, beta_1, torch.zeros(3))
        with critic.scaled(0):
            cond = given.velocity(base, x, sigma_B, batch)
            uncond = given.velocity(base, x, sigma_B, batch, batch.empty)
        fake = given.velocity(base, x, sigma_B, batch)
    scale = beta_1[:, None, None, None, None]
    theirs = cond + scale * (cond - uncond)
    y = batch.x0_BCTHW[:, :, 1:]
    x0_real, x0_fake = ((x - sigma_B[:, None, None, None, None] * v)[:, :, 1:] for v in (theirs, fake))
    wanted = (x0_fake - x0_real) / (y - x0_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    clean = [losses.clean(x, sigma_B, v) for v in (ours, fake)]
    got = losses.matching_gradient(*batch.made(batch.x0_BCTHW, *clean))
    assert torch.equal(got, wanted)
    assert wanted.abs().max() > 0


def test_an_empty_mask_kills_the_intra_term(given, batch, noisy, base, critic):
    x, sigma_B, _ = noisy
    beta_1 = torch.ones(3)
    with torch.no_grad():
        for pruned, equal in (([], True), (PRUNED, False)):
            scores = scores_of(given, base, critic, pruned)
            none = scores.real(x, sigma_B, batch, beta_1, torch.zeros(3))
            much = scores.real(x, sigma_B, batch, beta_1, torch.full((3,), 0.75))
            assert torch.equal(none, much) == equal


def test_interpolation_is_extrapolation_one_less(given, batch, noisy, base, critic):
    x, sigma_B, _ = noisy
    beta_1, beta_2 = torch.full((3,), 2.0), torch.full((3,), 0.25)
    with torch.no_grad():
        between = scores_of(given, base, critic, PRUNED, intra_mode="interpolate")
        beyond = scores_of(given, base, critic, PRUNED, intra_mode="extrapolate")
        assert torch.equal(
            between.real(x, sigma_B, batch, beta_1, beta_2), beyond.real(x, sigma_B, batch, beta_1, beta_2 - 1)
        )
        # At beta_2 = 0 and without text guidance it is the pruned network itself.
        alone = between.real(x, sigma_B, batch, torch.zeros(3), torch.zeros(3))
        with critic.scaled(0), wan.skipping(base, PRUNED):
            pruned = given.velocity(base, x, sigma_B, batch)
    assert torch.allclose(alone, pruned, atol=1e-5)


def test_units_of_guidance(given, batch, noisy, base, critic):
    x, sigma_B, _ = noisy
    with torch.no_grad():
        extra = scores_of(given, base, critic, [], cfg_unit="extra")
        standard = scores_of(given, base, critic, [], cfg_unit="standard")
        one = extra.real(x, sigma_B, batch, torch.full((3,), 3.5), torch.zeros(3))
        other = standard.real(x, sigma_B, batch, torch.full((3,), 4.5), torch.zeros(3))
    assert torch.equal(one, other)


@pytest.mark.parametrize("source", ["full", "teacher", "pruned", "interpolated"])
def test_sources_of_the_real_score(given, batch, noisy, base, critic, source):
    x, sigma_B, _ = noisy
    with torch.no_grad():
        scores = scores_of(given, base, critic, PRUNED, source=source)
        got = scores.real(x, sigma_B, batch, torch.zeros(3), torch.zeros(3))
        full = given.velocity(given.teacher, x, sigma_B, batch)
        with wan.skipping(given.teacher, PRUNED):
            pruned = given.velocity(given.teacher, x, sigma_B, batch)
    wanted = {"full": full, "teacher": full, "pruned": pruned, "interpolated": (full + pruned) / 2}[source]
    assert torch.allclose(got, wanted, atol=1e-6)


# --- stage III: the critic ------------------------------------------------------------------------------------------


def test_without_its_lora_the_fake_score_is_the_real_one(given, batch, noisy, base, critic):
    x, sigma_B, _ = noisy
    with torch.no_grad():
        plain = given.velocity(given.teacher, x, sigma_B, batch)
        fake, _ = critic(given, x, sigma_B, batch)
        with critic.scaled(0):
            off = given.velocity(base, x, sigma_B, batch)
        again, _ = critic(given, x, sigma_B, batch)
    assert torch.equal(off, plain)
    assert not torch.allclose(fake, plain, atol=1e-3)
    assert torch.equal(fake, again)  # switched on again
    # Before it has learnt anything the LoRA changes nothing.
    new = matching.Critic(given.backbone, copy.deepcopy(given.teacher), given.config.matching.critic, PRUNED)
    with torch.no_grad():
        assert torch.equal(new(given, x, sigma_B, batch)[0], plain)


def test_limits_of_the_weak_share(given, batch, noisy, base, critic):
    """W2SVD: with all of the LoRA in the real score the unguided gradient is zero; with none it is DMD2's."""
    x, sigma_B, _ = noisy
    zeros = torch.zeros(3)

    def gradient(alpha_weak):
        scores = scores_of(given, base, critic, [], alpha_weak=alpha_weak)
        with torch.no_grad():
            real, fake = scores.real(x, sigma_B, batch, zeros, zeros), scores.fake(x, sigma_B, batch)
        clean = [losses.clean(x, sigma_B, v) for v in (real, fake)]
        return losses.matching_gradient(*batch.made(batch.x0_BCTHW, *clean)).abs().max().item()

    with torch.no_grad():
        none = scores_of(given, base, critic, [], alpha_weak=0.0).real(x, sigma_B, batch, zeros, zeros)
        assert torch.equal(none, given.velocity(given.teacher, x, sigma_B, batch))
    assert gradient(1.0) == 0
    assert 0 < gradient(0.25) < gradient(0.0)


def test_base_and_fake_share_one_copy_and_only_the_critic_is_trained(given, base, critic):
    assert critic.transformer is base
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    adapted = {name.split(".lora_A")[0] for name in trained if ".lora_A" in name}
    layers = {f"transformer.{n}" for n, m in given.teacher.named_modules()
              if isinstance(m, nn.Linear) and n.startswith("blocks.")}  # fmt: skip
    assert adapted == layers


def test_a_full_critic_is_a_copy_and_leaves_the_base_alone(given, base):
    config = given.config.matching.critic.model_copy(update={"kind": "full"})
    critic = matching.Critic(given.backbone, base, config, PRUNED)
    assert critic.transformer is not base
    assert all(p.requires_grad for p in critic.transformer.parameters())
    assert not any(p.requires_grad for p in base.parameters())


# --- stage III: the student -----------------------------------------------------------------------------------------


def test_the_derivative_of_the_loss_is_the_gradient_over_the_number_of_elements():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, 5, 4, 4, generator=generator).requires_grad_(True)
    real, fake = torch.randn(2, 2, 3, 5, 4, 4, generator=generator)
    gradient = losses.matching_gradient(y.detach(), real, fake)
    losses.distribution_matching(y, gradient).backward()
    assert torch.allclose(y.grad, gradient / y.numel(), atol=1e-9)


def test_given_frames_are_in_no_loss_of_stage_three(batch):
    y = batch.x0_BCTHW.clone().requires_grad_(True)
    real, fake = torch.randn(2, *y.shape)
    made, real, fake = batch.made(y, real, fake)
    losses.distribution_matching(made, losses.matching_gradient(made.detach(), real, fake)).backward()
    assert y.grad[:, :, 0].abs().max() == 0
    assert y.grad[:, :, 1:].abs().min() > 0


def test_the_clean_estimate_is_the_identity_without_noise():
    x, velocity = torch.randn(2, 2, 3, 5, 4, 4)
    assert torch.equal(losses.clean(x, torch.zeros(2), velocity), x)
    noise = torch.randn_like(x)
    sigma_B = torch.tensor([0.3, 0.9])
    assert torch.allclose(losses.clean(noised(x, noise, sigma_B), sigma_B, noise - x), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["renoise", "euler", "data"])
def test_rollouts_keep_the_first_frame_and_carry_one_gradient(given, batch, kind):
    student = wan.without_blocks(given.teacher, PRUNED).requires_grad_(True)
    sigmas = few_steps(given)
    calls: list[tuple[float, bool]] = []
    velocity = given.velocity

    def counting(transformer, x, sigma_B, batch, text=None):
        calls.append((round(sigma_B[0].item(), 3), torch.is_grad_enabled()))
        return velocity(transformer, x, sigma_B, batch, text)

    rollout = matching.Rollout(given, student, sigmas, kind)
    levels = [round(sigma, 3) for sigma in sigmas[:-1]]
    seen = set()
    try:
        given.velocity = counting
        for seed in range(12):
            calls.clear()
            y = rollout(batch, torch.Generator().manual_seed(seed))
            assert torch.equal(y[:, :, 0], batch.x0_BCTHW[:, :, 0])
            assert y.requires_grad
            assert [grad for _, grad in calls] == [False] * (len(calls) - 1) + [True]
            visited = [level for level, _ in calls]
            assert visited == ([visited[-1]] if kind == "data" else levels[: len(visited)])
            seen.add(visited[-1])
    finally:
        del given.velocity
    assert seen == set(levels)


def test_euler_rollout_is_the_deployed_sampler(given, batch):
    """Stopped at the last step it gives what the student will give from the same noise."""
    student = wan.without_blocks(given.teacher, PRUNED)
    sigmas = few_steps(given)
    rollout = matching.Rollout(given, student, sigmas, "euler")
    seed = next(
        s for s in range(100) if torch.randint(4, (), generator=torch.Generator().manual_seed(s)).item() == 3
    )  # fmt: skip
    with torch.no_grad():
        y = rollout(batch, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    torch.randint(4, (), generator=generator)
    x = batch.noise(generator)
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas):
            x = x + (after - sigma) * given.velocity(student, x, torch.full((3,), sigma), batch)
    assert torch.allclose(y[:, :, 1:], x[:, :, 1:], atol=1e-4)


def test_the_scheduler_visits_the_levels_of_the_paper_s_lineage():
    few = StudentConfig(num_inference_steps=4, shift=2.5, shift_terminal=0.625)
    scheduler = schedule.few_step_scheduler(wan, few)
    assert schedule.visited(wan, scheduler, 4) == pytest.approx((1.0, 0.9375, 0.8333, 0.625), abs=4e-4)


# --- what is watched ------------------------------------------------------------------------------------------------


@pytest.fixture
def limits(given):
    ends = {"motion": (0.7, 1.4), "contrast": (0.7, 1.3), "saturation": (0.8, 1.25), "flicker": (0.5, 1.6)}
    return given.config.matching.limits.model_copy(update={**ends, "critic": 1.0})


def test_broken_students_set_off_their_alarms(limits):
    from distill.data import shapes

    video = shapes.clips(0, shapes.SPLITS["dev"][:16]).video_BCTHW
    first = video[:, :, :1].expand_as(video)
    grey = video.mean(dim=1, keepdim=True).expand_as(video)
    broken = {
        "the videos stand still": first,
        "of a flat colour": video.mean(dim=(3, 4), keepdim=True) + 0 * video,
        "motion is exaggerated": first + 2 * (video - first),
        "over-saturated": grey + 1.5 * (video - grey),
        "washed out": grey + 0.5 * (video - grey),
        "flicker": video + 0.2 * torch.tensor([1.0, -1.0] * 9)[: video.shape[2], None, None],
    }
    assert watch.alarm(watch.compare(video, video), limits) is None
    for what, made in broken.items():
        wrong = watch.alarm(watch.compare(made, video), limits)
        assert wrong is not None, what
        assert what in wrong
    fine = watch.compare(video, video)
    assert "critic diverges" in watch.alarm({**fine, "critic_loss": 3.0}, limits)


# --- golden curves --------------------------------------------------------------------------------------------------


def curve(name: str, losses_seen: list[float]) -> None:
    """Within 1 % of what is on record; a deliberate change renews the file: delete it and run the test."""
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([round(value, 6) for value in losses_seen]) + "\n")
        pytest.fail(f"{path} was missing and has been written; look at it and commit it")
    assert losses_seen == pytest.approx(json.loads(path.read_text()), rel=0.01)


@pytest.mark.usefixtures("single_thread")
def test_twenty_steps_follow_the_golden_curves(given, tmp_path):
    fit = {"steps": 20, "log_every": 1, "checkpoint_every": 20, "sample_every": 20}
    stage_two = given.config.pruning.model_copy(
        update={"fit": given.config.pruning.fit.model_copy(update={**fit, "warmup_steps": 2})}
    )
    stage_three = given.config.matching.model_copy(
        update={"fit": given.config.matching.fit.model_copy(update={**fit, "warmup_steps": 2})}
    )
    run = Run(tmp_path, seed=0)
    which = found(pruned=PRUNED, unimportant=[1, 2, 3])
    scheduler = few_step_scheduler(given)
    watched = watch.Watch(run, given, scheduler)
    with run.handling_signals():
        base = pruning.run(run, given, which, stage_two)
        matching.run(run, given, which.pruned, base, stage_three, scheduler, watched)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    gaps = {name for event in events for name in event if name.startswith("critic_gap")}
    assert gaps and gaps <= {f"critic_gap_s{quarter}" for quarter in range(4)}
    for stage, key in (("pruning", "loss"), ("matching", "loss"), ("matching", "critic_loss")):
        seen = [event[key] for event in events if event["stage"] == stage and key in event]
        assert len(seen) == 20
        curve(f"{stage}-{key}", seen)


def test_the_critics_gap_is_the_mean_of_its_errors_in_each_quarter_of_the_noise_levels():
    error_B, sigma_B = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.1, 0.2, 0.5, 1.0])
    assert matching.gaps(error_B, sigma_B) == {"gap_s0": 2.0, "gap_s2": 5.0, "gap_s3": 7.0}


def test_the_discriminator_takes_part_when_it_is_asked_for(given, tmp_path):
    base = copy.deepcopy(given.teacher)
    gan = given.config.matching.gan.model_copy(update={"student_weight": 0.1, "critic_weight": 0.1})
    config = given.config.matching.model_copy(update={"gan": gan})
    run = Run(tmp_path, seed=0)
    scheduler = few_step_scheduler(given)
    watched = watch.Watch(run, given, scheduler)
    with run.handling_signals():
        matching.run(run, given, PRUNED, base, config, scheduler, watched)
    last = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"deceive"' in line]
    assert last
    assert last[-1]["critic_discriminator"] > 0
