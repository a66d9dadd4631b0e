"""Call a quantized layer again and again, at little cost on the host."""

from __future__ import annotations

from typing import Any

import torch

from qandc_kernels.backend import ASKED_FOR, backend_of
from qandc_kernels.ops.linear import quantized_linear

__all__ = ["RepeatedLinear"]

MOST = 64  # starts that a layer keeps: weights that are moved get another address each time


class RepeatedLinear:
    """Call :func:`quantized_linear` for one layer again and again, at half of what it costs the host.

    Of the tensors of a layer dtypes and shapes follow from those of its weight, so that an address says all that a
    start depends on, and a start that was kept under these addresses goes past torch's dispatcher. That is not done
    where somebody listens: modes, subclasses, ``torch.func``, ``use_backend``, Triton's hooks. Each layer needs an
    object of its own; copies and pickles begin anew.
    """

    __slots__ = ("_ready",)

    def __init__(self) -> None:
        self._ready: dict[tuple[Any, ...], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RepeatedLinear, ()

    def __call__(self, *given: Any) -> torch.Tensor:
        """Take all that :func:`quantized_linear` takes, by position, and return what it returns."""
        x, weight, w_scale, bias, act_scale, act_zero_point, w_sum, smoothing, bits, out_dtype, nan_flag = given
        if not _goes_straight(x):
            return quantized_linear(*given)
        address, device, shape = x.data_ptr(), x.get_device(), x.shape
        constants = (act_scale, act_zero_point, nan_flag, smoothing, weight, w_scale, bias, w_sum)
        addresses = [None if t is None else t.data_ptr() for t in constants]
        layer = (bits, out_dtype, weight.shape, weight.stride(), None if bias is None else bias.dtype)
        key = (x.dtype, shape, x.stride(), address & 15, device, *layer, *addresses)
        kept = self._ready.get(key)
        if not kept:
            y = quantized_linear(*given)
            if kept is None:
                self._keep(key, given)
            return y
        out = x.new_empty((*shape[:-1], weight.shape[0]), dtype=out_dtype)
        xq = x.new_empty(shape, dtype=torch.int8)
        scale, zero_point, flag, factors, *rest = addresses
        if act_scale is None:
            token_scale = x.new_empty(shape[:-1], dtype=torch.float32)
            scale = token_scale.data_ptr()
        operands = (address, xq.data_ptr(), scale, zero_point, flag, factors, rest[0], out.data_ptr(), *rest[1:])
        return out if kept(operands) else quantized_linear(*given)

    def _keep(self, key: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        if backend_of(given[0].device).name != "triton":
            return
        from qandc_kernels.triton.linear import kept_starts

        if len(self._ready) >= MOST:
            self._ready.clear()
        self._ready[key] = kept_starts(*given) or False  # operands that are copied have none, however often one asks


def _goes_straight(x: torch.Tensor) -> bool:
    """Tell whether torch's dispatcher would do nothing with an op on ``x`` but call its CUDA kernel."""
    return (
        type(x) is torch.Tensor
        and x.is_cuda
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and ASKED_FOR.get() is None
    )
