"""Every Wan: what the backbone does is what the stock pipeline does, at tiny size."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

from distill import recipes, sampler
from distill.backbones import base, conditions, experts, wan, wan_i2v
from distill.stages import matching
from tests.distill.conftest import one_thread
from tests.tiny import wan as tiny

PROMPTS = ["a red circle grows", "a blue star spins"]


@pytest.fixture(scope="module", params=sorted(tiny.VARIANTS))
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(variant):
    return tiny.pipeline(variant)


@pytest.fixture(scope="module")
def backbone(variant):
    name = tiny.VARIANTS[variant]
    return base.load(name, "t2v" if "t2v" in variant else "ti2v")


@pytest.fixture(scope="module")
def network(backbone, pipe):
    return backbone.network(pipe)


@pytest.fixture(scope="module")
def first(variant):
    if "t2v" in variant:
        return None
    levels = torch.randint(256, (2, 3, tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


@pytest.fixture(scope="module")
def inputs(variant, backbone, pipe, first):
    """Noise, a level for each of the experts, and conditions of two clips."""
    call = tiny.call(variant)
    with torch.no_grad():
        given = sampler.encode(backbone, pipe, first, PROMPTS, call)
    x = sampler.draw_noise(backbone, pipe, range(2), call)
    return x, torch.tensor([0.95, 0.5]), given.image, given.text


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_our_sampler_equals_the_stock_pipeline(variant, backbone, pipe, first, guidance_scale, scheduler, monkeypatch):
    if scheduler == "unipc":  # as the released folders have it
        released = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
        monkeypatch.setattr(pipe, "scheduler", released)
    call = tiny.call(variant, guidance_scale=guidance_scale)
    noise = sampler.draw_noise(backbone, pipe, range(2), call)
    ours = sampler.sample(backbone, pipe, first, PROMPTS, call, noise)
    for i, prompt in enumerate(PROMPTS):
        image = {} if first is None else {"image": first[i : i + 1] / 2 + 0.5}
        if variant == "i2v-14b":  # what the stock call is given is one picture, which CLIP and the autoencoder see
            image["image"] = wan_i2v.picture(first[i])
        stock = pipe(prompt=prompt, generator=torch.Generator().manual_seed(i), output_type="pt", **image, **call)
        assert torch.allclose(ours[i].transpose(0, 1).clamp(-1, 1), stock.frames[0] * 2 - 1, atol=1e-4)


def test_the_low_noise_expert_has_a_scale_of_its_own():
    pipe, backbone = tiny.pipeline("t2v-a14b"), base.load("wan-t2v", "t2v")
    call = tiny.call("t2v-a14b", guidance_scale=4.0, guidance_scale_2=2.0)
    ours = sampler.sample(backbone, pipe, None, PROMPTS[:1], call, sampler.draw_noise(backbone, pipe, [0], call))
    stock = pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **call).frames
    assert torch.allclose(ours[0].transpose(0, 1).clamp(-1, 1), stock[0] * 2 - 1, atol=1e-4)
    same = backbone.calling(call, 3, 4.0)
    assert "guidance_scale_2" not in same  # which is the first one's for both
    other = pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **same).frames
    assert not torch.allclose(stock, other, atol=1e-3)


def test_each_clip_goes_to_the_expert_of_its_level(variant, backbone, network, inputs):
    x, sigma, image, text = inputs
    both = backbone.predict_velocity(network, x, sigma, image, text)
    for i in range(2):
        one = slice(i, i + 1)
        of_one = (x[one], sigma[one], conditions.rows(image, one), conditions.rows(text, one))
        assert torch.allclose(both[one], backbone.predict_velocity(network, *of_one), atol=1e-5)
    if variant.endswith("a14b"):
        swapped = experts.Experts(network.low, network.high, network.boundary)
        assert not torch.allclose(both, backbone.predict_velocity(swapped, x, sigma, image, text), atol=1e-3)
        # In the other order of the clips, too.
        turned = [conditions.rows(c, torch.tensor([1, 0])) for c in (image, text)]
        assert torch.equal(backbone.predict_velocity(network, x.flip(0), sigma.flip(0), *turned).flip(0), both)


def test_blocks_skipped_pruned_and_read_again_are_the_same(variant, backbone, pipe, network, inputs, tmp_path):
    groups = backbone.groups(network)
    assert len(groups) == 1 + variant.endswith("a14b")
    pruned = [group.start + 1 for group in groups]
    with one_thread(), torch.no_grad():
        whole = backbone.predict_velocity(network, *inputs)
        with backbone.skipping(network, pruned):
            skipped = backbone.predict_velocity(network, *inputs)
        assert torch.equal(backbone.predict_velocity(network, *inputs), whole)
        smaller = backbone.without_blocks(network, pruned)
        assert torch.equal(backbone.predict_velocity(smaller, *inputs), skipped)
        assert not torch.equal(skipped, whole)
        backbone.with_parts(pipe, smaller, pipe.scheduler).save_pretrained(tmp_path)
        again = backbone.network(DiffusionPipeline.from_pretrained(tmp_path))
        # Weights that lie elsewhere in memory are added up in another order.
        assert torch.allclose(backbone.predict_velocity(again, *inputs), skipped, atol=1e-5)
    for one, other in zip(experts.models(again), experts.models(smaller), strict=True):
        assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())
    assert type(again) is type(network)
    assert [m.config.num_layers for m in backbone.networks(again).values()] == [tiny.BLOCKS - 1] * len(groups)


def test_the_critic_is_a_lora_on_both_experts_and_is_scaled_in_both(backbone, network, inputs):
    base_ = backbone.without_blocks(network, ()).eval()
    lora = recipes.load("shapes", []).matching.critic.model_copy(update={"rank": 2})
    critic = matching.Critic(backbone, base_, lora, ())
    for model in experts.models(base_):
        layers = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert layers
        for layer in layers:
            torch.nn.init.normal_(layer)
    with torch.no_grad():
        plain, fake = backbone.predict_velocity(network, *inputs), backbone.predict_velocity(base_, *inputs)
        apart = (fake - plain).abs().amax(dim=(1, 2, 3, 4))
        assert apart.min() > 1e-3  # the clip of either expert
        with critic.scaled(0):
            assert torch.allclose(backbone.predict_velocity(base_, *inputs), plain, atol=1e-5)
        assert torch.allclose(backbone.predict_velocity(base_, *inputs), fake, atol=1e-5)


def test_one_expert_less_can_be_pruned_than_the_other():
    backbone, pipe = base.load("wan-t2v", "t2v"), tiny.pipeline("t2v-a14b")
    smaller = backbone.without_blocks(backbone.network(pipe), [0, 1, 5])
    assert [len(model.blocks) for model in experts.models(smaller)] == [1, 2]


def test_gradients_reach_the_blocks_that_are_run(backbone, network, inputs):
    model = backbone.without_blocks(network, ()).requires_grad_(True)
    with backbone.skipping(model, [1]):
        backbone.predict_velocity(model, *inputs).square().mean().backward()
    reached = [any(p.grad is not None for p in block.parameters()) for block in backbone.blocks(model)]
    assert reached == [i != 1 for i in range(len(reached))]


def test_tokens_are_those_that_the_next_block_is_given(backbone, network, inputs):
    taken: dict[int, torch.Tensor] = {}
    of_high = experts.models(network)[0]
    hook = of_high.blocks[2].register_forward_pre_hook(lambda _m, args: taken.update({2: args[0]}))
    with backbone.tokens_after(network, (1,)) as seen:
        backbone.predict_velocity(network, *inputs)
    hook.remove()
    assert len(seen) == 1
    assert len(seen[0]) == 2  # both clips, also where two experts made them
    assert seen[0].shape[-1] == backbone.width(network)
    assert torch.equal(seen[0][: len(taken[2])], taken[2])  # the first clip is the high one


def test_given_frames_stand_in_their_place(variant, backbone, inputs):
    x, _, image, _ = inputs
    placed = backbone.with_given(x, image)
    assert torch.equal(placed[:, :, backbone.GIVEN_FRAMES :], x[:, :, backbone.GIVEN_FRAMES :])
    assert torch.equal(placed, x) == (backbone.GIVEN_FRAMES == 0)
    assert backbone.GIVEN_FRAMES == (variant == "ti2v-5b")


def test_the_autoencoder_in_one_pass_is_the_stock_one(backbone, pipe):
    video = torch.rand(1, 3, tiny.FRAMES, tiny.SIZE, tiny.SIZE) * 2 - 1
    with torch.no_grad():
        latents = backbone.encode_video(pipe.vae, video)
        stock = backbone.decode_latents(pipe.vae, latents)
        pieces = torch.cat(list(backbone.decode_in_pieces(pipe.vae, latents)), dim=2)
        whole = backbone.WholeDecoder(pipe.vae)(latents)[0]
        assert torch.allclose(pieces, stock, atol=1e-5)
        assert torch.allclose(whole, stock, atol=1e-5)


def test_attention_is_the_stock_one_when_it_is_exported(backbone, network, inputs):
    stock = backbone.predict_velocity(network, *inputs)
    for model in experts.models(network):
        with wan.exporting(model):
            assert torch.allclose(backbone.predict_velocity(network, *inputs), stock, atol=1e-6)


def test_self_attention_can_be_limited_left_out_and_measured(backbone, network, inputs):
    frames = inputs[0].shape[2]
    stock = backbone.predict_velocity(network, *inputs)
    with backbone.attention_between_frames(network, frames, 8, torch.Generator().manual_seed(0)) as shares:
        assert torch.equal(backbone.predict_velocity(network, *inputs), stock)
    assert sorted(shares) == list(range(len(backbone.blocks(network))))
    assert all(0 < share < 1 for of in shares.values() for share in of)
    with backbone.within_frames(network, [0], frames):
        assert not torch.allclose(backbone.predict_velocity(network, *inputs), stock, atol=1e-4)
    silenced = backbone.without_blocks(network, ())
    backbone.silence_self_attention(silenced, [0])
    with backbone.without_self_attention(network, [0]):
        left_out = backbone.predict_velocity(network, *inputs)
    assert torch.allclose(backbone.predict_velocity(silenced, *inputs), left_out, atol=1e-6)
    assert 0 < backbone.self_attention_share(network) < 1
