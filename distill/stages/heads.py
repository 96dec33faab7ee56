"""Heads of discriminators: logits from a denoiser's tokens. Methods differ in whose tokens, and in the loss.

Shape suffixes: B clip, T latent frame, N token of a frame, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

OCTAVES = 4


def token_head(width: int) -> nn.Sequential:
    """A logit for each token (DMD2, W2SVD)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


class SpaceTimeHead(nn.Module):
    """A logit for each clip, of two heads: what each place shows on average, and how the frames follow each other.

    They are told the noise level (ICMD's multi-content adversarial loss, ported to tokens).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.level = nn.Linear(2 * OCTAVES, width)
        self.spatial = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.temporal = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.SiLU(), nn.Conv1d(width, 1, 1))

    def forward(self, tokens_BTND: Tensor, sigma_B: Tensor) -> Tensor:
        """``[B]``."""
        angle_BO = sigma_B[:, None] * math.pi * 2.0 ** torch.arange(OCTAVES, device=sigma_B.device)
        level_BD = self.level(torch.cat([angle_BO.cos(), angle_BO.sin()], dim=1))
        tokens_BTND = self.norm(tokens_BTND.float()) + level_BD[:, None, None]
        place_BN1 = self.spatial(tokens_BTND.mean(dim=1))
        frame_B1T = self.temporal(tokens_BTND.mean(dim=2).transpose(1, 2))
        return place_BN1.mean(dim=(1, 2)) + frame_B1T.mean(dim=(1, 2))
