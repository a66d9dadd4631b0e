"""Write a denoising step as one affine map per channel: what a DDIM step and variance compensation come to."""

from __future__ import annotations

from typing import Any

import torch

from qandc.variance_compensation import Compensation

__all__ = ["affine_coefficients", "is_affine", "why_not_plain_ddim"]


def why_not_plain_ddim(scheduler: Any) -> str | None:
    """Say why the steps of a scheduler aren't DDIM without noise, with coefficients that are known ahead, or None."""
    from diffusers import DDIMScheduler

    plain: Any = DDIMScheduler
    if type(scheduler) is not plain:
        return (
            "the scheduler must be DDIMScheduler itself, neither another nor a compensated one (give compensation= "
            f"instead); this is {type(scheduler).__name__}"
        )
    if {"step", "_get_variance"} & vars(scheduler).keys() or scheduler.alphas_cumprod.is_cuda:
        return "the scheduler's methods were replaced, or its coefficients moved to the GPU"
    return None


def is_affine(scheduler: Any) -> bool:
    """Tell whether each step of a scheduler is ``x' = a x + b ε`` with numbers a and b: plain DDIM, nothing clipped."""
    return why_not_plain_ddim(scheduler) is None and not (scheduler.config.clip_sample or scheduler.config.thresholding)


def affine_coefficients(scheduler: Any, channels: int, compensation: Compensation | None) -> torch.Tensor:
    """Return ``[S, 3, C] float32``: a, b and d of ``x' = a x + b ε + d`` in every step of an affine scheduler.

    Compensated samples are ``μ + K (a x + b ε - μ)``, compensated predictions make ``a x + b (μ + K (ε - μ))``.
    """
    # a step is linear, so it shows its coefficients by itself
    x, epsilon = torch.eye(2, dtype=torch.float64, device="cpu")
    ab = [scheduler.step(epsilon, timestep, x, return_dict=False)[0] for timestep in scheduler.timesteps]
    a, b = torch.stack(ab)[:, :, None].expand(-1, -1, channels).unbind(1)
    d = torch.zeros_like(a)
    if compensation is not None:
        gain, mean = (t[: len(a)].cpu().double() for t in (compensation.gain, compensation.mean))
        if compensation.target == "sample":
            a, b, d = gain * a, gain * b, mean * (1 - gain)
        else:
            b, d = gain * b, b * mean * (1 - gain)
    return torch.stack([a, b, d], 1).float()
