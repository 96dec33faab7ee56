"""Training losses: pure functions, one per equation."""

from __future__ import annotations

from torch import Tensor


def flow_matching(velocity_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Rectified flow, mean || v - (noise - x_0) ||^2 (Liu et al. 2022, equation 1), the given first frame left out."""
    error = velocity_BCTHW - (noise_BCTHW - x0_BCTHW)
    return error[:, :, 1:].float().square().mean()


def reconstruction(video_BCTHW: Tensor, target_BCTHW: Tensor, l1_weight: float, mse_weight: float) -> Tensor:
    """Weighted mean absolute and mean squared error of videos in [-1, 1]."""
    error = video_BCTHW - target_BCTHW
    return l1_weight * error.abs().mean() + mse_weight * error.square().mean()


def psnr_db(video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """``[B, T]``: peak signal to noise ratio of every frame, videos in [-1, 1]."""
    return _psnr_db(video_BCTHW, target_BCTHW, (1, 3, 4))


def clip_psnr_db(video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """``[B]``: peak signal to noise ratio of the whole clip (not the mean of its frames'), videos in [-1, 1]."""
    return _psnr_db(video_BCTHW, target_BCTHW, (1, 2, 3, 4))


def _psnr_db(video_BCTHW: Tensor, target_BCTHW: Tensor, over: tuple[int, ...]) -> Tensor:
    mse = (video_BCTHW.clamp(-1, 1) - target_BCTHW).square().mean(dim=over)
    return 10 * (4 / mse.clamp(min=1e-10)).log10()
