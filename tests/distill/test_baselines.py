"""Every method of the comparison: losses against known answers, cost as counted, two steps, resume, a folder."""

from __future__ import annotations

import copy
import json
import signal
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from safetensors.torch import load_file
from torch import nn

from distill import loop, losses, method, recipes, schedule, scores, student
from distill import run as run_module
from distill.backbones import wan
from distill.baselines import base, dmd2, f3, fastlightgen, icmd, lcm, magic
from distill.config import ConfigError, FitConfig, MethodConfig
from distill.data import shapes
from distill.loop import Run, fit
from distill.stages import heads, importance, matching, pruning
from distill.stages.given import noised
from tests.distill import tiny
from tests.distill.conftest import one_thread

PRUNED = (1, 3)
STEPS = ["matching.fit.steps=2", "matching.fit.batch=2", "pruning.fit.steps=2", "matching.critic.updates=1"]


@pytest.fixture
def recipe(tiny_config):
    return tiny_config


class Unwatched:
    """Nothing is looked at: looks are no part of what is tested, or counted."""

    def look(self, _transformer, _sheet):
        return dict.fromkeys(("motion", "contrast", "saturation", "flicker"), 1.0)

    @property
    def teachers(self):
        return torch.empty(0)


def start_of(given, pruned=()):
    few = given.config.student
    scheduler = schedule.few_step_scheduler(wan, few)
    return base.Start(base.copy_of(given, given.teacher), tuple(pruned), scheduler, Unwatched())


# --- LCM ------------------------------------------------------------------------------------------------------------


def test_on_the_exact_path_of_a_clip_the_consistency_loss_is_zero(given, batch, recipe, monkeypatch):
    """There every point has the velocity e - x_0, and every clean estimate is x_0."""
    own = lcm.settings(recipe).own
    noise = batch.noise(torch.Generator().manual_seed(3))
    exact, wrong = noise - batch.x0_BCTHW, torch.randn_like(noise)
    places = torch.tensor([1, 20, 50])  # the first one's target stands at level 0
    off = {"student": 0.0}
    asked = []

    def velocity(transformer, x, sigma_B, _batch, text=None):
        asked.append((transformer, x, sigma_B, text))
        return exact + off.get(transformer, 0.0) * wrong

    monkeypatch.setattr(given, "velocity", velocity)
    assert lcm.consistency(given, "student", "target", batch, noise, places, own).item() < 1e-6
    off["student"] = 0.1
    sigma_B = schedule.shift(places / own.solver_steps, 5.0)
    apart = 0.1 * wrong * sigma_B[:, None, None, None, None]
    wanted = ((apart[:, :, 1:].square() + own.huber**2).sqrt() - own.huber).mean()
    got = lcm.consistency(given, "student", "target", batch, noise, places, own)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-3)
    # The target is asked one solver step below the student.
    below = next(sigma for who, _, sigma, _ in asked if who == "target")
    assert torch.allclose(below, schedule.shift((places - 1) / own.solver_steps, 5.0))


def test_the_solver_s_step_is_guided(given, batch, recipe, monkeypatch):
    own = lcm.settings(recipe).own.model_copy(update={"guidance_scale": 3.0})
    noise = batch.noise(torch.Generator().manual_seed(3))
    with_caption, without = torch.randn(2, *noise.shape)
    seen = {}

    def velocity(transformer, x, _sigma_B, _batch, text=None):
        if transformer == "target":
            seen["x"] = x
        return without if text is batch.empty else with_caption

    monkeypatch.setattr(given, "velocity", velocity)
    places = torch.tensor([10, 30, 50])
    lcm.consistency(given, "student", "target", batch, noise, places, own)
    sigma_B, after_B = (schedule.shift(p / own.solver_steps, 5.0) for p in (places, places - 1))
    x = noised(batch.x0_BCTHW, noise, sigma_B)
    guided = without + 3 * (with_caption - without)
    assert torch.allclose(seen["x"], x + losses.over_clips(after_B - sigma_B) * guided, atol=1e-5)


def test_only_the_student_has_a_gradient(given, batch, recipe):
    model = wan.without_blocks(given.teacher, PRUNED).requires_grad_(True)
    target = copy.deepcopy(model)
    own = lcm.settings(recipe).own
    noise = batch.noise(torch.Generator().manual_seed(3))
    lcm.consistency(given, model, target, batch, noise, torch.tensor([9, 20, 50]), own).backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("stopped_at", [None, 3])
