"""`AutoencoderKLWan`, two ways through the same modules.

The stock way walks through a clip a latent frame at a time and keeps what its convolutions need of the past. That
bounds the memory of a long video (`decode_in_pieces` hands out each piece when it is done); a clip of a few small
frames it makes slow. `in_one_pass` adds a second way, all frames at once, with equal results.

Shape suffixes: B clip, C channel, T frame, H row, W column.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, patchify, unpatchify
from torch import Tensor
from torch.nn import functional as F


def decode_in_pieces(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """The video of raw latents as the stock ``decode`` makes it: one frame, then four for each further latent frame."""
    hidden = vae.post_quant_conv(latents_BCTHW)
    vae.clear_cache()
    try:
        for frame in range(hidden.shape[2]):
            vae._conv_idx = [0]
            piece = vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
            yield _unpatched(vae, piece).clamp(-1, 1)
    finally:
        vae.clear_cache()


def decode_bytes(vae: AutoencoderKLWan, num_frames: int, height: int, width: int) -> int:
    """About what decoding so many frames of this size at a time takes: four feature maps of the last stage."""
    patch = vae.config.patch_size or 1
    channels = (vae.config.decoder_base_dim or vae.config.base_dim) * vae.config.dim_mult[0]
    return 4 * num_frames * (height // patch) * (width // patch) * channels * vae.dtype.itemsize


def in_one_pass(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Teach the modules of ``vae`` to take a whole clip where they are given no cache. The stock way stays as it is."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = MethodType(_causal_conv, module)
        elif isinstance(module, WanResample):
            module.forward = MethodType(_resample, module)
    return vae


def encode(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents of ``4 n + 1`` frames, after `in_one_pass`."""
    hidden = vae.encoder(_patched(vae, video_BCTHW))
    mean_BCTHW, log_variance_BCTHW = vae.quant_conv(hidden).chunk(2, dim=1)
    return mean_BCTHW, log_variance_BCTHW


def decode(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Video of raw (not normalised) latents, after `in_one_pass`; not clamped: a clamp would stop the gradient."""
    hidden = vae.decoder(vae.post_quant_conv(latents_BCTHW), first_chunk=True)
    return _unpatched(vae, hidden)


def _patched(vae: AutoencoderKLWan, video_BCTHW: Tensor) -> Tensor:
    patch = vae.config.patch_size
    return video_BCTHW if patch is None else patchify(video_BCTHW, patch)


def _unpatched(vae: Any, video_BCTHW: Tensor) -> Tensor:
    patch = vae.config.patch_size
    return video_BCTHW if patch is None else unpatchify(video_BCTHW, patch)


def _causal_conv(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if x.shape[2] == 1 and cache_x is None and self.kernel_size == (3, 3, 3) and self.stride == (1, 1, 1):
        # Before a single frame there are only zeros: one tap in time is left.
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=1)[:, :, None]
    return WanCausalConv3d.forward(self, x, cache_x)


def _resample(self: WanResample, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] = [0]) -> Tensor:  # noqa: B006 (the stock signature)
    if feat_cache is not None:
        return WanResample.forward(self, x, feat_cache, feat_idx)
    batch, channels, frames, height, width = x.shape
    if self.mode == "upsample3d" and frames > 1:
        # Every latent frame but the first becomes two; the convolution in time starts after the first one.
        twice = self.time_conv(x[:, :, 1:]).reshape(batch, 2, channels, frames - 1, height, width)
        twice = twice.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * (frames - 1), height, width)
        x = torch.cat([x[:, :, :1], twice], dim=2)
    flat = x.transpose(1, 2).flatten(0, 1)
    y = self.resample(flat).unflatten(0, (batch, x.shape[2])).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        y = torch.cat([y[:, :, :1], self.time_conv(y)], dim=2)  # stride 2, and the first frame stays as it is
    return y
