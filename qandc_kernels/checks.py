"""What the public ops accept: each refusal names the argument, what it is and what is allowed."""

from __future__ import annotations

import torch

__all__ = ["FLOAT_DTYPES", "GROUP_SIZES", "LARGEST_K"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUP_SIZES = (32, 64, 128)
# |acc| <= 2 · K · 128 · 128 with the term of a zero point within int8: int32 holds it up to here
LARGEST_K = 65535


def check_tensor(
    op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...] = ()
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}; got {str(tensor.dtype).removeprefix('torch.')}")
    if shapes and not any(tensor.shape == shape for shape in shapes):
        allowed = " or ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{op}: {name} must have shape {allowed}; got {tuple(tensor.shape)}")


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {where}")


def check_bits(op: str, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be an integer from 2 to 8; got {bits!r}")


def check_activations(op: str, x: torch.Tensor, token_dims: int = 1) -> None:
    check_tensor(op, "x", x, FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    if type(token_dims) is not int or token_dims not in (1, 2) or token_dims > x.ndim:
        raise ValueError(
            f"{op}: token_dims must be 1 or 2, and x have as many; got {token_dims!r}, {x.ndim} dimensions"
        )
    k = x.shape[-token_dims:].numel()
    if k > LARGEST_K:
        what = "the last dimension" if token_dims == 1 else "a token"
        raise ValueError(f"{op}: {what} of x is {k}; allowed are up to {LARGEST_K}")


def check_product(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_dtypes: tuple[torch.dtype, ...] = (torch.int8, torch.uint8),
    x_name: str = "xq",
    x_dtypes: tuple[torch.dtype, ...] = (torch.int8,),
) -> None:
    """Activations ``[..., K]`` and a weight ``[N, K] int8`` or ``[N, K/2] uint8``, of which some ops take only one."""
    check_tensor(op, x_name, x, x_dtypes)
    name = "weight" if len(weight_dtypes) > 1 else "wq_packed" if torch.uint8 in weight_dtypes else "wq"
    check_tensor(op, name, weight, weight_dtypes)
    packed = weight.dtype == torch.uint8
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] * (1 + packed):
        allowed = "[N, K/2]" if packed else "[N, K]"
        raise ValueError(
            f"{op}: {x_name} [..., K] and {name} {allowed} must agree in K; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[-1] > LARGEST_K:
        raise ValueError(f"{op}: K is {x.shape[-1]}; int32 accumulators are exact up to K = {LARGEST_K}")


def check_weight_scale(op: str, x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor) -> None:
    """``[N]``, or ``[N, K/G]`` for weights in groups of G."""
    n, k = weight.shape[0], x.shape[-1]
    if isinstance(w_scale, torch.Tensor) and w_scale.ndim == 2:
        check_tensor(op, "w_scale", w_scale, (torch.float32,))
        groups = w_scale.shape[1]
        sizes = [size for size in GROUP_SIZES if k and k % 64 == 0 and k % size == 0]
        if weight.dtype != torch.uint8 or w_scale.shape[0] != n or groups not in [k // size for size in sizes]:
            raise ValueError(
                f"{op}: w_scale must have shape ({n},), or ({n}, K/G) for int4 weights in groups of G = 32, 64 or 128 "
                f"that divide a K that is a multiple of 64; got {tuple(w_scale.shape)} with K = {k}"
            )
    else:
        check_tensor(op, "w_scale", w_scale, (torch.float32,), ((n,),))


def check_linear(
    op: str,
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    weight_dtypes: tuple[torch.dtype, ...] = (torch.int8, torch.uint8),
    **others: torch.Tensor | None,
) -> None:
    """What all products of int8 activations have in common; ``others`` are checked for their device only."""
    check_product(op, xq, weight, weight_dtypes)
    n = weight.shape[0]
    check_tensor(op, "x_scale", x_scale, (torch.float32,), ((), xq.shape[:-1]))
    check_weight_scale(op, xq, weight, w_scale)
    if bias is not None:
        check_tensor(op, "bias", bias, FLOAT_DTYPES, ((n,),))
    if x_zero_point is not None:
        check_tensor(op, "x_zero_point", x_zero_point, (torch.int32,), ((),))
    if w_sum is not None:
        check_tensor(op, "w_sum", w_sum, (torch.float32 if w_scale.ndim == 2 else torch.int32,), ((n,),))
    check_devices(
        op,
        xq=xq,
        weight=weight,
        x_scale=x_scale,
        w_scale=w_scale,
        bias=bias,
        x_zero_point=x_zero_point,
        w_sum=w_sum,
        **others,
    )


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32; got {out_dtype}")
