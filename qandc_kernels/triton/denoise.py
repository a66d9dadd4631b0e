"""Apply guidance, the scheduler's step and variance compensation in one launch, up to the next forward's input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["guided_step_triton"]

BLOCK = 256


@triton.jit
def _guided_step_kernel(
    prediction_ptr, latents_ptr, coefficients_ptr,  # [R, C', H, W], [B, C, H, W], [3, C]
    out_ptr, input_ptr,  # [B, C, H, W] float32, [R, C, H, W]
    guidance, size, channels, of_image, of_channel, of_prediction,  # size = B · C · H · W
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    image, within = i // of_image, i % of_image
    channel = within // of_channel
    predicted = prediction_ptr + image * of_prediction + within
    epsilon = tl.load(predicted, mask=inside).to(tl.float32)
    if GUIDED:
        of_half = tl.full((), 1, tl.int64) * (size // of_image) * of_prediction  # sizes can be a plain 1
        without = tl.load(predicted + of_half, mask=inside).to(tl.float32)
        epsilon = without + guidance * (epsilon - without)
    a = tl.load(coefficients_ptr + channel, mask=inside)
    b = tl.load(coefficients_ptr + channels + channel, mask=inside)
    d = tl.load(coefficients_ptr + 2 * channels + channel, mask=inside)
    y = a * tl.load(latents_ptr + i, mask=inside) + b * epsilon + d
    tl.store(out_ptr + i, y, mask=inside)
    following = y.to(input_ptr.dtype.element_ty)
    tl.store(input_ptr + i, following, mask=inside)
    if GUIDED:
        tl.store(input_ptr + size + i, following, mask=inside)


def guided_step_triton(
    prediction: torch.Tensor, latents: torch.Tensor, coefficients: torch.Tensor, guidance_scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on contiguous tensors; see :func:`qandc_kernels.guided_step`."""
    images, channels, height, width = latents.shape
    out = torch.empty_like(latents)
    following = torch.empty(len(prediction), *latents.shape[1:], dtype=prediction.dtype, device=latents.device)
    size = latents.numel()
    if size == 0:
        return out, following
    _guided_step_kernel[(triton.cdiv(size, BLOCK),)](
        prediction, latents, coefficients,
        out, following,
        1.0 if guidance_scale is None else guidance_scale,
        size, channels, size // images, height * width, prediction[0].numel(),
        GUIDED=guidance_scale is not None, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, following
