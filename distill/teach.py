"""`python -m distill teach shapes FOLDER`: a small image-to-video teacher, from nothing, on any machine.

The parts of a stock `WanImageToVideoPipeline` (Wan2.2-TI2V style) at tiny size, trained in this order, each skipped
when its result is already in the folder:

1. the video autoencoder, on single frames and then on whole clips;
2. latents of the training clips, encoded once, and their mean and deviation;
3. the transformer with its text encoder, by rectified flow on those latents;
4. the folder, `FOLDER/teacher`, written aside and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from distill import losses, report, sampler, schedule, student
from distill.backbones import wan
from distill.config import ConfigError, TeachConfig, TransformerConfig, VaeConfig
from distill.data import shapes
from distill.loop import Run, fit
from distill.prompt import Prompt

EXAMPLES = (
    "a red circle moves right quickly, static camera",
    "a blue star spins clockwise slowly, static camera",
    "a yellow triangle grows quickly, camera pans left",
    "a green square bounces quickly, static camera",
    "a purple ring wanders, camera zooms out",
)


def teach(folder: Path, config: TeachConfig) -> Path:
    """Train, or go on training, and return the teacher's folder.

    Raises:
        ConfigError: the run folder was begun with another configuration.
        Interrupted: a signal came; the same command goes on.
    """
    _write_config(folder, config)
    run = Run(folder, config.seed)
    out = folder / "teacher"
    with run.handling_signals():
        vae = teach_vae(run, config.vae)
        latents, captions = encode_clips(run, vae, config.transformer.num_clips)
        tokenizer = make_tokenizer()
        networks = teach_transformer(run, vae, tokenizer, latents, captions, config)
        if not out.exists():
            save(out, vae, tokenizer, networks, config)
            run.event("teach", 0, done=out.name)
    return out


def _write_config(folder: Path, config: TeachConfig) -> None:
    path = folder / "config.json"
    if path.exists():
        before = TeachConfig.model_validate_json(path.read_text())
        if before != config:
            changed = [n for n, v in config.model_dump().items() if v != before.model_dump()[n]]
            raise ConfigError(
                f"{folder} was begun with other settings (they differ in: {', '.join(changed)}); "
                "give the same ones to go on, or another folder to begin anew"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def train_clips(seed: int, first: int, count: int) -> shapes.Clips:
    """``count`` clips of the training split from its ``first`` on."""
    start = shapes.SPLITS["train"].start + first
    return shapes.clips(seed, range(start, start + count))


def dev_clips(seed: int, count: int) -> shapes.Clips:
    """The first ``count`` clips of the dev split."""
    return shapes.clips(seed, shapes.SPLITS["dev"][:count])


# --- 1. the video autoencoder ---------------------------------------------------------------------------------------


def make_vae(config: VaeConfig) -> AutoencoderKLWan:
    """An untrained autoencoder: 17 x 64 x 64 pixels to 5 x 8 x 8 latents of ``z_dim`` channels."""
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
    )
    inflate(vae)
    return vae


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Begin as an image autoencoder that treats each frame alone (inflation, Carreira and Zisserman 2017).

    A causal convolution that has only seen single frames has only trained the tap of the present frame; the taps of
    the past would come in as noise with the first clip. They begin at zero, and the resampling in time begins by
    keeping the last frame (down) and repeating it (up), so what was learnt on frames is where the clips start.
    """
    for module in vae.modules():
        if not isinstance(module, WanCausalConv3d):
            continue
        if module.kernel_size == (3, 3, 3):
            module.weight[:, :, :-1] = 0
        elif module.kernel_size == (3, 1, 1):
            copies = module.out_channels // module.in_channels
            module.weight.zero_()
            module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
            if module.bias is not None:
                module.bias.zero_()


