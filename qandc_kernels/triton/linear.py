"""Start the matrix products: choose which kernel takes the operands of an op, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qandc_kernels import reference
from qandc_kernels.ops._checks import check_quantized_linear
from qandc_kernels.ops._register import rows_of
from qandc_kernels.tiles.tables import LONG_SUM, gpu_of, kernel_name, whole_waves
from qandc_kernels.triton._epilogue import Epilogue
from qandc_kernels.triton._launch import Kept, Launches, Start
from qandc_kernels.triton.few_rows import FEW_ROWS, few_rows_start
from qandc_kernels.triton.int8_gemm import int8_gemm_start
from qandc_kernels.triton.mixed_gemm import mixed_gemm_start
from qandc_kernels.triton.quantize import per_tensor_start, per_token_start

__all__ = ["kept_starts", "multiply", "quantize_multiply"]

Tensor = torch.Tensor
MaybeTensor = torch.Tensor | None
_LAUNCHES, _QUANTIZED_LAUNCHES = Launches(), Launches()


def multiply(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: MaybeTensor,
    w_scale: MaybeTensor,
    bias: MaybeTensor = None,
    x_zero_point: MaybeTensor = None,
    w_sum: MaybeTensor = None,
    branch: MaybeTensor = None,
    *,
    out_scale: MaybeTensor = None,
    out_zero_point: MaybeTensor = None,
    multiplier: MaybeTensor = None,
    gate: MaybeTensor = None,
    tokens: int = 1,
) -> Tensor:
    """Launch the kernel for these operands; ``out [..., N]`` has evenly spaced rows and is returned."""
    if out.numel() == 0:
        return out
    if x_zero_point is not None and w_sum is None:
        assert w_scale is not None
        w_sum = reference.weight_sum(weight, w_scale)
    cut = _cut(x, weight, Epilogue(x_scale, out_scale=out_scale, gate=gate)) if x.shape[-1] >= LONG_SUM else 0
    if cut:
        matrices = [None if t is None else rows_of(t) for t in (out, x, branch)]
        for part in (slice(cut), slice(cut, None)):
            y, xq, kept = (None if t is None else t[part] for t in matrices)
            assert xq is not None
            assert y is not None
            multiply(
                y, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, kept, out_scale=out_scale,
                out_zero_point=out_zero_point, multiplier=multiplier, gate=gate, tokens=len(xq),
            )  # fmt: skip
        return out
    grouped = w_scale is not None and w_scale.ndim == 2
    groups, scales = (w_scale, None) if grouped else (None, w_scale)
    ending = (out_scale, out_zero_point, multiplier, gate)
    operands = (x, weight, out, branch, groups, x_scale, scales, bias, x_zero_point, w_sum, *ending)
    _LAUNCHES(operands, tokens, lambda: _start(operands, tokens))
    return out


def _cut(x: Tensor, weight: Tensor, epilogue: Epilogue) -> int:
    """Return after how many rows a product is cut in two launches, or 0; all rows have one scale and one gate."""
    x_scale, gate = epilogue.x_scale, epilogue.gate
    if x_scale is None or x_scale.ndim or (gate is not None and len(gate) > 1):
        return 0
    kernel = kernel_name("int8" if weight.dtype == torch.int8 else "int4a8", epilogue)
    return whole_waves(kernel, x.shape[:-1].numel(), weight.shape[0], x.shape[-1], gpu_of(x.device))


def _start(operands: Sequence[MaybeTensor], tokens: int) -> tuple[tuple[Start], Sequence[MaybeTensor]]:
    """Prepare the start of a product and its operands as matrices and vectors, copied where no view is possible."""
    matrices, parameters = operands[:4], [None if t is None else t.contiguous() for t in operands[4:-1]]
    x, weight, out, branch = (None if t is None else rows_of(t) for t in matrices)
    assert x is not None
    assert weight is not None
    assert out is not None
    groups, x_scale, *others = parameters
    if x_scale is not None and x_scale.ndim:
        x_scale = x_scale.view(-1)
    gate = operands[-1]
    parameters = [x_scale, *others, gate]
    epilogue = Epilogue._make((*parameters, 0 if gate is None else gate.stride(0), tokens))
    if weight.dtype == x.dtype == torch.int8:
        start = int8_gemm_start(x, weight, out, epilogue, branch=branch)
    elif x.dtype != torch.int8 and groups is None and len(x) <= FEW_ROWS:
        weight = weight.view(torch.int8)
        start = few_rows_start(x, weight, out, epilogue)
    else:
        weight = weight.view(torch.int8)
        start = mixed_gemm_start(x, weight, out, epilogue, groups, branch=branch)
    return (start,), (x, weight, out, branch, groups, *epilogue[:-2])


def quantize_multiply(*given: Any) -> Tensor:
    """Launch both kernels of a quantized layer, that of the activations and the product.

    Takes the arguments of :func:`qandc_kernels.quantized_linear` by position. Operands of a new kind are checked.
    """
    operands, settings = _operands(*given)
    out, w_sum, zero_point = operands[7], operands[10], operands[3]
    if zero_point is not None and w_sum is None:
        operands = (*operands[:10], reference.weight_sum(given[1], given[2]))
    if not out.numel() or not given[0].numel():
        check_quantized_linear(*given)
        bias = operands[9]
        return out.zero_() if bias is None else out.copy_(bias.expand(out.shape))

    def prepare() -> tuple[tuple[Start, ...], Sequence[MaybeTensor]]:
        check_quantized_linear(*given)
        return _starts(operands, *settings)

    _QUANTIZED_LAUNCHES(operands, settings, prepare)
    return out


def kept_starts(*given: Any) -> Kept | None:
    """Return what :func:`quantize_multiply` starts for such arguments, on the addresses of ``_operands``."""
    return _QUANTIZED_LAUNCHES.find(*_operands(*given))


def _operands(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: MaybeTensor,
    act_scale: MaybeTensor,
    act_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
    smoothing: MaybeTensor,
    bits: int,
    out_dtype: torch.dtype | None,
    nan_flag: MaybeTensor,
) -> tuple[tuple[Any, ...], tuple[int, bool]]:
    """Return the operands of both kernels of a quantized layer, with memory for what they compute; and settings."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    xq = x.new_empty(x.shape, dtype=torch.int8)
    x_scale = x.new_empty(x.shape[:-1], dtype=torch.float32) if act_scale is None else act_scale
    operands = (x, xq, x_scale, act_zero_point, nan_flag, smoothing, weight, out, w_scale, bias, w_sum)
    return operands, (bits, act_scale is None)


