"""Check single arguments: each refusal names the argument, what it is and what is allowed.

Types, dtypes, layouts, shapes and devices are looked at, never the elements of a tensor: that would wait for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from qandc_kernels.errors import ArgumentError

Tensor = torch.Tensor
MaybeTensor = torch.Tensor | None
Dtypes = tuple[torch.dtype, ...]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_DTYPES = FLOAT_DTYPES[:2]
FLOAT32, INT32, INT8, UINT8 = (torch.float32,), (torch.int32,), (torch.int8,), (torch.uint8,)
SCALAR = ((),)
GROUP_SIZES = (32, 64, 128)
# |acc| <= 2 · K · 128 · 128 with the term of a zero point within int8: int32 holds it up to here
LARGEST_K = 65535
# kernels count rows, columns and tiles in int32, and take numbers as float32
LARGEST_ROWS = 2**30
LARGEST_OUTPUT = 2**40
LARGEST_NUMBER = torch.finfo(torch.float32).max
MOST_ENTRIES = 4096  # an iterator may have no end
LAZY = (UninitializedParameter, UninitializedBuffer)  # have no shape yet


def check_tensor(op: str, name: str, tensor: Tensor, dtypes: Dtypes, shapes: tuple[tuple[int, ...], ...] = ()) -> None:
    """Refuse what is no dense tensor of one of ``dtypes`` and, if there are any, one of ``shapes``."""
    if type(tensor) is not torch.Tensor and (not isinstance(tensor, torch.Tensor) or type(tensor) in LAZY):
        raise ArgumentError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ArgumentError(f"{op}: {name} must be {allowed}; got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        what = "a nested tensor" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ArgumentError(f"{op}: {name} must be dense (to_dense(), to_padded_tensor()); got {what}")
    if shapes:
        shape = tensor.shape
        for allowed_shape in shapes:
            if shape == allowed_shape:
                return
        allowed = " or ".join(str(tuple(s)) for s in shapes)
        raise ArgumentError(f"{op}: {name} must have shape {allowed}; got {tuple(shape)}")


def check_devices(op: str, names: str, *tensors: MaybeTensor) -> None:
    """Refuse tensors on different devices; ``names``, one word for each, are for the message."""
    device = tensors[0].device  # type: ignore[union-attr]
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            pairs = zip(names.split(), tensors, strict=True)
            where = ", ".join(f"{name} on {t.device}" for name, t in pairs if t is not None)
            raise ArgumentError(f"{op}: all tensors must be on one device; got {where}")


def check_rows(op: str, name: str, rows: int) -> None:
    if rows > LARGEST_ROWS:
        raise ArgumentError(f"{op}: {name} has {rows} rows; allowed are up to {LARGEST_ROWS}, split it")


def check_elements(op: str, name: str, elements: int) -> None:
    if elements > LARGEST_OUTPUT:
        raise ArgumentError(f"{op}: {name} has {elements} elements; allowed are up to {LARGEST_OUTPUT}, split it")


def check_integer(op: str, name: str, value: int, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:
        raise ArgumentError(f"{op}: {name} must be an integer from {smallest} to {largest}; got {value!r}")


def check_list(op: str, name: str, values: Any) -> list[Any]:
    """Return the entries of a list, set or iterator."""
    if not isinstance(values, Sequence | Set | Iterator) or isinstance(values, str | bytes | bytearray | memoryview):
        raise ArgumentError(f"{op}: {name} must be a list; got {values!r}")
    entries = list(itertools.islice(values, MOST_ENTRIES + 1))
    if len(entries) > MOST_ENTRIES:
        raise ArgumentError(f"{op}: {name} has more than {MOST_ENTRIES} entries; split it")
    return entries


def check_sizes(op: str, name: str, values: Iterable[int]) -> list[int]:
    """Return ``values`` as a list of integers from 1 to LARGEST_ROWS."""
    sizes = check_list(op, name, values)
    for size in sizes:
        check_integer(op, f"an entry of {name}", size, 1, LARGEST_ROWS)
    return sizes


def check_layers(op: str, layers: Iterable[tuple[int, int]], multiple: int = 1) -> list[tuple[int, int]]:
    """Return ``layers`` as a list of (out_features, in_features), the latter multiples of ``multiple``."""
    pairs = check_list(op, "layers", layers)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ArgumentError(f"{op}: a layer must be (out_features, in_features); got {pair!r}")
        check_integer(op, "out_features", pair[0], 1, LARGEST_ROWS)
        check_integer(op, "in_features", pair[1], 1, LARGEST_K)
        if pair[1] % multiple:
            raise ArgumentError(f"{op}: in_features must be a multiple of {multiple}; got {pair[1]}")
    return [(n, k) for n, k in pairs]


def check_number(op: str, name: str, value: float, smallest: float, allowed: str) -> None:
    """Refuse what is no number from ``smallest`` to the largest of float32; ``allowed`` says so in the message."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not smallest <= value <= LARGEST_NUMBER:
        raise ArgumentError(f"{op}: {name} must be {allowed}; got {value!r}")


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"{op}: {name} must be float16, bfloat16 or float32; got {dtype!r}")


def check_activations(op: str, x: Tensor, token_dims: int = 1) -> None:
    check_tensor(op, "x", x, FLOAT_DTYPES)
    shape = x.shape
    if not shape:
        raise ArgumentError(f"{op}: x must have at least one dimension")
    if type(token_dims) is not int or token_dims not in (1, 2) or token_dims > len(shape):
        raise ArgumentError(
            f"{op}: token_dims must be 1 or 2, and x have as many; got {token_dims!r}, {len(shape)} dimensions"
        )
    k = shape[-1] if token_dims == 1 else shape[-1] * shape[-2]
    if k > LARGEST_K:
        what = "the last dimension" if token_dims == 1 else "a token"
        raise ArgumentError(f"{op}: {what} of x is {k}; allowed are up to {LARGEST_K}")
    check_rows(op, "x", shape[:-1].numel())


