"""Training losses: pure functions, one per equation.

Shape suffixes: B clip, C channel, T frame (of latents where a network's output is meant), H row, W column. Latents are
without their given frames (``Batch.made``). "Secondary notes" and "reconstructed": see
docs/method.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def flow_matching(velocity_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Rectified flow, mean || v - (noise - x_0) ||^2 (Liu et al. 2022, equation 1)."""
    return (velocity_BCTHW - (noise_BCTHW - x0_BCTHW)).float().square().mean()


def clean(x_BCTHW: Tensor, sigma_B: Tensor, velocity_BCTHW: Tensor) -> Tensor:
    """X(x_s, s) = x_s - s v: Tweedie's estimate of the clean latents from one velocity."""
    return x_BCTHW - over_clips(sigma_B) * velocity_BCTHW


def over_clips(value_B: Tensor) -> Tensor:
    """One number for each clip, shaped to go with ``[B, C, T, H, W]``."""
    return value_B[:, None, None, None, None]


# --- stage I --------------------------------------------------------------------------------------------------------


def velocity_error(velocity_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """``[B]``: mean square of v - (noise - x_0), clip by clip."""
    error_BCTHW = velocity_BCTHW - (noise_BCTHW - x0_BCTHW)
    return error_BCTHW.float().square().mean(dim=(1, 2, 3, 4))


def error_weight(sigma: Tensor, shift: float, weighting: Literal["elbo", "uniform_v", "x0"]) -> Tensor:
    """Weight of a squared velocity error at noise levels drawn from the uniform distribution moved by ``shift``.

    ``elbo``: the integrand (1 - s) / s of -log p(x_0) <= const + Int w(s) E || v - v_hat ||^2 ds, over the density
    k / (k - (k - 1) s)^2 that the levels were drawn with. ``uniform_v``: 1, a training loss. ``x0``: s^2, the error of
    the clean estimate.
    """
    if weighting == "elbo":
        density = shift / (shift - (shift - 1) * sigma).square()
        return (1 - sigma) / sigma / density
    return torch.ones_like(sigma) if weighting == "uniform_v" else sigma.square()


# --- stage II -------------------------------------------------------------------------------------------------------


def depth_matching(
    pruned_BCTHW: Tensor, unpruned_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor, alpha: float
) -> Tensor:
    """L_II = alpha || F(x; M) - sg F(x; {}) ||^2 + (1 - alpha) || F(x; M) - (noise - x_0) ||^2 (secondary notes)."""
    apart = (pruned_BCTHW - unpruned_BCTHW.detach()).float().square().mean()
    return alpha * apart + (1 - alpha) * flow_matching(pruned_BCTHW, x0_BCTHW, noise_BCTHW)


# --- stage III ------------------------------------------------------------------------------------------------------


def guided(
    full_BCTHW: Tensor, uncond_BCTHW: Tensor, pruned_BCTHW: Tensor | None, text_B: Tensor, intra_B: Tensor
) -> Tensor:
    """R = A + text (A - N) + intra (A - P): the well-guided teacher (reconstructed).

    In velocities or in clean estimates alike: both are linear in each other at one x and s.

    Args:
        full_BCTHW: A, the real network with the caption.
        uncond_BCTHW: N, with the empty caption.
        pruned_BCTHW: P, with the caption and without the pruned blocks; None leaves the last term out.
        text_B: beta_1 in extra units (0 is no guidance).
        intra_B: beta_2, or beta_2 - 1 where interpolation is meant.
    """
    real_BCTHW = full_BCTHW + over_clips(text_B) * (full_BCTHW - uncond_BCTHW)
    if pruned_BCTHW is None:
        return real_BCTHW
    return real_BCTHW + over_clips(intra_B) * (full_BCTHW - pruned_BCTHW)


def matching_gradient(y_BCTHW: Tensor, real_BCTHW: Tensor, fake_BCTHW: Tensor) -> Tensor:
    """g = (X_fake - X_real) / mean | y - X_real |, the mean over each clip (Yin et al. 2024, DMD2, as its code has it).

    A NaN counts as 0 there; here it ends the training.

    No gradient flows into it.
    """
    with torch.no_grad():
        scale_B = (y_BCTHW - real_BCTHW).abs().mean(dim=(1, 2, 3, 4))
        return (fake_BCTHW - real_BCTHW) / over_clips(scale_B.clamp(min=1e-6))


def distribution_matching(y_BCTHW: Tensor, gradient_BCTHW: Tensor) -> Tensor:
    """1/2 mean || y - sg(y - g) ||^2, whose derivative by y is g / numel."""
    return 0.5 * (y_BCTHW - (y_BCTHW - gradient_BCTHW).detach()).square().mean()


def discriminator(real_logit_B: Tensor, fake_logit_B: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-D(real)) + softplus(D(fake)) (Goodfellow et al. 2014; DMD2)."""
    return softplus(-real_logit_B).mean() + softplus(fake_logit_B).mean()


def deceive(fake_logit_B: Tensor) -> Tensor:
    """The student's side, of ``discriminator`` and of ``hinge``: mean softplus(-D(fake)), which is -log sigmoid D."""
    return softplus(-fake_logit_B).mean()


# --- other methods ---------------------------------------------------------------------------------------------------


def pseudo_huber(difference_BCTHW: Tensor, width: float) -> Tensor:
    """mean sqrt(d^2 + c^2) - c (Song and Dhariwal 2024; LCM's code)."""
    return ((difference_BCTHW.float().square() + width**2).sqrt() - width).mean()


def feature_distance(student_BTND: Tensor, teacher_BTND: Tensor) -> Tensor:
    """ICMD's individual content distillation of one block: || h^S - h^T ||^2 / || h^T ||^2, frame by frame (ported)."""
    student_BTND, teacher_BTND = student_BTND.float(), teacher_BTND.detach().float()
    apart_BT = (student_BTND - teacher_BTND).square().mean(dim=(2, 3))
    return (apart_BT / teacher_BTND.square().mean(dim=(2, 3))).mean()


def hinge(real_logit_B: Tensor, fake_logit_B: Tensor) -> Tensor:
    """The discriminator's side in ICMD: mean max(0, 1 - D(real)) + max(0, 1 + D(fake))."""
    return relu(1 - real_logit_B).mean() + relu(1 + fake_logit_B).mean()


# --- pixels ---------------------------------------------------------------------------------------------------------


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