def _starts(
    operands: Sequence[MaybeTensor], bits: int, per_token: bool
) -> tuple[tuple[Start, ...], Sequence[MaybeTensor]]:
    """Prepare the starts of both kernels of a quantized layer, and their operands."""
    x, xq, x_scale, zero_point, nan_flag, smoothing, weight, out, w_scale, bias, w_sum = operands
    assert x is not None
    assert w_scale is not None
    view, quantize = per_token_start(x, bits, 1) if per_token else per_tensor_start(x, bits, x.shape[-1])
    grouped = w_scale.ndim == 2
    scales = (w_scale, None) if grouped else (None, w_scale)
    (product,), views = _start(
        (xq, weight, out, None, scales[0], x_scale, scales[1], bias, zero_point, w_sum, *[None] * 4), 1
    )

    def arrange_quantize(*o: Any) -> tuple[Any, ...]:
        return quantize.arrange(o[0], o[1], o[2], o[5]) if per_token else quantize.arrange(*o[:6])

    def arrange_product(*o: Any) -> tuple[Any, ...]:
        scales = (o[8], o[2], None) if grouped else (None, o[2], o[8])
        return product.arrange(o[1], o[6], o[7], None, *scales, o[9], o[3], o[10], None, None, None, None)

    places = {0: 1, 1: 6, 2: 7}  # of the product's operands x, weight and out among ours
    starts = (
        quantize._replace(arrange=arrange_quantize),
        product._replace(arrange=arrange_product, descriptors={places[i]: d for i, d in product.descriptors.items()}),
    )
    xq, weight, out, _, groups, x_scale, scale, bias, zero_point, w_sum, *_ = views
    w_scale = groups if grouped else scale
    return starts, (view, xq, x_scale, zero_point, nan_flag, smoothing, weight, out, w_scale, bias, w_sum)