def check_zero_point(op: str, name: str, zero_point: MaybeTensor) -> None:
    if zero_point is not None:
        check_tensor(op, name, zero_point, INT32, SCALAR)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes of its storage that a tensor lies between."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (int(steps) + 1) * tensor.itemsize


def _folded(tensor: Tensor) -> bool:
    """Tell whether elements of a tensor may share memory, as those of an expanded one do."""
    span = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride
    return False


def check_written(
    op: str, name: str, written: Tensor, names: str, *others: MaybeTensor, contiguous: bool = True
) -> None:
    """Refuse an output that has gaps, shares memory with one of ``others`` (``names``), or has a gradient to lose."""
    if not contiguous and (written.stride(-1) != 1 or _folded(written)):
        raise ArgumentError(
            f"{op}: {name} is written to: its last stride must be 1 and its elements apart; got strides "
            f"{written.stride()}, clone it"
        )
    if contiguous and not written.is_contiguous():
        raise ArgumentError(f"{op}: {name} must be contiguous, it is written to; got strides {written.stride()}")
    if written.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{op}: {name} requires a gradient, which is not computed; use torch.no_grad()")
    if torch.compiler.is_compiling() or type(written) is not torch.Tensor or not written.numel():
        return  # no memory to look at
    memory = written.untyped_storage().data_ptr()
    for i, other in enumerate(others):
        if memory and other is not None and other.untyped_storage().data_ptr() == memory and other.numel():
            begin, end = _span(written)
            other_begin, other_end = _span(other)
            if begin < other_end and other_begin < end:
                raise ArgumentError(f"{op}: {name} is written to and shares memory with {names.split()[i]}; clone it")


def check_nan_flag(op: str, nan_flag: MaybeTensor, names: str, *others: MaybeTensor) -> None:
    if nan_flag is not None:
        check_tensor(op, "nan_flag", nan_flag, INT32, ((), (1,)))
        check_written(op, "nan_flag", nan_flag, names, *others)


def check_product(
    op: str, x: Tensor, weight: Tensor, weight_dtypes: Dtypes, x_name: str = "xq", x_dtypes: Dtypes = INT8
) -> None:
    """Check activations ``[..., K]`` and a weight ``[N, K] int8`` or ``[N, K/2] uint8``, or the one an op takes."""
    check_tensor(op, x_name, x, x_dtypes)
    name = "weight" if len(weight_dtypes) > 1 else "wq_packed" if torch.uint8 in weight_dtypes else "wq"
    check_tensor(op, name, weight, weight_dtypes)
    packed = weight.dtype == torch.uint8
    shape, weight_shape = x.shape, weight.shape
    if not shape or len(weight_shape) != 2 or shape[-1] != weight_shape[1] * (1 + packed):
        allowed = "[N, K/2]" if packed else "[N, K]"
        raise ArgumentError(
            f"{op}: {x_name} [..., K] and {name} {allowed} must agree in K; "
            f"got {tuple(shape)} and {tuple(weight_shape)}"
        )
    if shape[-1] > LARGEST_K:
        raise ArgumentError(f"{op}: K is {shape[-1]}; int32 accumulators are exact up to K = {LARGEST_K}")
    rows, columns = shape[:-1].numel(), weight_shape[0]
    check_rows(op, x_name, rows)
    check_rows(op, name, columns)
    check_elements(op, "the result", rows * columns)


def check_scales(op: str, x: Tensor, weight: Tensor, w_scale: Tensor, bias: MaybeTensor) -> None:
    """Check ``w_scale [N]``, or ``[N, K/G]`` for weights in groups of G, and ``bias [N]``."""
    n, k = weight.shape[0], x.shape[-1]
    check_tensor(op, "w_scale", w_scale, FLOAT32)
    if w_scale.ndim == 2:
        groups = w_scale.shape[1]
        sizes = [size for size in GROUP_SIZES if k and k % 64 == 0 and k % size == 0]
        if weight.dtype != torch.uint8 or w_scale.shape[0] != n or groups not in [k // size for size in sizes]:
            raise ArgumentError(
                f"{op}: w_scale must have shape ({n},), or ({n}, K/G) for int4 weights in groups of G = 32, 64 or 128 "
                f"that divide a K that is a multiple of 64; got {tuple(w_scale.shape)} with K = {k}"
            )
    elif w_scale.shape != (n,):
        raise ArgumentError(f"{op}: w_scale must have shape ({n},); got {tuple(w_scale.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, FLOAT_DTYPES, ((n,),))


def check_linear(
    op: str,
    xq: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: MaybeTensor,
    x_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
    weight_dtypes: Dtypes = (torch.int8, torch.uint8),
) -> None:
    """Check what all products of int8 activations have in common, but for devices."""
    check_product(op, xq, weight, weight_dtypes)
    check_tensor(op, "x_scale", x_scale, FLOAT32, ((), xq.shape[:-1]))
    check_scales(op, xq, weight, w_scale, bias)
    check_zero_point(op, "x_zero_point", x_zero_point)
    if w_sum is not None:
        check_tensor(op, "w_sum", w_sum, FLOAT32 if w_scale.ndim == 2 else INT32, ((weight.shape[0],),))