def teach_vae(run: Run, config: VaeConfig) -> AutoencoderKLWan:
    """Train the autoencoder in its two phases. Reconstruction plus a very small Kullback-Leibler term."""
    torch.manual_seed(run.seed)
    vae = make_vae(config)
    held_out = dev_clips(run.seed, 8).video_BCTHW

    def loss_on(video_BCTHW: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        posterior = vae.encode(video_BCTHW).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        with torch.no_grad():
            psnr = losses.psnr_db(decoded, video_BCTHW).mean().item()
        return losses.reconstruction(decoded, video_BCTHW) + config.kl_weight * kl, {"psnr_db": psnr}

    def frames(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = config.frames.batch
        # One drawn clip gives several frames: drawing is the cheap part, but variety is what one frame each adds.
        video_BCTHW = train_clips(run.seed, step * batch, batch).video_BCTHW
        which_B = torch.randint(shapes.NUM_FRAMES, (batch,), generator=generator)
        return loss_on(video_BCTHW[torch.arange(batch), :, which_B][:, :, None], generator)

    def clips(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = config.clips.batch
        first = config.frames.steps * config.frames.batch + step * batch
        return loss_on(train_clips(run.seed, first, batch).video_BCTHW, generator)

    def sample_frames(path: Path) -> dict[str, float]:
        return sample(path, held_out[:, :, -1:])

    def sample_clips(path: Path) -> dict[str, float]:
        return sample(path, held_out)

    def sample(path: Path, video_BCTHW: Tensor) -> dict[str, float]:
        decoded = vae.decode(vae.encode(video_BCTHW).latent_dist.mean).sample
        report.contact_sheet(path, [video_BCTHW, decoded])
        psnr_BT = losses.psnr_db(decoded, video_BCTHW)
        return {"dev_psnr_db": psnr_BT.mean().item(), "dev_worst_frame_psnr_db": psnr_BT.mean(0).min().item()}

    fit(run, "vae-frames", vae, frames, config.frames, sample_frames)
    fit(run, "vae-clips", vae, clips, config.clips, sample_clips)
    return vae.eval().requires_grad_(False)


# --- 2. latents -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_clips(run: Run, vae: AutoencoderKLWan, count: int) -> tuple[Tensor, list[str]]:
    """Normalised latents ``[count, C, T, H, W]`` (fp16) and captions of the first training clips.

    Sets ``latents_mean`` and ``latents_std`` of the autoencoder from these data.
    """
    path = run.folder / "latents.safetensors"
    captions = [str(c) for c in shapes.sample(run.seed, shapes.SPLITS["train"][:count])[0]]
    if not path.exists():
        started, chunk, rows = time.monotonic(), 16, []
        for first in range(0, count, chunk):
            run.check_stop()
            video_BCTHW = train_clips(run.seed, first, min(chunk, count - first)).video_BCTHW
            rows.append(vae.encode(video_BCTHW).latent_dist.mean)
            if first // chunk % 25 == 0:
                rate = (first + chunk) / (time.monotonic() - started)
                run.say(f"latents {first}/{count}  {rate:.1f} clips/s  {(count - first) / rate / 60:.1f} min left")
        raw = torch.cat(rows)
        mean_C, std_C = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
        normalised = (raw - mean_C.view(1, -1, 1, 1, 1)) / std_C.view(1, -1, 1, 1, 1)
        aside = path.with_suffix(".tmp")
        save_file({"latents": normalised.half(), "mean": mean_C, "std": std_C}, aside)
        os.replace(aside, path)
    stored = load_file(path)
    vae.register_to_config(latents_mean=stored["mean"].tolist(), latents_std=stored["std"].tolist())
    return stored["latents"], captions


# --- 3. the transformer and its text encoder -------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer, as Wan's, whose pieces are the words of the grammar, and single letters for all else."""
    words = sorted({w for part in shapes.GRAMMAR.parts for c in part.choices for w in f"{part.prefix}{c}".split()})
    words = [w for w in words if w != ","]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", -2.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Networks(nn.Module):
    """What is trained together in the third step."""

    def __init__(self, config: TransformerConfig, z_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocab_size,
                d_model=config.text_dim,
                d_kv=32,
                d_ff=2 * config.text_dim,
                num_heads=config.text_dim // 32,
                num_layers=config.text_layers,
                dropout_rate=0.0,
            )
        )
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=z_dim,
            out_channels=z_dim,
            text_dim=config.text_dim,
            freq_dim=64,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            rope_max_seq_len=64,
        )


def teach_transformer(
    run: Run,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    captions: list[str],
    config: TeachConfig,
) -> Networks:
    """Rectified flow on cached latents; the first latent frame is given clean and is not in the loss."""
    torch.manual_seed(run.seed + 1)
    settings = config.transformer
    networks = Networks(settings, config.vae.z_dim, len(tokenizer))
    held_out = dev_clips(run.seed, 12)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = settings.fit.batch
        order = torch.randperm(len(latents), generator=run.generator("epoch", step * batch // len(latents)))
        position = step * batch % len(latents)
        rows = order.roll(-position)[:batch]
        x0_BCTHW = latents[rows].float()
        dropped_B = (torch.rand(batch, generator=generator) < settings.text_drop).tolist()
        prompts = ["" if dropped else captions[row] for row, dropped in zip(rows.tolist(), dropped_B, strict=True)]
        sigma_B = schedule.sample_sigmas(batch, settings.shift, generator)
        noise_BCTHW = torch.randn(x0_BCTHW.shape, generator=generator)
        x_BCTHW = torch.lerp(x0_BCTHW, noise_BCTHW, sigma_B[:, None, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            text_BLD = wan.encode_text(tokenizer, networks.text_encoder, prompts, settings.max_sequence_length)
            velocity = wan.predict_velocity(networks.transformer, x_BCTHW, sigma_B, x0_BCTHW[:, :, :1], text_BLD)
        return losses.flow_matching(velocity, x0_BCTHW, noise_BCTHW), {}

    def sample(path: Path) -> dict[str, float]:
        pipeline = make_pipeline(vae, tokenizer, networks, config)
        prompts = [str(caption) for caption in held_out.captions]
        networks.eval()
        made = sampler.sample(pipeline, held_out.video_BCTHW[:, :, 0], prompts, make_call(config), seed=run.seed)
        networks.train()
        report.contact_sheet(path, [held_out.video_BCTHW, made])
        closed = torch.tensor([c.closed for c in held_out.captions])
        return {"dev_closed_psnr_db": losses.psnr_db(made, held_out.video_BCTHW)[closed].mean().item()}

    fit(run, "transformer", networks, loss, settings.fit, sample)
    return networks.eval().requires_grad_(False)


# --- 4. the folder --------------------------------------------------------------------------------------------------


def make_pipeline(
    vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, networks: Networks, config: TeachConfig
) -> WanImageToVideoPipeline:
    """The stock pipeline of these parts; its scheduler has the shift of the training."""
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=networks.text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.transformer.shift),
        transformer=networks.transformer,
        expand_timesteps=True,
    )


def make_call(config: TeachConfig) -> dict[str, Any]:
    """Keyword arguments of the stock pipeline that make one clip of this world."""
    return {
        **config.call.model_dump(),
        "height": shapes.SIZE,
        "width": shapes.SIZE,
        "num_frames": shapes.NUM_FRAMES,
        "max_sequence_length": config.transformer.max_sequence_length,
    }


def save(
    out: Path, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, networks: Networks, config: TeachConfig
) -> student.Card:
    """Write the pipeline folder with its card, fp16, aside and renamed."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline = make_pipeline(vae, tokenizer, networks, config)
    scheduler = pipeline.scheduler
    parts = {"transformer": networks.transformer, "text_encoder": networks.text_encoder, "vae": vae}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    pipeline.to(torch.float16)
    pipeline.save_pretrained(aside)
    scheduler.set_timesteps(config.call.num_inference_steps)
    card = student.Card(
        kind="teacher",
        name=config.name,
        created_at=student.now(),
        backbone="wan",
        task="ti2v",
        parameters=counts,
        call=make_call(config),
        sigmas=tuple(round(s, 6) for s in scheduler.sigmas[:-1].tolist()),
        prompt=shapes_prompt(),
        video=student.Video(width=shapes.SIZE, height=shapes.SIZE, num_frames=shapes.NUM_FRAMES, fps=shapes.FPS),
        stages=tuple(_stages(config)),
        metrics={},
        files={},
    )
    card = student.write_card(aside, card)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)
    return card


def shapes_prompt() -> Prompt:
    """The world's grammar as the card carries it."""
    return Prompt(
        kind="grammar",
        help="a {colour} {shape} {motion}[ {pace}][, {camera}][, and a {shape} enters]; "
        "what is left out is left to the model",
        examples=EXAMPLES,
        grammar=shapes.GRAMMAR,
    )


def _stages(config: TeachConfig) -> list[dict[str, Any]]:
    fits = {
        "vae-frames": config.vae.frames,
        "vae-clips": config.vae.clips,
        "transformer": config.transformer.fit,
    }
    return [
        {"name": name, "config_sha256": fit.sha256, "seed": config.seed, "iterations": fit.steps, "batch": fit.batch}
        for name, fit in fits.items()
    ]