def test_the_shadow_has_the_averaged_weights_throughout(tmp_path, stopped_at):
    config = FitConfig(
        optimiser="adamw", learning_rate=0.1, warmup_steps=0, betas=(0.9, 0.99), weight_decay=0.0, clip_norm=1.0,
        ema_decay=0.5, steps=6, batch=1, log_every=1, checkpoint_every=1, sample_every=6,
    )  # fmt: skip
    seen, wanted = [], []

    def once():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        shadow = copy.deepcopy(model).requires_grad_(False)
        run = Run(tmp_path, seed=0)

        def loss(number, _generator):
            if number == 0:
                wanted.append(model.weight.detach().clone())
            else:
                decay = min(0.5, number / (9 + number))
                wanted.append(torch.lerp(wanted[-1], model.weight.detach(), 1 - decay))
            seen.append(shadow.weight.detach().clone())
            if number == stopped_at and len(seen) == number + 1:
                signal.raise_signal(signal.SIGTERM)
            return model(torch.tensor([1.0, 2.0])).square().sum(), {}

        with run.handling_signals():
            fit(run, "shadowed", model, loss, config, lambda _path: {}, shadow=shadow)

    if stopped_at is not None:
        with pytest.raises(loop.Interrupted):
            once()
    once()
    assert len(seen) == 6
    assert all(torch.allclose(*pair) for pair in zip(seen, wanted, strict=True))
    assert not torch.allclose(seen[0], seen[-1])


# --- distribution matching ------------------------------------------------------------------------------------------


def test_the_wiring_of_the_methods_that_match_distributions(recipe):
    of_dmd2, of_magic = (m.settings(recipe).recipe.matching for m in (dmd2, magic))
    for made in (of_dmd2, of_magic):
        assert made.scores.beta_2 == (0, 0)
        assert made.scores.beta_1 == (1.0, 1.0)  # the middle of the recipe's [.5, 1.5]
        assert made.gan.student_weight > 0
        assert not base.has_gap(MethodConfig(method="dmd2", weights="pruned", recipe=recipe))
    assert (of_dmd2.critic.kind, of_dmd2.scores.alpha_weak, of_dmd2.rollout) == ("full", 0, "renoise")
    assert (of_magic.critic.kind, of_magic.scores.alpha_weak, of_magic.rollout) == ("lora", 0.25, "data")
    assert (of_dmd2.gan.tokens, of_magic.gan.tokens, of_magic.truth_weight) == ("last", "middle", 0)
    assert fastlightgen.settings(recipe).recipe == recipe


def test_drawn_to_the_real_clip_where_the_scores_agree_that_is_all_of_the_gradient(given, run):
    """Before the critic has learned anything and without guidance Q = R, and (Q - x_0) / mean |y - x_0| is left."""
    of = given.config.matching
    of = of.model_copy(
        update={
            "rollout": "data",
            "scores": of.scores.model_copy(update={"beta_1": (0.0, 0.0), "beta_2": (0.0, 0.0)}),
            "critic": of.critic.model_copy(update={"learning_rate": 1e-30}),
            "fit": of.fit.model_copy(update={"steps": 1}),
        }
    )
    found = {}
    for weight in (0.0, 1.0, 2.0):
        (run.folder / "matching.safetensors").unlink(missing_ok=True)
        config = of.model_copy(update={"truth_weight": weight})
        matching.run(run, given, (), base.copy_of(given, given.teacher), config, start_of(given).scheduler, Unwatched())
        events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
        found[weight] = [event["gradient"] for event in events if "gradient" in event][-1]
    assert found[0.0] == 0
    assert found[1.0] > 0.1
    assert found[2.0] == pytest.approx(2 * found[1.0], rel=1e-4)


