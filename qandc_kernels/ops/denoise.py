"""Define the public op between two forwards of a denoising run. For inference: results carry no gradient."""

from __future__ import annotations

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._register import launcher, public_op

__all__ = ["guided_step"]

guided_step_triton = launcher("denoise.guided_step_triton")


def _guided_step(prediction, latents, coefficients, guidance_scale):
    given = (prediction.contiguous(), latents.contiguous(), coefficients.contiguous())
    with launching_on(latents):
        return guided_step_triton(*given, guidance_scale)


def _guided_step_fake(prediction, latents, *others):
    return latents.new_empty(latents.shape), prediction.new_empty((len(prediction), *latents.shape[1:]))


guided_step = public_op(reference.guided_step, _guided_step, _guided_step_fake)
