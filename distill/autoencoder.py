"""The video autoencoder of a taught world: built, begun, trained on frames and then on clips, all frames at once.

Shape suffixes: B clip, C channel, T frame, H row, W column.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor

from distill import losses, report
from distill.backbones.wan_autoencoder import decode, encode, in_one_pass
from distill.config import VaeConfig, VaePhase
from distill.data import shapes
from distill.loop import Run, compiled, fit, training_device


def make(config: VaeConfig) -> AutoencoderKLWan:
    """An untrained autoencoder: 17 x 64 x 64 pixels to 5 x 8 x 8 latents of ``z_dim`` channels."""
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
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


# --- training -------------------------------------------------------------------------------------------------------


def teach(run: Run, config: VaeConfig) -> AutoencoderKLWan:
    """Train the autoencoder in its three phases. Reconstruction plus a small Kullback-Leibler term.

    The latents are drawn from the posterior, so the decoder learns to forgive small errors of a denoiser; the weight
    of the Kullback-Leibler term says how large they may be.
    """
    torch.manual_seed(run.seed)
    device = training_device()
    vae = in_one_pass(make(config)).to(device)
    held_out = shapes.clips(run.seed, shapes.SPLITS["dev"][:32]).video_BCTHW.to(device)

    def objective(video_BCTHW: Tensor, noise_BCTHW: Tensor, l1_weight: float, mse_weight: float) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            mean_BCTHW, log_variance_BCTHW = (moment.float() for moment in encode(vae, video_BCTHW))
            drawn = mean_BCTHW + (0.5 * log_variance_BCTHW).exp() * noise_BCTHW
            decoded_BCTHW = decode(vae, drawn).float()
        kl = 0.5 * (mean_BCTHW.square() + log_variance_BCTHW.exp() - 1 - log_variance_BCTHW).mean()
        loss = losses.reconstruction(decoded_BCTHW, video_BCTHW, l1_weight, mse_weight) + config.kl_weight * kl
        with torch.no_grad():
            psnr = losses.psnr_db(decoded_BCTHW, video_BCTHW).mean()
        return [loss, psnr]

    run_objective = compiled(run, objective) if config.compile else objective

    def loss_on(video_BCTHW: Tensor, generator: torch.Generator, phase: VaePhase) -> tuple[Tensor, dict[str, float]]:
        batch, _, num_frames, height, width = video_BCTHW.shape
        shape = (batch, config.z_dim, 1 + (num_frames - 1) // 4, height // 8, width // 8)
        noise_BCTHW = torch.randn(shape, generator=generator).to(device)
        # Channels last: what the convolutions of this size are fastest in.
        video_BCTHW = video_BCTHW.to(device).contiguous(memory_format=torch.channels_last_3d)
        loss, psnr = run_objective(video_BCTHW, noise_BCTHW, phase.l1_weight, phase.mse_weight)
        return loss, {"psnr_db": psnr.item()}

    def frames(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = config.frames.batch
        # One frame of each clip: in a batch with many colours the gradient has far less noise (measured: 20.0 dB
        # against 17.5 dB after 260 updates where four frames of each clip were taken).
        start = shapes.SPLITS["train"].start + step * batch
        _, scene = shapes.sample(run.seed, range(start, start + batch))
        which_B1 = torch.randint(shapes.NUM_FRAMES, (batch, 1), generator=generator)
        return loss_on(shapes.render(scene.to(device), which_B1, chunk=batch), generator, config.frames)

    def clips(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return whole(config.clips, config.frames.steps * config.frames.batch, step, generator)

    def polish(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        seen = config.frames.steps * config.frames.batch + config.clips.steps * config.clips.batch
        return whole(config.polish, seen, step, generator)

    def whole(phase: VaePhase, seen: int, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        start = shapes.SPLITS["train"].start + seen + step * phase.batch
        _, scene = shapes.sample(run.seed, range(start, start + phase.batch))
        return loss_on(shapes.render(scene.to(device)), generator, phase)

    fit(run, "vae-frames", vae, frames, config.frames, _sampler(vae, held_out[:, :, -1:]))
    fit(run, "vae-clips", vae, clips, config.clips, _sampler(vae, held_out))
    fit(run, "vae-polish", vae, polish, config.polish, _sampler(vae, held_out))
    return vae.eval().requires_grad_(False)


def _sampler(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> Callable[[Path], dict[str, float]]:
    """Reconstruct held-out videos in full precision, as they will be used."""

    def sample(path: Path) -> dict[str, float]:
        decoded = torch.cat([decode(vae, encode(vae, part)[0]) for part in video_BCTHW.split(4)])
        report.contact_sheet(path, [video_BCTHW[:8].cpu(), decoded[:8].cpu()])
        psnr_BT = losses.psnr_db(decoded, video_BCTHW)
        return {"dev_psnr_db": psnr_BT.mean().item(), "dev_worst_frame_psnr_db": psnr_BT.mean(0).min().item()}

    return sample
