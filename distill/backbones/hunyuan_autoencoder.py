"""`AutoencoderKLHunyuanVideo`: latents are scaled, and a long clip is decoded in parts that overlap in time.

Its group norms take in all frames of a part: the first latent frame of a clip is not the latent of the first frame, and
a part decoded alone differs from the same frames of the whole. So the stock parts are kept everywhere, and each is
handed out when it is blended (`decode_in_pieces`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FRAMES_IN_A_PIECE = 17


def encode_video(vae: Any, video_BCTHW: Tensor) -> Tensor:
    """Normalised latents (posterior mean) of a video in [-1, 1] with 4 n + 1 frames."""
    latents_BCTHW: Tensor = vae.encode(video_BCTHW.to(vae.dtype)).latent_dist.mean
    return latents_BCTHW * vae.config.scaling_factor


def in_one_pass(vae: Any) -> Any:
    """As it is: it takes its parts whole."""
    return vae


def decode_latents(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    """Video in [-1, 1] from normalised latents."""
    video_BCTHW: Tensor = vae.decode(_raw(vae, latents_BCTHW), return_dict=False)[0]
    return video_BCTHW.clamp(-1, 1)


def decode_in_pieces(vae: Any, latents_BCTHW: Tensor) -> Iterator[Tensor]:
    """The same video, each piece as soon as it is decoded."""
    return _pieces(lambda part: vae.decoder(vae.post_quant_conv(part)), _raw(vae, latents_BCTHW), _Parts.of(vae))


def decode_bytes(vae: Any, num_frames: int, height: int, width: int) -> int:
    """About what decoding so many frames of this size at a time takes: four feature maps of the last stage."""
    channels: int = vae.config.block_out_channels[0]
    itemsize: int = vae.dtype.itemsize
    return 4 * num_frames * height * width * channels * itemsize


class WholeDecoder(nn.Module):
    """The same video in one call: one graph for an engine."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.config, self.dtype = vae.config, vae.dtype
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder  # not the encoder: it is no part of this
        self._parts = _Parts.of(vae)

    def forward(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # noqa: ARG002 (as of every model)
        """Video in [-1, 1] from normalised latents ``[B, C, T, H, W]``, in a tuple."""
        pieces = _pieces(lambda part: self.decoder(self.post_quant_conv(part)), _raw(self, latents), self._parts)
        return (torch.cat(list(pieces), dim=2),)


def _raw(vae: Any, latents_BCTHW: Tensor) -> Tensor:
    return latents_BCTHW.to(vae.dtype) / vae.config.scaling_factor


class _Parts(NamedTuple):
    """How the stock autoencoder goes through time."""

    latent_frames: int
    """A clip of more is decoded in parts of one more."""
    latent_stride: int
    frames: int
    """Video frames that a part gives, the first one gives one more."""
    blended: int
    """Of them, those that the part before reaches into."""

    @classmethod
    def of(cls, vae: Any) -> _Parts:
        ratio, longest, stride = (
            vae.temporal_compression_ratio,
            vae.tile_sample_min_num_frames,
            vae.tile_sample_stride_num_frames,
        )
        return cls(longest // ratio, stride // ratio, stride, longest - stride)


def _pieces(decode: Callable[[Tensor], Tensor], raw_BCTHW: Tensor, parts: _Parts) -> Iterator[Tensor]:
    """What ``decode`` makes of each part, blended with the one before."""
    count = raw_BCTHW.shape[2]
    if count <= parts.latent_frames:
        yield decode(raw_BCTHW).clamp(-1, 1)
        return
    before: Tensor | None = None
    for first in range(0, count - 1, parts.latent_stride):
        made = decode(raw_BCTHW[:, :, first : first + parts.latent_frames + 1])
        if before is None:
            piece = made[:, :, : parts.frames + 1]
        else:
            made = made[:, :, 1:]
            extent = min(before.shape[2], made.shape[2], parts.blended)
            share_T11 = (torch.arange(extent) / extent).to(made)[:, None, None]
            blended = before[:, :, -extent:] * (1 - share_T11) + made[:, :, :extent] * share_T11
            made = torch.cat([blended, made[:, :, extent:]], dim=2)
            piece = made[:, :, : parts.frames]
        yield piece.clamp(-1, 1)
        before = made
