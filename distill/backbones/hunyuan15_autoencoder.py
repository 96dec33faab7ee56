"""`AutoencoderKLHunyuanVideo15`: causal in time, and all frames at once.

One clip at a time: the stock mask of its attention fits no other number.

What is not here is as in `distill.backbones.hunyuan_autoencoder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from torch import Tensor, nn

from distill.backbones import hunyuan_autoencoder

FRAMES_IN_A_PIECE = None
"""All of them."""


def encode_video(vae: Any, video_BCTHW: Tensor) -> Tensor:
    """Normalised latents (posterior mean) of a video in [-1, 1] with 4 n + 1 frames."""
    return torch.cat([hunyuan_autoencoder.encode_video(vae, clip_1CTHW) for clip_1CTHW in video_BCTHW.split(1)])


def decode_latents(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Video in [-1, 1] from normalised latents."""
    return torch.cat([hunyuan_autoencoder.decode_latents(vae, clip_1CTHW) for clip_1CTHW in latents_BCTHW.split(1)])


def in_one_pass(vae: Any) -> Any:
    """Its attention's mask made at once: the stock way writes it row by row."""
    for module in vae.modules():
        if isinstance(module, HunyuanVideo15AttnBlock):
            module.prepare_causal_attention_mask = _causal_mask
    return vae


def _causal_mask(n_frame: int, n_hw: int, dtype: torch.dtype, device: Any, batch_size: int) -> Tensor:
    frame_N = torch.arange(n_frame, device=device).repeat_interleave(n_hw)
    mask_NN = torch.zeros(len(frame_N), len(frame_N), dtype=dtype, device=device)
    return mask_NN.masked_fill(frame_N[:, None] < frame_N, -torch.inf).expand(batch_size, 1, -1, -1)


def decode_in_pieces(vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """The same video, in one piece."""
    yield decode_latents(vae, latents_BCTHW)


class WholeDecoder(nn.Module):
    """The same video as one graph for an engine."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        in_one_pass(vae)
        self.config, self.dtype, self.decoder = vae.config, vae.dtype, vae.decoder

    def forward(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # noqa: ARG002 (as of every model)
        """Video in [-1, 1] from normalised latents ``[B, C, T, H, W]``, in a tuple."""
        return (self.decoder(latents.to(self.dtype) / self.config.scaling_factor).clamp(-1, 1),)
