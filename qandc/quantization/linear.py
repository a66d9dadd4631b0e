"""Define QuantLinear, the drop-in for ``nn.Linear``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from qandc.errors import ConfigError, DataError, ModelError
from qandc.quantization.dequantized import DequantizedWeight, ForwardMode, StraightThrough, dequantize, refuse_write
from qandc.quantization.shared_products import Membership, shared_output, shared_output_to_compile
from qandc.quantizer import check_bits, check_hessian, fault_of_divisors, gptq_round, quantize_weight
from qandc.support.arguments import Between, checked
from qandc_kernels import (
    FLOAT_DTYPES,
    LARGEST_K,
    RepeatedLinear,
    int4_linear,
    int8_linear,
    pack_int4,
    reference,
    unpack_int4,
    weight_only_linear,
)

__all__ = ["QuantLinear"]

Features = Annotated[int, Between(0, 2**31 - 1)]
FP32_BUFFERS = ("weight_scale", "act_scale", "smoothing")
STORED = ("qweight", "weight_scale", "weight_sum", "bias", "act_scale", "act_zero_point", "smoothing")
QUANTIZED_BUFFERS = {*STORED, "bits"} - {"bias"}
OPTIONAL_BUFFERS = {"act_scale": torch.float32, "act_zero_point": torch.int32, "smoothing": torch.float32}


class QuantLinear(nn.Module):
    """Compute ``y = dequantize(quantize(x / smoothing) · qweightᵀ) + bias``, for inference.

    The output has the dtype of the input, or under autocast that of autocast, as with ``nn.Linear``. Its gradient is
    straight-through: that of ``nn.Linear`` with the dequantized weight, for the input and for a bias that requires one.

    Until static ranges are set (:func:`qandc.calibrate`) each input row is quantized with its own scale, found on the
    way (dynamic, per token). Afterwards one scale and zero point serve all inputs (static, per tensor). On a GPU
    the Triton kernels run; elsewhere the same integers are computed in plain torch.

    With ``a_bits=16`` the layer is weight-only (W8A16, W4A16): ``y = (x / smoothing) · (s_w qweight)ᵀ + bias``, summed
    in float32; inputs have no range then. This suits layers that see a few rows, as those of adaLN modulation do: they
    take the time that it takes to read their weight.

    Attributes:
        qweight: ``[N, K] int8``, or ``[N, K/2] uint8`` for 4 bits (:mod:`qandc_kernels.packing`).
        weight_scale: ``[N] float32``; stays float32 under ``.to(dtype)``.
        weight_sum: ``[N] int32``, ``Σ_k q``: what a zero point is multiplied with.
        act_scale: 0-d float32, or None while dynamic.
        act_zero_point: 0-d int32, or None while dynamic or if symmetric.
        smoothing: ``[K] float32``, or None for all ones. ``qweight`` stands for the weight times it, so that it moves
            outliers from activations to weights (SmoothQuant, arXiv 2211.10438, Eq. 3).
        bits: ``[2] uint8``, w_bits and a_bits; a state dict made with others is refused.
        nan_flag: 0-d int32, set to 1 by NaN that a static range hides (:mod:`qandc.fusion.nan_flags`), or None; never
            saved.
        bias: ``[N]`` parameter or None.
    """

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bits: torch.Tensor
    weight_dtype_holder: torch.Tensor
    act_scale: torch.Tensor | None
    act_zero_point: torch.Tensor | None
    smoothing: torch.Tensor | None
    nan_flag: torch.Tensor | None = None  # no buffer: what saves or offloads buffers need not know of it

    @checked
    def __init__(
        self,
        in_features: Features,
        out_features: Features,
        bias: bool = True,
        *,
        w_bits: int = 8,
        a_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bits(w_bits, a_bits)
        check_layer("this layer", in_features, dtype or torch.get_default_dtype(), w_bits)
        self.in_features, self.out_features = in_features, out_features
        self.w_bits, self.a_bits = w_bits, a_bits
        self.original_bytes = 0  # of the weight this layer was made from
        self.membership = Membership()
        self.repeated = RepeatedLinear()
        shape = (out_features, in_features // 2) if w_bits == 4 else (out_features, in_features)
        qdtype = torch.uint8 if w_bits == 4 else torch.int8
        self.register_buffer("qweight", torch.zeros(shape, dtype=qdtype, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("weight_sum", torch.zeros(out_features, dtype=torch.int32, device=device))
        self.register_buffer("bits", torch.tensor([w_bits, a_bits], dtype=torch.uint8, device=device))
        # empty; .to(dtype) changes it as it would have changed the weight
        self.register_buffer("weight_dtype_holder", torch.zeros(0, device=device, dtype=dtype), persistent=False)
        self.register_buffer("act_scale", None)
        self.register_buffer("act_zero_point", None)
        self.register_buffer("smoothing", None)
        if bias:
            zeros = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias: nn.Parameter | None = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    @checked
    def from_linear(
        cls,
        linear: nn.Linear,
        w_bits: int = 8,
        a_bits: int = 8,
        smoothing: torch.Tensor | None = None,
        weight_clip: str = "max",
        hessian: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> QuantLinear:
        """Quantize the weight of ``linear``; the bias is shared, the weight is not kept.

        Args:
            linear: the layer to replace.
            w_bits, a_bits: as :func:`qandc.quantize_model`.
            smoothing: ``[K]`` factors > 0 that inputs are divided by and the weight is multiplied with.
            weight_clip: ``max`` or ``mse`` (:func:`qandc.quantizer.quantize_weight`).
            hessian: ``[K, K]`` of the inputs (:func:`qandc.input_hessians`): round with GPTQ.
            weight: what to quantize instead of ``linear.weight``, where that has been rounded to the model's dtype.

        Raises:
            ConfigError: unknown bits, 4 bits with an odd ``in_features``, in_features > 65535, or float64.
            DataError: the weight or bias holds NaN or inf or is not of the layer's size, smoothing is not ``[K]``
                finite numbers > 0, or the hessian is not ``[K, K]`` and positive.
        """
        check_parameters("", linear)
        weight, bias = linear.weight if weight is None else weight, linear.bias
        check_finite(bias, "bias")
        if weight.shape != (linear.out_features, linear.in_features):
            raise DataError(f"the weight of {linear} is {list(weight.shape)}; give one of its size")
        check_finite(weight, "weight")
        if hessian is not None:
            check_hessian(hessian, linear.in_features)
        home = weight.device
        if hessian is not None and weight.is_cpu:  # offloaded: work where the inputs were
            weight = weight.to(hessian.device)
        module = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            w_bits=w_bits,
            a_bits=a_bits,
            device=weight.device,
            dtype=linear.weight.dtype,
        )
        if smoothing is not None:
            module.smoothing, weight = smoothed_weight(weight, smoothing)
            smoothing = module.smoothing
        q, scale = quantize_weight(weight, w_bits, weight_clip)
        if hessian is not None:
            if smoothing is not None:
                hessian = hessian / (smoothing[:, None] * smoothing)
            q = gptq_round(weight, scale, hessian, (1 << w_bits - 1) - 1)
        module.qweight = pack_int4(q) if w_bits == 4 else q
        module.weight_scale = scale
        module.weight_sum = q.sum(1, dtype=torch.int32)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        module.original_bytes = weight.numel() * linear.weight.element_size()
        return (module if weight.device == home else module.to(home)).train(linear.training)

    @property
    def weight_only(self) -> bool:
        """Tell whether the layer quantizes its weight alone (``a_bits=16``)."""
        return self.a_bits == 16

    @property
    def scheme(self) -> str:
        """Name the scheme: "W8A8 static per-tensor", "W8A16 weight-only"."""
        if self.weight_only:
            return f"W{self.w_bits}A16 weight-only"
        ranges = "dynamic per-token" if self.act_scale is None else "static per-tensor"
        return f"W{self.w_bits}A{self.a_bits} {ranges}"

    @property
    def weight(self) -> torch.Tensor:
        """Return the dequantized weight ``[N, K]`` in the dtype it would have; see :class:`DequantizedWeight`."""
        dtype = self.weight_dtype_holder.dtype
        values = functools.partial(dequantize, self.qweight, self.weight_scale, self.smoothing, dtype)
        if torch.compiler.is_compiling():  # what nobody uses is not computed
            return values()
        return DequantizedWeight(values, (self.out_features, self.in_features), dtype, self.qweight.device)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the packed weight with its scales and sums."""
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.weight_scale, self.weight_sum))

    @checked
    def set_static_range(self, scale: torch.Tensor | None, zero_point: torch.Tensor | None = None) -> None:
        """Quantize all inputs with this scale (0-d float) and zero point (0-d integer); None goes back to dynamic.

        Raises:
            ConfigError: the layer is weight-only (a_bits is 16).
            DataError: the scale is not a finite number > 0, or the zero point not an integer of a_bits bits.
        """
        device = self.qweight.device
        if scale is None:
            if zero_point is not None:
                raise DataError("a zero point needs a scale; give both, or None for dynamic ranges")
            self.act_scale = self.act_zero_point = None
            return
        if self.weight_only:
            raise ConfigError(
                f"a W{self.w_bits}A16 layer does not quantize its inputs and takes no static range; quantize it with "
                "a_bits from 4 to 8, or leave it out"
            )
        act_scale = scale.detach().to(device, torch.float32, copy=True) if scale.ndim == 0 else None
        if act_scale is None or not scale.is_floating_point() or fault_of_divisors(act_scale) is not None:
            raise DataError(
                "act_scale must be one finite number > 0 whose reciprocal is such (a 0-d float tensor); got "
                f"{scale.flatten()[:4].tolist()}"
            )
        if zero_point is not None:
            limit = 1 << self.a_bits - 1
            whole = zero_point.ndim == 0 and not zero_point.is_floating_point()
            if not (whole and -limit <= int(zero_point) < limit):
                raise DataError(
                    f"act_zero_point must be one integer from {-limit} to {limit - 1} (a 0-d integer tensor); "
                    f"got {zero_point.flatten()[:4].tolist()}"
                )
            zero_point = zero_point.detach().to(device, torch.int32, copy=True)
        self.act_scale = act_scale
        self.act_zero_point = zero_point

    def tensor_forms(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
        """Map each tensor that a state dict may hold of this layer to its allowed dtypes and its shape."""
        n, k = self.out_features, self.in_features
        qweight = ((torch.uint8,), (n, k // 2)) if self.w_bits == 4 else ((torch.int8,), (n, k))
        return {
            "bits": ((torch.uint8,), (2,)),
            "qweight": qweight,
            "weight_scale": ((torch.float32,), (n,)),
            "weight_sum": ((torch.int32,), (n,)),
            "act_scale": ((torch.float32,), ()),
            "act_zero_point": ((torch.int32,), ()),
            "smoothing": ((torch.float32,), (k,)),
            "bias": (FLOAT_DTYPES, (n,)),
        }

    def fault_of(self, name: str, tensor: torch.Tensor) -> tuple[str, str] | None:
        """Compare a tensor with what this layer holds under this name; (what it is, what it must be) if they differ.

        Values are read where there are any, but for those of ``qweight`` and ``weight_sum``.
        """
        dtypes, shape = self.tensor_forms()[name]
        if self.weight_only and name in ("act_scale", "act_zero_point"):
            return "given", "left out: inputs are not quantized"
        if tensor.dtype not in dtypes:
            return str(tensor.dtype), "stored as " + " or ".join(map(str, dtypes))
        if tensor.shape != shape:
            return f"of shape {list(tensor.shape)}", f"of shape {list(shape)}"
        if tensor.is_meta or name in ("qweight", "weight_sum"):
            return None
        if name == "bits":
            found, own = "W{}A{}".format(*tensor.tolist()), f"W{self.w_bits}A{self.a_bits}"
            return None if found == own else (found, own)
        if name == "act_zero_point":
            limit = 1 << self.a_bits - 1
            inside = -limit <= int(tensor) < limit
            return None if inside else (str(int(tensor)), f"an integer from {-limit} to {limit - 1}")
        if name == "bias":
            return None if torch.isfinite(tensor).all() else ("not finite", "finite numbers")
        fault = fault_of_divisors(tensor)
        return None if fault is None else (fault, "finite numbers > 0 whose reciprocals are such")

    def faults_of(self, state: Mapping[str, torch.Tensor], name: str) -> list[str]:
        """List what is wrong with a state dict of this layer, which messages call ``name``; empty if nothing is."""
        scheme = f"W{self.w_bits}A{self.a_bits}"
        given = {key: state[key] for key in self.tensor_forms() if key in state}
        faults = {key: fault for key, tensor in given.items() if (fault := self.fault_of(key, tensor))}
        if "bits" in faults:  # the others follow from it
            return [f"{name} is {scheme}, the state dict is {faults['bits'][0]}; quantize it with those"]
        told = [f"{name}.{key} is {is_}; in a {scheme} layer it must be {must}" for key, (is_, must) in faults.items()]
        if "act_zero_point" in given and "act_scale" not in given:
            told.append(f"{name}.act_zero_point has no act_scale beside it; give both, or neither")
        pair = [given[key] for key in ("qweight", "weight_sum") if key in given]
        if not told and len(pair) == 2 and not any(tensor.is_meta for tensor in pair):
            q = unpack_int4(pair[0]) if self.w_bits == 4 else pair[0]
            wrong = (q.sum(1, dtype=torch.int32) != pair[1]).nonzero()
            if len(wrong):
                told.append(f"{name}.weight_sum is not the sum of its integers in channel {int(wrong[0])}")
        return told

    def check_state(self, name: str) -> None:
        """Raise ModelError if tensors of this layer, called ``name`` in the message, are damaged or do not agree."""
        faults = self.faults_of(self.state_dict(), name)
        if faults:
            raise ModelError(f"{faults[0]} (save the model again)")

    def make_optional(self, name: str) -> None:
        """Make room for one of ``OPTIONAL_BUFFERS``, to be filled from a state dict."""
        shape = (self.in_features,) if name == "smoothing" else ()
        setattr(self, name, torch.zeros(shape, dtype=OPTIONAL_BUFFERS[name], device=self.qweight.device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise refuse_write("layer.weight = ...")
        if name in STORED and "membership" in self.__dict__:
            self.membership.forget_compiled()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise refuse_write("del layer.weight")
        super().__delattr__(name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` float16, bfloat16 or float32 to ``[..., N]`` of that dtype, or of autocast's."""
        dual = forward_ad._current_level >= 0 and not torch.compiler.is_compiling()  # nothing public tells
        if dual or (
            torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad))
        ):
            y = self._product(input.detach())
            derived: Any = ForwardMode if dual else StraightThrough
            return derived.apply(y, input, self.bias, self.qweight, self.weight_scale, self.smoothing)
        if torch.compiler.is_compiling():
            shared = shared_output_to_compile(self, input)
        else:
            shared = shared_output(self, input, _autocast_dtype(input))
        return self._product(input) if shared is None else shared

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight_only:
            return self._weight_only_product(input)
        if torch.compiler.is_compiling():
            return self.product_to_compile(input, self.qweight, self.weight_scale, self.weight_sum, self.bias)
        held = self._buffers  # looked up like this, attributes take a seventh of the time
        weights = held["qweight"], held["weight_scale"], held["weight_sum"], self._parameters["bias"]
        return self.multiply(input, weights, _autocast_dtype(input))

    def multiply(
        self, input: torch.Tensor, weights: Sequence[torch.Tensor | None], dtype: torch.dtype | None
    ) -> torch.Tensor:
        """Quantize ``input`` as this layer does; multiply with a weight, its scales, sums and bias, and cast.

        ``weights`` are those of this layer, or of several side by side.
        """
        held, nan_flag = self._buffers, self.nan_flag
        if nan_flag is not None and nan_flag.device != input.device:  # left behind by an offloading hook
            nan_flag = None
        weight, weight_scale, weight_sum, bias = weights
        scale, zero_point, smoothing = held["act_scale"], held["act_zero_point"], held["smoothing"]
        return self.repeated(
            input, weight, weight_scale, bias, scale, zero_point, weight_sum, smoothing, self.a_bits, dtype, nan_flag
        )

    def _weight_only_product(self, input: torch.Tensor) -> torch.Tensor:
        dtype = _autocast_dtype(input) or input.dtype
        x = input if self.smoothing is None else input.float() * (1.0 / self.smoothing)
        return weight_only_linear(x.to(dtype), self.qweight, self.weight_scale, self.bias)

    def product_to_compile(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_sum: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Multiply activations that plain torch quantizes, so that a compiler joins it to the kernel before."""
        x = input if self.smoothing is None else input.float() * (1.0 / self.smoothing)
        if self.act_scale is None:
            xq, x_scale = reference.quantize_per_token(x, self.a_bits)
        else:
            xq = _quantize_per_tensor(x, self.act_scale, self.act_zero_point, self.a_bits)
            x_scale = self.act_scale
        linear = int4_linear if self.w_bits == 4 else int8_linear
        out_dtype = _autocast_dtype(input) or input.dtype
        return linear(xq, weight, x_scale, weight_scale, bias, self.act_zero_point, weight_sum, out_dtype=out_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.scheme}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # .to(float16) must not round the scales: they are part of the integers' meaning
        scales = {name: getattr(self, name) for name in FP32_BUFFERS}
        self.membership.forget_weights()
        super()._apply(fn, recurse)
        if self.nan_flag is not None:
            self.nan_flag = fn(self.nan_flag)
        for name, scale in scales.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != torch.float32:
                setattr(self, name, scale.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        error_msgs: list[str] = args[-1] if args else kwargs["error_msgs"]
        state = {name: state_dict[prefix + name] for name in self.tensor_forms() if prefix + name in state_dict}
        faults = self.faults_of(state, prefix.removesuffix(".") or "this layer")
        error_msgs += [f"{fault} (give the state dict as it was saved)" for fault in faults]
        if faults:  # a refused state changes nothing
            return
        self.membership.forget_compiled()
        if prefix + "qweight" in state_dict:
            # these may exist in one state and not in the other: take over which
            for name in OPTIONAL_BUFFERS:
                if prefix + name not in state_dict:
                    setattr(self, name, None)
                elif getattr(self, name) is None:
                    self.make_optional(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives to products on the device of ``x``, or None where it is off."""
    device = x.device.type  # autocast does not know the meta device
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def _quantize_per_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Quantize as :func:`qandc_kernels.quantize_per_tensor` in as few operations as a compiler needs; NaN is left
    to the conversion."""
    y = (x.to(torch.float32) * (1.0 / scale)).round()
    if zero_point is not None:
        y = y + zero_point
    return y.clamp(-(1 << bits - 1), (1 << bits - 1) - 1).to(torch.int8)


def smoothed_weight(weight: torch.Tensor, smoothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply ``[N, K]`` with factors ``[K]``; gives a float32 copy of the factors and the product in float32.

    Raises:
        DataError: the factors are not ``[K]`` finite numbers > 0 with such reciprocals, or the product is not finite.
    """
    k = weight.shape[1]
    fits = smoothing.shape == (k,)
    factors = smoothing.detach().to(weight.device, torch.float32, copy=True) if fits else smoothing
    fault = fault_of_divisors(factors) if fits else f"of shape {tuple(smoothing.shape)}"
    if fault is not None:
        raise DataError(
            f"smoothing must be {k} finite float32 numbers > 0 whose reciprocals are such, one per input channel; it "
            f"is {fault} (leave it out for none)"
        )
    product = weight.detach().float() * factors
    check_finite(product, "weight times smoothing")
    return factors, product


def skeleton_layer(
    in_features: int, out_features: int, *, bias: bool, bits: tuple[int, int], dtype: torch.dtype
) -> QuantLinear:
    """Make a layer on the meta device for ``load_state_dict(assign=True)``; buffers no state dict holds are real."""
    w_bits, a_bits = bits
    layer = QuantLinear(in_features, out_features, bias, w_bits=w_bits, a_bits=a_bits, device="meta", dtype=dtype)
    layer.weight_dtype_holder = torch.zeros(0, dtype=dtype)
    return layer


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that no kernel takes."""
    if dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise ConfigError(f"{name} is {str(dtype).removeprefix('torch.')}; allowed are {allowed} (convert the model)")


def check_layer(name: str, in_features: int, dtype: torch.dtype, w_bits: int) -> None:
    """Refuse layers that no kernel can run."""
    check_dtype(name, dtype)
    if in_features > LARGEST_K:
        raise ConfigError(
            f"{name} has in_features {in_features}; int32 accumulators are exact up to {LARGEST_K} "
            "(skip it with skip_patterns)"
        )
    if w_bits == 4 and in_features % 2:
        raise ConfigError(
            f"int4 weights are packed in pairs and need an even in_features; {name} has {in_features} "
            "(skip it with skip_patterns, or use w_bits=8)"
        )


def check_parameters(name: str, linear: nn.Linear) -> None:
    """Refuse a layer whose weight or bias was replaced by something that its sizes do not allow.

    Raises:
        ConfigError: a parameter has a dtype that no kernel takes.
        DataError: a parameter is no dense tensor of the layer's size.
    """
    prefix = f"{name}." if name else ""
    shape = (linear.out_features, linear.in_features)
    for what, tensor, wanted in (("weight", linear.weight, shape), ("bias", linear.bias, shape[:1])):
        if tensor is None and what == "bias":
            continue
        found = None
        if not isinstance(tensor, torch.Tensor):
            found = type(tensor).__name__
        elif is_lazy(tensor):
            found = "not initialized"
        elif tensor.layout is not torch.strided:
            found = str(tensor.layout).removeprefix("torch.")
        elif tensor.shape != wanted:
            found = str(list(tensor.shape))
        if found is not None:
            raise DataError(
                f"{prefix}{what} is {found}; a layer with in_features {linear.in_features} and out_features "
                f"{linear.out_features} needs a dense tensor {list(wanted)} (or skip it with skip_patterns)"
            )
    check_dtype(name or "this layer", linear.weight.dtype)
    if linear.bias is not None:
        check_dtype(f"{prefix}bias", linear.bias.dtype)


def check_finite(tensor: torch.Tensor | None, name: str) -> None:
    """Refuse NaN and inf; tensors on the meta device hold no values and pass."""
    if tensor is not None and not tensor.is_meta and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(
            f"{name} holds {bad} values that are NaN or inf; quantizing it would spread them over whole rows"
        )
