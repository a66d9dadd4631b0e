"""The public op for what stands between two forwards of a denoising run. For inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels.backend import launching_on
from qandc_kernels.ops._checks import check_guided_step
from qandc_kernels.ops._register import register

__all__ = ["guided_step"]


def _guided_step(
    prediction: torch.Tensor, latents: torch.Tensor, coefficients: torch.Tensor, guidance_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from qandc_kernels.triton.denoise import guided_step_triton

    with launching_on(latents):
        return guided_step_triton(
            prediction.contiguous(), latents.contiguous(), coefficients.contiguous(), guidance_scale
        )


def _guided_step_fake(
    prediction: torch.Tensor, latents: torch.Tensor, coefficients: torch.Tensor, guidance_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.new_empty(latents.shape), prediction.new_empty((len(prediction), *latents.shape[1:]))


register(
    "guided_step",
    "(Tensor prediction, Tensor latents, Tensor coefficients, float? guidance_scale) -> (Tensor, Tensor)",
    _guided_step,
    _guided_step_fake,
)


def guided_step(
    prediction: torch.Tensor, latents: torch.Tensor, coefficients: torch.Tensor, guidance_scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One deterministic step of a first-order sampler: ``x' = a · x + b · ε + d``, and the input of the next forward.

    ``ε = ε_uncond + guidance_scale · (ε_cond - ε_uncond)`` (classifier-free guidance, Ho and Salimans 2022), or the
    prediction itself. A DDIM step (Song et al. 2021, Eq. 12, η = 0) has ``a = √(ᾱ'/ᾱ)`` and
    ``b = √(1 - ᾱ') - a √(1 - ᾱ)``; variance compensation (Q&C, arXiv 2503.02508, Sec. 3.2) is a gain and a mean per
    channel, which a, b and d take in. In float32.

    Args:
        prediction: ``[2 B, C', H, W]`` float16, bfloat16 or float32, conditional rows first; ``[B, C', H, W]`` without
            guidance. Channels beyond the C of the latents are not read.
        latents: x, ``[B, C, H, W] float32``.
        coefficients: a, b and d, ``[3, C] float32``.
        guidance_scale: finite; None for no guidance.

    Returns:
        ``x'`` as ``latents``, contiguous; and the same in the dtype of ``prediction``, once for each of its rows.

    Raises:
        ArgumentError: a dtype, shape, device or scale is not one of the above.
    """
    check_guided_step(prediction, latents, coefficients, guidance_scale)
    return torch.ops.qandc.guided_step(prediction, latents, coefficients, guidance_scale)
