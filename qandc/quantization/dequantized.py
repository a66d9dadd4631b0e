"""Define the tensor that ``QuantLinear.weight`` gives: computed when it is used, never written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from qandc.errors import ModelError
from qandc_kernels import packing

__all__ = ["DequantizedWeight", "ForwardMode", "StraightThrough", "dequantize", "refuse_write"]

# what torch does not dispatch: run on ordinary tensors, or refused
NEED_VALUES = {"numpy", "__array__", "tolist", "__deepcopy__", "__reduce_ex__", "__repr__", "__format__", "__dlpack__"}
NEED_MEMORY = {"apply_", "map_", "map2_", "storage", "untyped_storage", "data_ptr"}


def dequantize(
    qweight: torch.Tensor, scale: torch.Tensor, smoothing: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Compute ``[N, K]`` from integers ``[N, K] int8`` or ``[N, K/2] uint8``, scales ``[N]`` and smoothing ``[K]``."""
    q = packing.unpack_unchecked(qweight) if qweight.dtype == torch.uint8 else qweight
    weight = q * scale[:, None]
    if smoothing is not None:
        weight = weight / smoothing
    return weight.to(dtype)


def refuse_write(what: str) -> ModelError:
    """Make the error that says why ``what``, a write to the weight of a quantized layer, is refused."""
    return ModelError(
        f"{what} may change the weight of a QuantLinear, which is stored as integers and computed when it is read: the "
        "change would be lost. Merge updates into the full-precision model before quantize_model, or keep them beside "
        "the layer (as adapters of PEFT are); change a copy, weight.clone(), freely"
    )


class DequantizedWeight(torch.Tensor):
    """Stand for the weight of a :class:`qandc.QuantLinear`: read as any tensor, an error where it is written to.

    It knows shape, dtype and device, and computes its values anew for each operation that needs them. Views of it
    (``t()``, ``w[0]``, ``detach()``, ``.data``) are of this class too, since a write to them would be lost in the same
    way; all other results are ordinary tensors, ``clone()`` among them. torch asks tensors of a class of their own
    whether it may pass by the layers' forward, as the fast path of ``nn.TransformerEncoderLayer`` does.
    """

    true_device: torch.device
    values: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        **layout: Any,
    ) -> DequantizedWeight:
        # on the meta device as far as torch's C++ knows, or it would let ``parameter.data = weight`` take its memory
        weight: Any = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("meta"), dispatch_device=True, **layout
        )
        weight.true_device, weight.values = device, values
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in NEED_MEMORY or (name == "__set__" and func.__self__ is torch.Tensor.data):
            raise refuse_write("weight.data = ..." if name == "__set__" else name)
        if name in NEED_VALUES:
            args = [arg.values() if isinstance(arg, cls) else arg for arg in args]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if name in ("numpy", "__array__"):
            result.flags.writeable = False
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].true_device
        if func is torch.ops.aten.detach.default:
            return _view_of(args[0], args[0], args[0].values)
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and any(isinstance(leaf, cls) for leaf in tree_leaves(given)):
                    raise refuse_write(func._schema.name.removeprefix("aten::"))
        values, named = tree_map_only(cls, lambda weight: weight.values(), (tuple(args), dict(kwargs)))
        result = func(*values, **named)
        return tree_map_only(torch.Tensor, lambda view: _view_of(args[0], view), result) if func.is_view else result


def _view_of(
    base: torch.Tensor, like: torch.Tensor, values: Callable[[], torch.Tensor] | None = None
) -> DequantizedWeight:
    layout = {"strides": like.stride(), "storage_offset": like.storage_offset()}
    with torch.inference_mode(base.is_inference()):  # torch wants a view to be what its base is
        return DequantizedWeight(values or (lambda: like), like.shape, like.dtype, like.device, **layout)


class StraightThrough(torch.autograd.Function):
    """Give ``y``, computed in integers, the gradient of ``x · weightᵀ + bias`` with the dequantized weight."""

    @staticmethod
    def forward(y: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
        _, x, bias, *parts = inputs
        assert x is not None
        ctx.save_for_backward(*parts)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            qweight, scale, smoothing = ctx.saved_tensors
            x_grad = (grad @ dequantize(qweight, scale, smoothing, grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return None, x_grad, bias_grad, None, None, None


class ForwardMode(StraightThrough):
    """Give ``y`` the derivative along a tangent, too: a class of its own, as no compiler takes one that has that."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
        StraightThrough.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def jvp(ctx: Any, y: Any, x: torch.Tensor | None, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor | None:
        found = None
        if x is not None:
            qweight, scale, smoothing = ctx.saved_tensors
            found = x @ dequantize(qweight, scale, smoothing, x.dtype).T
        return found if bias is None else bias if found is None else found + bias