def test_w2svd_s_discriminator_reads_half_the_depth(given, batch):
    transformer = base.copy_of(given, given.teacher)
    critic = matching.Critic(given.backbone, transformer, given.config.matching.critic, (), tokens="middle")
    sigma_B = torch.tensor([0.9, 0.5, 0.2])
    seen = []
    handle = transformer.blocks[tiny.NUM_LAYERS // 2 - 1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        _, logit_B = critic(given, batch.x0_BCTHW, sigma_B, batch)
        handle.remove()
        later = seen[0].shape[1] // batch.x0_BCTHW.shape[2]
        assert torch.allclose(logit_B, critic.head(seen[0][:, later:].float()).mean(dim=(1, 2)), atol=1e-6)
    last = matching.Critic(given.backbone, base.copy_of(given, given.teacher), given.config.matching.critic, ())
    last.head.load_state_dict(critic.head.state_dict())
    with torch.no_grad():
        assert not torch.allclose(last(given, batch.x0_BCTHW, sigma_B, batch)[1], logit_B, atol=1e-4)


# --- ICMD -----------------------------------------------------------------------------------------------------------


def test_feature_and_hinge_losses_have_their_known_values():
    wanted_BTND = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert losses.feature_distance(wanted_BTND, wanted_BTND) == 0
    assert losses.feature_distance(2 * wanted_BTND, wanted_BTND).item() == pytest.approx(1)
    assert losses.feature_distance(0 * wanted_BTND, 100 * wanted_BTND).item() == pytest.approx(1)
    given_frame = wanted_BTND.clone()
    given_frame[:, 0] += 5
    assert icmd.content([given_frame], [wanted_BTND], given_frames=1) == 0
    assert icmd.content([given_frame], [wanted_BTND], given_frames=0) > 0
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert losses.hinge(ones, -ones) == 0
    assert losses.hinge(2 * ones, -3 * ones) == 0  # beyond the margin nothing is gained
    assert losses.hinge(zeros, zeros) == 2
    assert losses.hinge(-ones, ones) == 4
    assert losses.deceive(zeros).item() == pytest.approx(0.6931, abs=1e-4)
    huber = losses.pseudo_huber(torch.full((1, 1, 2, 1, 1), 3.0), 4.0)
    assert huber.item() == pytest.approx(1.0)  # sqrt(9 + 16) - 4


def test_shallow_blocks_go_first_and_the_ends_stay():
    assert icmd.shallow_first([1] * 10, 0.3) == [2, 4, 6]
    assert icmd.shallow_first([1] * 10, 0.5) == [2, 3, 4, 6, 8]
    assert icmd.shallow_first([1] * 40, 0.3) == list(range(2, 26, 2))
    with pytest.raises(ConfigError, match=r"rho=0.8 wants more than 7 of 10 blocks"):
        icmd.shallow_first([1] * 10, 0.8)


def test_features_of_the_same_places_are_matched(given, batch):
    pruned = [2]
    smaller = wan.without_blocks(given.teacher, pruned)
    sides = icmd.Sides(given, smaller, pruned)
    x, sigma_B = batch.x0_BCTHW, torch.tensor([0.9, 0.5, 0.2])
    with torch.no_grad():
        velocity, made = sides.student(x, sigma_B, batch)
        wanted = sides.teacher(x, sigma_B, batch)
        assert torch.equal(velocity, given.velocity(smaller, x, sigma_B, batch))
    assert len(made) == len(wanted) == tiny.NUM_LAYERS - 1
    assert [torch.equal(*pair) for pair in zip(made, wanted, strict=True)] == [True, True, False, False]
    assert icmd.content(made[:2], wanted[:2], 1) == 0
    assert icmd.content(made, wanted, 1) > 0
    assert made[0].shape[:2] == (3, x.shape[2])


def test_the_two_heads_see_places_frames_and_the_noise_level():
    head = heads.SpaceTimeHead(8)
    tokens_BTND = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    sigma_B = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        logit_B = head(tokens_BTND, sigma_B)
        assert logit_B.shape == (2,)
        assert torch.allclose(head(tokens_BTND[:, :, torch.tensor([3, 1, 5, 0, 2, 4])], sigma_B), logit_B, atol=1e-6)
        assert not torch.allclose(head(tokens_BTND.flip(1), sigma_B), logit_B, atol=1e-4)
        assert not torch.allclose(head(tokens_BTND, sigma_B / 2), logit_B, atol=1e-4)


# --- F3-Pruning -----------------------------------------------------------------------------------------------------


def test_attention_that_does_not_tell_frames_apart_has_a_mass_of_one(given, run, recipe):
    own = f3.settings(recipe).own.model_copy(update={"clips": 2, "sigmas": 2, "queries": 16})
    transformer = base.copy_of(given, given.teacher)
    attention = transformer.blocks[2].attn1
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.zero_()
            layer.bias.zero_()
    mass = f3.masses(run, given, transformer, own)
    assert mass[2] == pytest.approx(1, abs=1e-5)
    assert all(0 < value < 2 and value != pytest.approx(1, abs=1e-5) for i, value in enumerate(mass) if i != 2)


def test_measuring_changes_nothing(given, batch):
    x, sigma_B = batch.x0_BCTHW, torch.tensor([0.9, 0.5, 0.2])
    transformer = base.copy_of(given, given.teacher)
    with torch.no_grad():
        plain = given.velocity(transformer, x, sigma_B, batch)
        with wan.attention_between_frames(transformer, x.shape[2], 4, torch.Generator()) as shares:
            measured = given.velocity(transformer, x, sigma_B, batch)
        assert torch.equal(measured, plain)
        assert torch.equal(given.velocity(transformer, x, sigma_B, batch), plain)
    assert [len(seen) for seen in shares.values()] == [1] * tiny.NUM_LAYERS


def test_limited_attention_is_that_of_each_frame_alone(given):
    transformer = base.copy_of(given, given.teacher)
    attention = transformer.blocks[1].attn1
    hidden_BND = torch.randn(2, 12, wan.width(transformer), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([attention(frame) for frame in hidden_BND.split(4, dim=1)], dim=1)
        across = attention(hidden_BND)
        with wan.within_frames(transformer, [1], num_frames=3):
            limited = attention(hidden_BND)
            elsewhere = transformer.blocks[0].attn1(hidden_BND)
        assert torch.allclose(limited, alone, atol=1e-6)
        assert not torch.allclose(limited, across, atol=1e-4)
        assert torch.equal(elsewhere, transformer.blocks[0].attn1(hidden_BND))
        assert torch.equal(attention(hidden_BND), across)  # as before


def test_silenced_self_attention_adds_nothing(given, batch):
    x, sigma_B = batch.x0_BCTHW, torch.tensor([0.9, 0.5, 0.2])
    transformer = base.copy_of(given, given.teacher)
    wan.silence_self_attention(transformer, [1, 3])
    hidden_BND = torch.randn(1, 4, wan.width(transformer))
    with torch.no_grad():
        assert transformer.blocks[1].attn1(hidden_BND).abs().max() == 0
        assert transformer.blocks[0].attn1(hidden_BND).abs().max() > 0
        made = given.velocity(transformer, x, sigma_B, batch)
        assert not torch.allclose(made, given.velocity(given.teacher, x, sigma_B, batch), atol=1e-4)


def test_what_attends_least_across_frames_goes(recipe):
    own = f3.settings(recipe).own
    mass = [0.9, 0.2, 0.8, 0.1, 0.7]
    assert own.rho == 0.4
    assert f3.chosen(mass, [1] * 5, own) == [1, 3]
    assert f3.chosen(mass, [1, 1, 1, 9, 1], own) == [3]  # by parameters
    assert f3.chosen(mass, [1, 1, 1, 9, 1], own.model_copy(update={"mode": "edges"})) == [1, 3]  # by layers


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_students_of_any_number_of_steps_visit_the_shifted_levels(steps):
    few = recipes.few_steps(steps, 5.0)
    scheduler = schedule.few_step_scheduler(wan, few)
    wanted = schedule.shift(1 - torch.arange(steps) / steps, 5.0).tolist()
    assert schedule.visited(wan, scheduler, steps) == pytest.approx(wanted, abs=2e-3)
    assert scheduler.sigmas[-1] == 0


def test_the_student_of_four_steps_is_the_recipe_s(recipe):
    few = recipes.few_steps(4, 5.0)
    assert (few.shift, few.shift_terminal) == pytest.approx((recipe.student.shift, recipe.student.shift_terminal))


# --- what it costs --------------------------------------------------------------------------------------------------


@contextmanager
def counted(monkeypatch):
    """Block passes within: 1 for a clip forward, 2 more when a gradient comes back to what it gave."""
    counts = {"passes": 0}
    forward = WanTransformerBlock.forward

    def counting(self, hidden_states, *rest):
        clips = len(hidden_states)
        counts["passes"] += clips
        given = forward(self, hidden_states, *rest)

        def counting_back(_gradient):
            counts["passes"] += 2 * clips

        if given.requires_grad:
            given.register_hook(counting_back)
        return given

    with monkeypatch.context() as patch:
        patch.setattr(WanTransformerBlock, "forward", counting)
        yield counts


def of_one_step(recipe):
    """Its rollout stops nowhere else, so that the mean is what is counted."""
    return recipe.model_copy(update={"student": recipes.few_steps(1, 5.0)})


@pytest.mark.parametrize(
    ("made", "pruned"),
    [
        ("dmd2", ()),
        ("dmd2", PRUNED),
        ("magic", PRUNED),
        ("fastlightgen", PRUNED),
        ("lcm", ()),
        ("lcm", PRUNED),
        ("icmd", ()),
        ("f3", ()),
    ],
)
def test_the_cost_of_a_method_is_what_is_counted(given, run, recipe, monkeypatch, made, pruned):
    weights = "pruned" if pruned else "teacher"
    recipe = of_one_step(recipe)
    monkeypatch.setattr(given, "config", recipe)
    config = method.METHODS[made].settings(recipe, weights)
    if config.own is not None and made != "f3":
        config = config.model_copy(
            update={"own": config.own.model_copy(update={"fit": config.own.fit.model_copy(update={"steps": 2})})}
        )
    if made == "f3":
        config = config.model_copy(update={"own": config.own.model_copy(update={"clips": 2, "sigmas": 2})})
    start = start_of(given, pruned)
    with counted(monkeypatch) as counts:
        method.METHODS[made].train(run, given, start, config)
    spent = method.spent_passes(config, tiny.NUM_LAYERS)
    assert counts["passes"] == spent[made] > 0


def test_a_rollout_has_on_average_the_calls_that_are_charged(recipe):
    four, data = (
        base.matching_passes(
            recipe.matching.model_copy(update={"rollout": rollout}), steps=4, blocks=5, student=3, gap=True
        )
        for rollout in ("euler", "data")
    )
    # (4 + 1) / 2 calls in place of 1, for the student's update and each of the critic's.
    extra = 1.5 * 3 * (1 + recipe.matching.critic.updates) * recipe.matching.fit.batch
    assert four - data == pytest.approx(extra)


def test_the_cost_of_stages_one_and_two_is_what_is_counted(given, run, recipe, monkeypatch):
    always = recipe.pruning.model_copy(update={"deployed_probability": 1.0})
    monkeypatch.setattr(pruning, "drift", lambda *_: {"drift_full": 0.0})
    with counted(monkeypatch) as counts:
        found = importance.run(run, given, recipe.importance, recipe.pruning.unimportant)
        assert counts["passes"] == base.importance_passes(recipe.importance, tiny.NUM_LAYERS)
        (run.folder / "importance.json").unlink()
        counts["passes"] = 0
        greedy = recipe.importance.model_copy(update={"greedy": True})
        importance.run(run, given, greedy, recipe.pruning.unimportant)
        assert counts["passes"] == base.importance_passes(greedy, tiny.NUM_LAYERS)
        counts["passes"] = 0
        pruning.run(run, given, found, always)
    each = base.pruning_passes(always, recipe.importance.rho, tiny.NUM_LAYERS)
    assert counts["passes"] == pytest.approx(each * always.fit.steps)
    # Half of the six blocks of U are skipped on average, where it is not M*.
    drawn = always.model_copy(update={"deployed_probability": 0.0, "unimportant": 2.0})
    assert base.pruning_passes(drawn, 0.3, 10) == (10 + 3 * 7) * drawn.fit.batch


def test_lcm_s_guidance_is_the_recipe_s_in_either_unit(recipe):
    def guidance(unit, ends):
        scores = recipe.matching.scores.model_copy(update={"cfg_unit": unit, "beta_1": ends})
        of = recipe.model_copy(update={"matching": recipe.matching.model_copy(update={"scores": scores})})
        return lcm.settings(of).own.guidance_scale

    assert guidance("extra", (0.5, 1.5)) == guidance("standard", (1.5, 2.5)) == 2.0


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where rows are kept; what they have in common is made once."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture
def short(recipe):
    from distill.config import override

    return override(recipe, STEPS)


def configured(short, made, weights):
    config = method.METHODS[made].settings(short, weights)
    own = config.own
    if own is not None and hasattr(own, "fit"):
        fit_of = own.fit.model_copy(update={"steps": 2, "batch": 2, "log_every": 1, "checkpoint_every": 1})
        config = config.model_copy(update={"own": own.model_copy(update={"fit": fit_of})})
    if made == "f3":
        config = config.model_copy(update={"own": own.model_copy(update={"clips": 2, "sigmas": 1, "queries": 8})})
    return config


@pytest.mark.parametrize(
    ("made", "weights", "blocks", "call"),
    [
        ("euler", "teacher", 5, (4, 1.0)),
        ("lcm", "teacher", 5, (4, 1.0)),
        ("lcm", "pruned", 3, (4, 1.0)),
        ("dmd2", "pruned", 3, (4, 1.0)),
        ("magic", "teacher", 5, (4, 1.0)),
        ("icmd", "teacher", 3, (2, 2.0)),
        ("f3", "teacher", 3, (2, 2.0)),
        ("fastlightgen", "pruned", 3, (4, 1.0)),
    ],
)
def test_two_steps_of_a_method_leave_a_valid_student(root, short, made, weights, blocks, call):
    folder = method.train(root, configured(short, made, weights))
    card = student.read_card(folder / "student")
    assert (card.call["num_inference_steps"], card.call["guidance_scale"]) == call
    assert len(card.blocks.kept) == blocks
    assert [stage["name"] for stage in card.stages][-1] == made
    pipe = DiffusionPipeline.from_pretrained(folder / "student", dtype=torch.float32, local_files_only=True)
    image = shapes.clips(0, [shapes.SPLITS["dev"][0]]).video_BCTHW[:, :, 0] / 2 + 0.5
    frames = pipe(image=image, prompt="a red circle grows", output_type="pt", **card.call).frames
    assert frames.shape[1] == 17
    assert frames.isfinite().all()
    trained = {"lcm", "dmd2", "magic", "icmd", "fastlightgen"}
    teacher = load_file(f"{short.teacher}/transformer/diffusion_pytorch_model.safetensors")
    ours = load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = not torch.equal(ours["proj_out.weight"].float(), teacher["proj_out.weight"].half().float())
    assert moved == (made in trained or weights == "pruned")
    assert len(list((root / "stages").glob("pruning-*"))) <= 1  # one stage II for all that start from it
    # A second time nothing is done.
    before = (folder / "row.json").stat().st_mtime_ns
    assert method.train(root, configured(short, made, weights)) == folder
    assert (folder / "row.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("where", ["shared latents", "row"])
def test_a_signal_after_the_last_look_ends_the_work_too(tmp_path, short, monkeypatch, where):
    opened = run_module.Given if where == "shared latents" else method.write_json

    def signalled(*arguments):
        made = opened(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return made

    config = configured(short, "euler", "teacher")
    with monkeypatch.context() as patch:
        patch.setattr(*((run_module, "Given") if where == "shared latents" else (method, "write_json")), signalled)
        with pytest.raises(loop.Interrupted):
            method.train(tmp_path, config)
    assert (
        bool(list(tmp_path.glob("stages/*/done"))) == bool(list(tmp_path.glob("rows/*/row.json"))) == (where == "row")
    )
    assert student.read_card(method.train(tmp_path, config) / "student").kind == "student"


@pytest.mark.parametrize("made", ["lcm", "dmd2"])
def test_a_stopped_row_goes_on_to_the_same_bits(tmp_path, short, monkeypatch, made):
    event = loop.Run.event

    def interrupting(self, stage, step, **values):
        event(self, stage, step, **values)
        if step == 1 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    config = configured(short, made, "teacher")
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"seed": 5})})
    with one_thread():
        whole = method.train(tmp_path / "whole", config)
        with monkeypatch.context() as patch:
            patch.setattr(loop.Run, "event", interrupting)
            with pytest.raises(loop.Interrupted):
                method.train(tmp_path / "stopped", config)
        [folder] = (tmp_path / "stopped" / "rows").iterdir()
        assert list(folder.glob("*.checkpoint"))
        assert method.train(tmp_path / "stopped", config) == folder
    ours, theirs = (
        load_file(f / "student" / "transformer" / "diffusion_pytorch_model.safetensors") for f in (folder, whole)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("mode", ["sublayer", "edges"])
def test_the_other_ways_of_f3_keep_every_block(root, short, mode, tmp_path, monkeypatch):
    config = configured(short, "f3", "teacher")
    folder = method.train(root, config.model_copy(update={"own": config.own.model_copy(update={"mode": mode})}))
    found = json.loads((folder / f3.FOUND).read_text())
    assert len(found["chosen"]) == 2
    pipe = student.load_pipeline(folder / "student", "cpu")
    assert len(pipe.transformer.blocks) == tiny.NUM_LAYERS
    silent = [bool(block.attn1.to_out[0].weight.abs().max() == 0) for block in pipe.transformer.blocks]
    assert silent == [mode == "sublayer" and i in found["chosen"] for i in range(tiny.NUM_LAYERS)]
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    with f3.as_pruned(wan, pipe.transformer, folder, num_frames=5):
        limited = [block.attn1.processor is not old for block, old in zip(pipe.transformer.blocks, before, strict=True)]
    assert limited == [mode == "edges" and i in found["chosen"] for i in range(tiny.NUM_LAYERS)]
    # The same is made while it is timed, without the products that give nothing.
    transformer, generator = pipe.transformer, torch.Generator().manual_seed(0)
    x_BCTHW = torch.randn(1, transformer.config.in_channels, 5, 8, 8, generator=generator)
    text_BLD = torch.randn(1, 4, transformer.config.text_dim, generator=generator)
    asked = (x_BCTHW, torch.tensor([500]), text_BLD)
    computed = []
    hooks = [
        b.attn1.to_q.register_forward_hook(lambda *_, i=i: computed.append(i)) for i, b in enumerate(transformer.blocks)
    ]
    with torch.no_grad():
        with f3.as_pruned(wan, transformer, folder, num_frames=5):
            measured = transformer(*asked, return_dict=False)[0]
        assert computed == list(range(tiny.NUM_LAYERS))
        computed.clear()
        with f3.as_pruned(wan, transformer, folder, num_frames=5, timed=True):
            timed = transformer(*asked, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    assert computed == [i for i in range(tiny.NUM_LAYERS) if mode == "edges" or i not in found["chosen"]]
    assert torch.equal(measured, timed)
    # And it is timed so, in a pipeline of its own.
    processors = []

    def phases(pipe, *_):
        processors.extend(type(block.attn1.processor).__name__ for block in pipe.transformer.blocks)
        return [0.0] * 3

    monkeypatch.setattr(scores, "_phases", phases)
    scores._Measured(folder / "student", tmp_path, scores.Asked("dev", 2, 1, 0, 2, "float32")).seconds(lambda: None)
    wanted = {"edges": "_WithinFrameAttnProcessor", "sublayer": "_NoAttnProcessor"}[mode]
    assert [i for i, name in enumerate(processors) if name == wanted] == found["chosen"]


def test_settings_of_another_method_are_refused(recipe):
    own = lcm.settings(recipe).own
    for made, settings in (("icmd", own), ("dmd2", own), ("lcm", None)):
        with pytest.raises(ValueError, match=f"own: the settings of {made} are wanted"):
            MethodConfig(method=made, weights="teacher", recipe=recipe, own=settings)


def test_the_mean_over_rollouts_is_charged_by_hand(recipe):
    """FastLightGen on the bundled teacher's ten blocks: 2.5 calls, A, N, P, Q; three critics of 2.5 calls and 3."""
    of = recipe.matching.model_copy(update={"fit": recipe.matching.fit.model_copy(update={"batch": 16})})
    of = of.model_copy(update={"critic": of.critic.model_copy(update={"updates": 3})})
    by_hand = 16 * ((1.5 + 3) * 7 + 10 + 10 + 7 + 10 + 3 * (2.5 * 7 + 3 * 10))
    assert base.matching_passes(of, steps=4, blocks=10, student=7, gap=True) == by_hand
