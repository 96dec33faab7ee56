"""HunyuanVideo: our conventions are those of the stock pipelines, and what is done to the networks is what it says."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from distill.backbones import base, conditions, hunyuan15_autoencoder
from distill.backbones.base import Backbone
from distill.backbones.conditions import Conditions
from tests.tiny import hunyuan
from worker.engine import export, ort

FIRST_GENERATION = ("hunyuan-t2v", "hunyuan-i2v", "hunyuan-i2v-concat")
PROMPTS = ["a red ball moves left in the rain", 'a cat "up" spins']
PRUNED = [1, 4]
"""Of the first generation one block of either kind."""


@dataclass
class Case:
    """One variant's pipeline, read from its folder, and two clips with texts of different lengths."""

    name: str
    of: Backbone
    pipe: Any
    call: dict[str, Any]
    first_BCHW: Tensor | None
    image: Conditions
    text: Conditions
    x_BCTHW: Tensor
    sigma_B: Tensor

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    def velocity(self, transformer: Any = None, x_BCTHW: Tensor | None = None) -> Tensor:
        x_BCTHW = self.x_BCTHW if x_BCTHW is None else x_BCTHW
        network = self.transformer if transformer is None else transformer
        return self.of.predict_velocity(network, x_BCTHW, self.sigma_B, self.image, self.text)

    def pictures(self) -> list[dict[str, Image.Image]]:
        """What the stock pipeline is given beside the prompt, for each clip."""
        if self.first_BCHW is None:
            return [{}, {}]
        levels_BHWC = ((self.first_BCHW + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [{"image": Image.fromarray(levels_HWC.numpy())} for levels_HWC in levels_BHWC]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By variant, each made once."""
    cases: dict[str, Case] = {}

    def make(variant: str) -> Case:
        if variant not in cases:
            folder = tmp_path_factory.mktemp("hunyuan") / variant
            hunyuan.make(folder, variant)
            cases[variant] = _case(variant, _load(folder))
        return cases[variant]

    return make


@pytest.fixture(params=hunyuan.VARIANTS)
def case(request: pytest.FixtureRequest, made: Any) -> Case:
    return made(request.param)


def _load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def _case(variant: str, pipe: Any) -> Case:
    of, call = base.BACKBONES[variant], hunyuan.CALLS[variant]
    generator = torch.Generator().manual_seed(1)
    first_BCHW = None
    if of.TASKS == ("ti2v",):
        levels = torch.randint(0, 256, (2, 3, call["height"], call["width"]), generator=generator)
        first_BCHW = levels.float() / 255 * 2 - 1
    image = of.encode_image(pipe, first_BCHW, call)
    text = of.encode_text(pipe, PROMPTS, call, first_BCHW)
    x_BCTHW = torch.randn(2, *of.latent_shape(pipe, call), generator=generator)
    return Case(variant, of, pipe, call, first_BCHW, image, text, x_BCTHW, torch.tensor([0.9, 0.4]))


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """By the largest value."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert wanted.std() > 0.1


# --- as the stock pipelines do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_an_euler_loop_gives_the_latents_of_the_stock_pipeline(case, scale):
    of, transformer = case.of, case.transformer
    call = of.calling(case.call, 2, scale)
    pipe = of.with_parts(case.pipe, transformer, case.pipe.scheduler, call)
    pipe.set_progress_bar_config(disable=True)
    lengths_B = case.text["mask"].sum(1)
    assert lengths_B[0] != lengths_B[1]
    negative = conditions.repeated(of.encode_text(pipe, [call.get("negative_prompt") or ""], call), 2)

    x_BCTHW = of.starting(case.x_BCTHW, case.image)
    of.set_steps(pipe.scheduler, 2)
    visited = pipe.scheduler.sigmas.tolist()
    for sigma, after in itertools.pairwise(visited):
        assert of.guidance_at(transformer, call, sigma) == scale
        sigma_B = torch.full((2,), sigma)
        velocity = of.predict_velocity(transformer, x_BCTHW, sigma_B, case.image, case.text)
        if scale > 1:
            without = of.predict_velocity(transformer, x_BCTHW, sigma_B, case.image, negative)
            velocity = without + scale * (velocity - without)
        x_BCTHW = x_BCTHW + (after - sigma) * velocity
    ours = of.with_given(x_BCTHW, case.image)

    for clip, picture in enumerate(case.pictures()):
        rows = slice(clip, clip + 1)
        asked = {**picture, **of.arguments(call), "output_type": "latent", "return_dict": False}
        stock = pipe(prompt=PROMPTS[clip], latents=case.x_BCTHW[rows], **asked)[0]
        assert pipe.scheduler.sigmas.tolist() == visited
        # Of 33 channels the stock pipeline leaves out the first latent frame.
        close(ours[rows, :, -stock.shape[2] :], stock)
        assert stock.shape[2] == ours.shape[2] - (case.name == "hunyuan-i2v-concat")


@torch.no_grad()
def test_encoded_text_stands_for_the_prompt_in_a_stock_call(case):
    of, call = case.of, case.of.calling(case.call, 1, 2.0)
    pipe = of.with_parts(case.pipe, case.transformer, case.pipe.scheduler, call)
    pipe.set_progress_bar_config(disable=True)
    negative = of.encode_text(pipe, [""], call)
    inputs = of.text_inputs(conditions.rows(case.text, slice(1)), negative)
    asked = {**case.pictures()[0], **of.arguments(call), "output_type": "latent", "return_dict": False}
    by_prompt = pipe(prompt=PROMPTS[0], latents=case.x_BCTHW[:1], **asked)[0]
    close(pipe(latents=case.x_BCTHW[:1], **{**asked, **inputs})[0], by_prompt)


def test_the_levels_of_the_student_are_those_of_shift_5(case):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    case.of.set_steps(scheduler, 4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9375, 0.83333, 0.625, 0], abs=1e-4)


@torch.no_grad()
def test_text_is_of_its_image_where_the_text_encoder_sees_it(case):
    of = case.of
    first_BCHW = None if case.first_BCHW is None else case.first_BCHW.flip(0)
    other = of.encode_text(case.pipe, PROMPTS, case.call, first_BCHW)
    sees = case.name in ("hunyuan-i2v", "hunyuan-i2v-concat")
    assert torch.equal(other["text"], case.text["text"]) == (not sees)
    # That of a negative prompt is of no image, and has the same shapes.
    negative = of.encode_text(case.pipe, ["", PROMPTS[1]], case.call)
    assert {n: v.shape for n, v in negative.items()} == {n: v.shape for n, v in case.text.items()}
    assert not torch.equal(negative["text"][0], negative["text"][1])


def test_a_prompt_that_is_too_long_is_cut_beside_one_that_is_not(made):
    case = made("hunyuan-i2v")
    prompts = ["a red ball " * 20, PROMPTS[1]]
    text = case.of.encode_text(case.pipe, prompts, case.call, case.first_BCHW)
    assert torch.equal(text["text"][1], case.text["text"][1])
    assert text["mask"][0].sum() > text["mask"][1].sum()


@torch.no_grad()
def test_what_is_kept_of_an_image_gives_its_conditions_back(case):
    if case.first_BCHW is None:
        assert case.image == case.of.image_of(case.x_BCTHW, case.of.to_keep(case.image)) == {}
        return
    video_BCTHW = case.first_BCHW[:, :, None].expand(-1, -1, case.call["num_frames"], -1, -1).clone()
    video_BCTHW[:, :, 1:] += 0.2 * torch.randn(video_BCTHW[:, :, 1:].shape, generator=torch.Generator().manual_seed(2))
    x0_BCTHW = case.of.encode_video(case.pipe.vae, video_BCTHW)
    assert x0_BCTHW.shape[1:] == case.x_BCTHW.shape[1:]
    kept = case.of.to_keep(case.image)
    again = case.of.image_of(x0_BCTHW, kept)
    assert again.keys() == case.image.keys()
    for name, value in again.items():
        assert torch.allclose(value, case.image[name], atol=1e-5)
    # Kept is no more than has to be.
    causal = torch.allclose(x0_BCTHW[:, :, :1], case.image["first"], atol=1e-5)
    assert causal == ("first" not in kept)


def test_guidance_is_named_as_the_stock_call_names_it(case):
    of, transformer = case.of, case.transformer
    assert of.guidance_at(transformer, case.call, 0.5) == 1
    guided = of.calling(case.call, 50, 4.5)
    assert guided["num_inference_steps"] == 50
    assert of.guidance_at(transformer, guided, 0.5) == 4.5
    assert of.guidance_at(transformer, of.calling(guided, 4, 1.0), 0.5) == 1
    if case.name in FIRST_GENERATION:  # the guidance that is an input of the network stays, and is in its unit
        assert guided.get("guidance_scale") == case.call.get("guidance_scale")
        assert case.text.get("guidance", torch.tensor([])).tolist() == (
            [6000.0] * 2 if "guidance_scale" in case.call else []
        )
    else:
        assert "guidance_scale" not in of.arguments(guided)


# --- depth ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_skipping_equals_removing_equals_what_is_read_from_disk(case, tmp_path):
    of = case.of
    whole = case.velocity()
    with of.skipping(case.transformer, PRUNED):
        skipped = case.velocity()
    smaller = of.without_blocks(case.transformer, PRUNED)
    few = of.calling(case.call, 2, 1.0)
    of.with_parts(case.pipe, smaller, case.pipe.scheduler, few).save_pretrained(tmp_path)
    student = _load(tmp_path)
    assert torch.equal(case.velocity(smaller), skipped)
    assert torch.equal(case.velocity(student.transformer), skipped)
    assert not torch.allclose(skipped, whole, atol=1e-2)
    assert torch.equal(case.velocity(), whole)
    assert type(smaller) is type(case.transformer)
    depths = (smaller.config.num_layers, smaller.config.get("num_single_layers"))
    assert depths == ((1, 2) if case.name in FIRST_GENERATION else (3, None))
    asked = {**case.pictures()[0], **of.arguments(few), "output_type": "np", "return_dict": False}
    frames = student(prompt=PROMPTS[0], **asked)[0][0]
    assert frames.shape[0] == case.call["num_frames"] - 4 * (case.name == "hunyuan-i2v-concat")
    assert frames.std() > 0.001


def test_a_budget_counts_the_parameters_of_either_kind(case):
    counts = [sum(p.numel() for p in block.parameters()) for block in case.of.blocks(case.transformer)]
    single = 0 if case.name not in FIRST_GENERATION else hunyuan.NUM_SINGLE_LAYERS
    assert len(counts) == (hunyuan.NUM_LAYERS + single if single else hunyuan.NUM_LAYERS_15)
    assert case.of.groups(case.transformer) == [range(len(counts))]
    if single:
        assert min(counts[: hunyuan.NUM_LAYERS]) > max(counts[hunyuan.NUM_LAYERS :])
    gone = sum(counts[block] for block in PRUNED)
    smaller = case.of.without_blocks(case.transformer, PRUNED)
    assert smaller.num_parameters() == case.transformer.num_parameters() - gone


def test_gradients_reach_the_blocks_that_are_run_and_no_other(case):
    transformer = copy.deepcopy(case.transformer).requires_grad_(True)
    with case.of.skipping(transformer, PRUNED):
        case.velocity(transformer).square().mean().backward()
    blocks = case.of.blocks(transformer)
    last = max(i for i in range(len(blocks)) if i not in PRUNED)
    for i, block in enumerate(blocks):
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        assert bool(gradients) == (i not in PRUNED)
        assert all(g.isfinite().all() for g in gradients)
        if i not in (*PRUNED, last):  # of the last one nothing reads the text
            assert len(gradients) == len(list(block.parameters()))


@torch.no_grad()
def test_tokens_are_the_video_s_after_the_blocks_that_are_run(case):
    outputs: list[Tensor] = []
    every = case.of.blocks(case.transformer)
    left = [block for i, block in enumerate(every) if i not in PRUNED]
    handles = [left[i].register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for i in (0, len(left) - 1)]
    with case.of.skipping(case.transformer, PRUNED), case.of.tokens_after(case.transformer, (0, -1)) as seen:
        with_taps = case.velocity()
    for handle in handles:
        handle.remove()
    with case.of.skipping(case.transformer, PRUNED):
        assert torch.equal(case.velocity(), with_taps)
    assert len(seen) == 2
    assert all(torch.equal(tokens, output) for tokens, output in zip(seen, outputs, strict=True))
    patch = case.transformer.config.patch_size
    _, _, frames, height, width = case.x_BCTHW.shape
    count = frames * (height // patch) * (width // patch)
    assert seen[0].shape == (2, count, case.of.width(case.transformer))
    assert case.of.width(case.transformer) == hunyuan.WIDTH


# --- attention --------------------------------------------------------------------------------------------------------


def _tokens(case: Case) -> tuple[int, int]:
    """Of video, and latent frames."""
    _, _, frames, height, width = case.x_BCTHW.shape
    patch = case.transformer.config.patch_size
    return frames * (height // patch) * (width // patch), frames


def _text_tokens(case: Case) -> Tensor:
    """That are attended to, of each clip."""
    of_text = case.text["mask"].sum(1)
    if case.name not in FIRST_GENERATION:
        of_text = of_text + case.text["glyph_mask"].sum(1)
    return of_text + (case.image["embeds"].shape[1] if "embeds" in case.image else 0)


@torch.no_grad()
def test_attention_that_tells_no_tokens_apart_crosses_frames_as_often_as_there_are_others(case):
    transformer = copy.deepcopy(case.transformer)
    for block in case.of.blocks(transformer):
        for layer in (block.attn.to_q, block.attn.add_q_proj):
            if layer is not None:
                layer.weight.zero_()
                layer.bias.zero_()
    count, frames = _tokens(case)
    generator = torch.Generator().manual_seed(0)
    with case.of.attention_between_frames(transformer, frames, 5, generator) as shares:
        measured = case.velocity(transformer)
    expected = ((count - count / frames) / (count + _text_tokens(case))).mean().item()
    assert sorted(shares) == list(range(len(case.of.blocks(transformer))))
    for seen in shares.values():
        assert seen == [pytest.approx(expected, abs=1e-5)]
    close(measured, case.velocity(transformer))


@pytest.mark.parametrize(
    ("variant", "block"),
    [*((variant, 0) for variant in hunyuan.VARIANTS), *((variant, hunyuan.NUM_LAYERS) for variant in FIRST_GENERATION)],
)
@torch.no_grad()
def test_within_frames_a_block_sees_no_other_frame(made, variant, block):
    """Of either kind."""
    case = made(variant)
    of = case.of
    others = [i for i in range(len(of.blocks(case.transformer))) if i != block]
    _, frames = _tokens(case)
    changed = case.x_BCTHW.clone()
    changed[:, :, -1] += 1
    with of.skipping(case.transformer, others):  # of two blocks the second one hears of other frames from the text
        free = case.velocity(), case.velocity(x_BCTHW=changed)
        with of.within_frames(case.transformer, [0], frames):
            limited = case.velocity(), case.velocity(x_BCTHW=changed)
        with of.within_frames(case.transformer, [0], 1):
            close(case.velocity(), free[0])
        assert torch.equal(case.velocity(), free[0])
    assert not torch.allclose(free[0][:, :, :-1], free[1][:, :, :-1], atol=1e-3)
    assert torch.allclose(limited[0][:, :, :-1], limited[1][:, :, :-1], atol=1e-5)
    assert not torch.allclose(limited[0][:, :, -1], limited[1][:, :, -1], atol=1e-3)
    assert not torch.allclose(limited[0], free[0], atol=1e-3)


@torch.no_grad()
def test_attention_that_is_left_out_is_attention_that_is_silenced(case):
    transformer = copy.deepcopy(case.transformer)
    with case.of.without_self_attention(transformer, PRUNED):
        left_out = case.velocity(transformer)
    whole = case.velocity(transformer)
    case.of.silence_self_attention(transformer, PRUNED)
    close(left_out, case.velocity(transformer))
    assert not torch.allclose(left_out, whole, atol=1e-3)


def test_the_share_of_attention_counts_what_leaves_it(case):
    width = hunyuan.WIDTH
    square = width * width + width
    norms, head = 2 * width // 2, width // 2
    dual = 8 * square + 2 * norms  # query, key, value, output, of both streams
    single = 3 * square + 2 * head + width * width  # the output's bias is also that of what stands beside
    every = sum(p.numel() for p in case.of.blocks(case.transformer).parameters())
    if case.name in FIRST_GENERATION:
        own = hunyuan.NUM_LAYERS * dual + hunyuan.NUM_SINGLE_LAYERS * single
    else:
        own = hunyuan.NUM_LAYERS_15 * dual
    assert case.of.self_attention_share(case.transformer) == pytest.approx(own / every)


# --- the autoencoders -------------------------------------------------------------------------------------------------


def latents_of(case: Case, frames: int) -> Tensor:
    return torch.randn(1, case.x_BCTHW.shape[1], frames, 2, 2, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("frames", [3, 7, 8])
@torch.no_grad()
def test_every_way_of_decoding_gives_the_stock_video(case, frames):
    of, vae = case.of, case.pipe.vae
    count = 4 * (frames - 1) + 1
    latents = latents_of(case, frames)
    dropped = 4 if case.name == "hunyuan-i2v-concat" else 0
    stock = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0][:, :, dropped:].clamp(-1, 1)
    assert stock.shape[2] == count - dropped
    assert stock.std() > 0.01
    assert torch.equal(of.decode_latents(vae, latents), stock)
    pieces = list(of.decode_in_pieces(vae, latents))
    assert torch.allclose(torch.cat(pieces, dim=2), stock, atol=1e-6)
    if case.name in FIRST_GENERATION:
        sizes = {3: [9], 7: [13, 12], 8: [13, 12, 4]}[frames]
        assert [piece.shape[2] for piece in pieces] == [sizes[0] - dropped, *sizes[1:]]
    whole = of.WholeDecoder(copy.deepcopy(vae))(latents=latents, return_dict=False)[0]
    assert torch.allclose(whole, stock, atol=1e-6)
    assert of.decode_bytes(vae, 8, 64, 64) == 4 * 8 * 64 * 64 * 8 * 4


@torch.no_grad()
def test_several_clips_are_encoded_and_decoded_as_each_of_them_alone(case):
    video = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents = case.of.encode_video(case.pipe.vae, video)
    decoded = case.of.decode_latents(case.pipe.vae, latents)
    assert torch.allclose(case.of.encode_video(case.pipe.vae, video[1:]), latents[1:], atol=1e-4)
    assert torch.allclose(case.of.decode_latents(case.pipe.vae, latents[1:]), decoded[1:], atol=1e-4)
    assert not torch.allclose(decoded[:1], decoded[1:], atol=1e-2)


@torch.no_grad()
def test_the_mask_of_the_second_autoencoder_is_the_stock_one(made):
    vae = made("hunyuan15-t2v").pipe.vae
    stock = vae.decoder.mid_block.attentions[0].prepare_causal_attention_mask(3, 4, torch.float32, "cpu", batch_size=2)
    ours = hunyuan15_autoencoder.in_one_pass(copy.deepcopy(vae)).decoder.mid_block.attentions[0]
    assert torch.equal(ours.prepare_causal_attention_mask(3, 4, torch.float32, "cpu", batch_size=2)[:, 0], stock)


# --- engines ----------------------------------------------------------------------------------------------------------

QUICK = ("hunyuan-i2v", "hunyuan15-i2v")
EVERY = [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in hunyuan.VARIANTS]


class Recorder:
    """Called like a transformer."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.inputs: dict[str, Tensor] = {}

    def __call__(self, *, return_dict: bool, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:  # noqa: ARG002
        given = {"hidden_states": hidden_states, **inputs}
        self.inputs = {name: value.contiguous() for name, value in given.items() if value is not None}
        return (hidden_states,)


def inputs_of(case: Case, clips: int) -> dict[str, Tensor]:
    """Of the transformer."""
    rows_B = torch.arange(clips) % 2
    recorder = Recorder(case.transformer.config)
    x_BCTHW = torch.randn(clips, *case.x_BCTHW.shape[1:], generator=torch.Generator().manual_seed(clips))
    image, text = conditions.rows(case.image, rows_B), conditions.rows(case.text, rows_B)
    case.of.predict_velocity(recorder, x_BCTHW, torch.linspace(0.4, 0.9, clips), image, text)
    return recorder.inputs


@torch.no_grad()
def check_export(case: Case, path: Path, clips: int, axes: dict[str, tuple[int, ...]], others: list[int]) -> None:
    """onnxruntime gives what the stock forward does."""
    with case.of.exporting(case.transformer):
        export.export(case.transformer, inputs_of(case, clips), path, axes)
    run = ort.Session(path, 1)
    for count in (clips, *others):
        inputs = inputs_of(case, count)
        close(run(**inputs), case.transformer(**inputs, return_dict=False)[0], 1e-4)


@pytest.mark.parametrize("variant", EVERY)
def test_an_exported_transformer_gives_what_pytorch_does(made, variant, tmp_path):
    check_export(made(variant), tmp_path / "transformer.onnx", 1, {}, [])


@pytest.mark.slow
def test_an_export_takes_any_number_of_clips(case, tmp_path):
    axes = {name: (0,) for name in inputs_of(case, 2)}
    check_export(case, tmp_path / "transformer.onnx", 2, axes, [1, 3])


@pytest.mark.slow
@torch.no_grad()
def test_an_export_takes_every_size_that_its_backbone_says(case, tmp_path):
    named = inputs_of(case, 2)
    path = tmp_path / "transformer.onnx"
    with case.of.exporting(case.transformer):
        export.export(case.transformer, named, path, {n: a for n, a in case.of.EXPORT_AXES.items() if n in named})
    larger = inputs_of(case, 3)
    if 2 in case.of.EXPORT_AXES["hidden_states"]:
        generator = torch.Generator().manual_seed(5)
        larger["hidden_states"] = torch.randn(3, named["hidden_states"].shape[1], 4, 6, 8, generator=generator)
    if 1 in case.of.EXPORT_AXES["encoder_hidden_states"]:
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            larger[name] = larger[name][:, :-2].contiguous()
    close(ort.Session(path, 1)(**larger), case.transformer(**larger, return_dict=False)[0], 1e-4)


@torch.no_grad()
def test_exporting_changes_nothing_but_how_it_is_computed(case):
    inputs = inputs_of(case, 2)
    stock = case.transformer(**inputs, return_dict=False)[0]
    processors = {name: type(of) for name, of in case.transformer.attn_processors.items()}
    with case.of.exporting(case.transformer):
        close(case.transformer(**inputs, return_dict=False)[0], stock)
        assert {name: type(of) for name, of in case.transformer.attn_processors.items()} != processors
    assert torch.equal(case.transformer(**inputs, return_dict=False)[0], stock)
    assert {name: type(of) for name, of in case.transformer.attn_processors.items()} == processors


@pytest.mark.slow  # the worker's tests export those of two
@pytest.mark.parametrize("variant", EVERY)
@torch.no_grad()
def test_an_exported_decoder_gives_what_pytorch_does(made, variant, tmp_path):
    case = made(variant)
    decoder = case.of.WholeDecoder(copy.deepcopy(case.pipe.vae).requires_grad_(False))
    latents = latents_of(case, 3)
    export.export(decoder, {"latents": latents}, tmp_path / "decoder.onnx", {})
    ours = ort.Session(tmp_path / "decoder.onnx", 1)(latents=latents)
    assert torch.allclose(ours, case.of.decode_latents(case.pipe.vae, latents), atol=1e-4)
