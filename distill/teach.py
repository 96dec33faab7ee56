"""`python -m distill teach shapes FOLDER`: a small image-to-video teacher, from nothing, on any machine.

The parts of a stock `WanImageToVideoPipeline` (Wan2.2-TI2V style) at tiny size, trained in this order, each skipped
when its result is already in the folder:

1. the video autoencoder, on single frames and then on whole clips (`distill.autoencoder`);
2. latents of the training clips, encoded once, and their mean and deviation;
3. the transformer with its text encoder, by rectified flow on those latents;
4. the folder, `FOLDER/teacher`, written aside and renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from distill import autoencoder, latents, losses, report, sampler, schedule, student
from distill.backbones import wan
from distill.config import TeachConfig, TransformerConfig
from distill.data import shapes
from distill.loop import Run, compiled, fit, remember, training_device
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
    remember(folder, config)
    run = Run(folder, config.seed)
    out = folder / "teacher"
    with run.handling_signals():
        vae = autoencoder.teach(run, config.vae)
        clips = encode_clips(run, vae, config.transformer.num_clips, config.vae.compile)
        tokenizer = make_tokenizer()
        networks = teach_transformer(run, vae, tokenizer, clips, config)
        if not out.exists():
            save(out, vae, networks, config)
            run.event("teach", 0, done=out.name)
    return out


# --- latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_clips(run: Run, vae: AutoencoderKLWan, count: int, compile: bool) -> latents.Latents:
    """Normalised latents and captions of the first training clips.

    Sets ``latents_mean`` and ``latents_std`` of the autoencoder from these data.
    """
    path = run.folder / "latents.safetensors"
    indices = shapes.SPLITS["train"][:count]
    if not path.exists():
        raw = latents.encode(run, vae, indices, compile)
        mean_C, std_C = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean_C.tolist(), latents_std=std_C.tolist())
        latents.store(path, wan.normalise(vae, raw), mean=mean_C, std=std_C)
    stored = load_file(path)
    vae.register_to_config(latents_mean=stored["mean"].tolist(), latents_std=stored["std"].tolist())
    return latents.Latents(stored["latents"], [str(c) for c in shapes.sample(run.seed, indices)[0]])


# --- the transformer and its text encoder ---------------------------------------------------------------------------

HELD_OUT = 96
"""Clips of the dev split that are looked at while it trains."""


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
    clips: latents.Latents,
    config: TeachConfig,
) -> Networks:
    """Rectified flow on cached latents; the first latent frame is given clean and is not in the loss."""
    torch.manual_seed(run.seed + 1)
    settings, device = config.transformer, training_device()
    networks = Networks(settings, config.vae.z_dim, len(tokenizer)).to(device)
    held_out = shapes.clips(run.seed, shapes.SPLITS["dev"][:HELD_OUT])
    with torch.no_grad():
        held_x0 = wan.encode_video(vae, held_out.video_BCTHW.to(device))
    held_tokens = wan.tokenize(tokenizer, [str(c) for c in held_out.captions], settings.max_sequence_length)
    ids_NL, mask_NL = wan.tokenize(tokenizer, [*clips.captions, ""], settings.max_sequence_length)

    def objective(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        x_BCTHW = torch.lerp(x0_BCTHW, noise_BCTHW, sigma_B[:, None, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            text = {"text": wan.embed_tokens(networks.text_encoder, ids_BL, mask_BL)}
            velocity = wan.predict_velocity(networks.transformer, x_BCTHW, sigma_B, wan.image_of(x0_BCTHW, {}), text)
        return losses.flow_matching(*(x[:, :, wan.GIVEN_FRAMES :] for x in (velocity, x0_BCTHW, noise_BCTHW)))

    run_objective = compiled(run, objective) if settings.compile else objective

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = settings.fit.batch
        rows_B = clips.rows(run, step, batch)
        x0_BCTHW = clips.x0_NCTHW[rows_B].float()
        dropped_B = torch.rand(batch, generator=generator) < settings.text_drop
        text_B = torch.where(dropped_B, len(clips.captions), rows_B)
        sigma_B = schedule.sample_sigmas(batch, settings.shift, generator)
        noise_BCTHW = torch.randn(x0_BCTHW.shape, generator=generator)
        batch_on_device = (x.to(device) for x in (x0_BCTHW, noise_BCTHW, sigma_B, ids_NL[text_B], mask_NL[text_B]))
        return run_objective(*batch_on_device), {}

    def sample(path: Path) -> dict[str, float]:
        pipeline = make_pipeline(vae, tokenizer, networks, config)
        shown = held_out.video_BCTHW[:12]
        prompts = [str(caption) for caption in held_out.captions[:12]]
        networks.eval()
        first_BCHW = shown[:, :, 0].to(device)
        call = make_call(config)
        noise_BCTHW = sampler.draw_noise(wan, pipeline, range(len(prompts)), call)
        made = sampler.sample(wan, pipeline, first_BCHW, prompts, call, noise_BCTHW).cpu()
        networks.train()
        report.contact_sheet(path, [shown, made])
        closed = torch.tensor([c.closed for c in held_out.captions[:12]])
        return {
            "dev_closed_psnr_db": losses.psnr_db(made, shown)[closed].mean().item(),
            "dev_loss": dev_loss(),
        }

    @torch.no_grad()
    def dev_loss() -> float:
        """The loss on clips that are not trained on. Far above that of training it tells of too few clips."""
        generator = run.generator("transformer/dev", 0)
        sigma_B = schedule.sample_sigmas(len(held_x0), settings.shift, generator).to(device)
        noise_BCTHW = torch.randn(held_x0.shape, generator=generator).to(device)
        return objective(held_x0, noise_BCTHW, sigma_B, *(x.to(device) for x in held_tokens)).item()

    fit(run, "transformer", networks, loss, settings.fit, sample)
    return networks.eval().requires_grad_(False)


# --- the folder -----------------------------------------------------------------------------------------------------


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


def save(out: Path, vae: AutoencoderKLWan, networks: Networks, config: TeachConfig) -> student.Card:
    """Write the pipeline folder with its card, fp16, aside and renamed."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    # A new tokenizer: one that was used keeps the padding it was asked for, and would be saved with it.
    pipeline = make_pipeline(vae, make_tokenizer(), networks, config)
    scheduler = pipeline.scheduler
    parts = {"transformer": networks.transformer, "text_encoder": networks.text_encoder, "vae": vae}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    pipeline.to("cpu", torch.float16)
    pipeline.save_pretrained(aside)
    card = student.Card(
        kind="teacher",
        name=config.name,
        created_at=student.now(),
        backbone="wan",
        task="ti2v",
        parameters=counts,
        call=make_call(config),
        sigmas=schedule.visited(wan, scheduler, config.call.num_inference_steps),
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
        "vae-polish": config.vae.polish,
        "transformer": config.transformer.fit,
    }
    return [
        {"name": name, "config_sha256": fit.sha256, "seed": config.seed, "iterations": fit.steps, "batch": fit.batch}
        for name, fit in fits.items()
    ]
