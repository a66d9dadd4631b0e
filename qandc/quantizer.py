"""Quantize uniformly (Q&C, arXiv 2503.02508, Eq. 1-3).

``q = clip(round(x/s) + z, qmin, qmax)``, ``x̂ = s (q - z)`` with qmin = -2^(b-1), qmax = 2^(b-1) - 1. Weights are
symmetric (z = 0) with one scale per output channel, activations have one scale per tensor (static) or per token
(dynamic).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qandc.errors import ConfigError, DataError
from qandc.support.arguments import check_fields, regular_expression
from qandc_kernels import reference

__all__ = ["A_BITS", "W_BITS", "QuantConfig", "gptq_round", "quantize_weight", "scale_and_zero_point"]

REGULAR = "re:"  # begins a skip pattern that is a regular expression
COMPILED = "_orig_mod"  # what torch.compile calls the model in its wrapper
W_BITS = (4, 8)
A_BITS = (4, 5, 6, 7, 8, 16)
WEIGHT_CLIPS = ("max", "mse")
FEEDBACK_BLOCK = 128  # columns whose errors are gathered before the rest of the matrix sees them


@dataclass(frozen=True)
class QuantConfig:
    """Say what to quantize and how.

    Attributes:
        w_bits: 4 or 8, symmetric, per output channel.
        a_bits: 4 to 8, fewer than 8 still run on the int8 kernels; or 16: activations stay as they are (weight-only).
        skip_patterns: layers whose qualified name contains one of these substrings stay as they are. A leading dot
            stands for the root of the model (``.norm_out`` is ``norm_out`` and what lies in it, and no block's
            ``norm_out``), a leading ``re:`` for a regular expression that is searched in the name. None: what fits
            the class of the model; of a class that is not known, all that lies outside the repeated blocks or sees no
            tokens (:mod:`qandc.quantization.plan`).
        weight_clip: how the scale of a weight channel is found: ``max`` or ``mse`` (:func:`quantize_weight`).
        conditioning: scheme of the modulation layers in the blocks, as "W8A16" or "W4A16"; None leaves them in full
            precision.
    """

    w_bits: int = 8
    a_bits: int = 8
    skip_patterns: Sequence[str] | None = None
    weight_clip: str = "max"
    conditioning: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_bits(self.w_bits, self.a_bits)
        if self.weight_clip not in WEIGHT_CLIPS:
            raise ConfigError(f"weight_clip {self.weight_clip!r} is unknown; choose one of {', '.join(WEIGHT_CLIPS)}")
        if self.conditioning is not None:
            parse_scheme(self.conditioning)
        patterns = self.skip_patterns
        if patterns is None:
            return
        if not all(patterns):
            raise ConfigError(
                f"skip_patterns must be a list of non-empty strings, e.g. ['pos_embed', 'norm']; got {patterns!r}"
            )
        for pattern in patterns:
            if pattern.startswith(REGULAR):
                regular_expression(pattern.removeprefix(REGULAR), f"skip pattern {pattern!r}")
        object.__setattr__(self, "skip_patterns", tuple(patterns))

    @property
    def scheme(self) -> str:
        """Return the field's short name, e.g. "W8A8"."""
        return f"W{self.w_bits}A{self.a_bits}"

    def skips(self, name: str) -> bool:
        """Tell whether ``skip_patterns`` match this qualified name of a layer.

        Raises:
            ConfigError: ``skip_patterns`` is None, which means something only for a model.
        """
        if self.skip_patterns is None:
            raise ConfigError("skip_patterns is None, which depends on the model; see quantization_plan(model)")
        return any(matches(pattern, name) for pattern in self.skip_patterns)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a skip pattern means the layer of this qualified name, in a compiled model as in the model."""
    name = name.removeprefix(f"{COMPILED}.")
    if pattern.startswith(REGULAR):
        return re.search(pattern.removeprefix(REGULAR), name) is not None
    if pattern.startswith("."):
        return f".{name}.".startswith(f"{pattern}.")
    return pattern in name


def parse_scheme(scheme: str) -> tuple[int, int]:
    """Read (w_bits, a_bits) from a scheme as "W8A16".

    Raises:
        ConfigError: it is no scheme, or no kernel runs it.
    """
    match = re.fullmatch(r"W(\d{1,2})A(\d{1,2})", scheme)
    if match is None:
        raise ConfigError(f"{scheme!r} is no scheme; give bits of weights and of activations, as 'W8A8' or 'W4A8'")
    bits = int(match[1]), int(match[2])
    check_bits(*bits)
    return bits


def check_bits(w_bits: int, a_bits: int) -> None:
    """Refuse bit widths that no kernel runs."""
    if type(w_bits) is not int or w_bits not in W_BITS:
        raise ConfigError(f"w_bits is {w_bits!r}; allowed are {' and '.join(map(str, W_BITS))}")
    if type(a_bits) is not int or a_bits not in A_BITS:
        raise ConfigError(
            f"a_bits is {a_bits!r}; allowed are {', '.join(map(str, A_BITS))} (16: activations are not quantized)"
        )


SMALLEST = torch.finfo(torch.float32).tiny  # a GPU takes denormal numbers for zero


def are_divisors(values: torch.Tensor) -> torch.Tensor:
    """Tell of each value whether inputs can be multiplied with its reciprocal in float32."""
    return (values >= SMALLEST) & (values <= 1 / SMALLEST)


def fault_of_divisors(values: torch.Tensor) -> str | None:
    """Say why some of the values are no divisors (:func:`are_divisors`), or None."""
    if are_divisors(values).all():
        return None
    if not (torch.isfinite(values) & (values > 0)).all():
        return "not finite or not > 0"
    return f"smaller than {SMALLEST:.1e} or larger than {1 / SMALLEST:.1e}"


def quantize_weight(weight: torch.Tensor, bits: int, clip: str = "max") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight per output channel: ``s_n = max_k |w_nk| / qmax``, ``q = round(w / s)``, qmax = 2^(b-1) - 1.

    Args:
        weight: ``[N, K]``, any float dtype.
        bits: 2 to 8.
        clip: ``max`` as above; ``mse``: of each channel the scale, from half of that one to all of it, with the least
            squared error (found by search, to within 1 %), so that large weights are clipped where few levels are left
            for the others.

    Returns:
        ``q [N, K] int8`` in -qmax..qmax and ``scale [N] float32``.
    """
    qmax = (1 << bits - 1) - 1
    w = weight.detach().to(torch.float32)
    amax = w.abs().amax(1) if w.shape[1] else w.new_zeros(len(w))
    scale = amax.clamp(min=reference.SMALLEST_AMAX) / qmax
    if clip not in WEIGHT_CLIPS:
        raise ConfigError(f"weight_clip {clip!r} is unknown; choose one of {', '.join(WEIGHT_CLIPS)}")
    if clip == "mse":
        scale = _least_error_scale(w, scale, qmax)
    return (w / scale[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale


def _least_error_scale(w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    """Search the scale of each row from half of the given one to all of it; of equal errors the widest stays."""
    best, least = scale, ((w / scale[:, None]).round() * scale[:, None] - w).square().sum(1)
    middle = 0.75 * scale
    # the more levels, the more minima the error has: with 8 bits look closer where the first search ended
    for reach in (0.25,) if qmax < 8 else (0.25, 0.02):
        for offset in torch.linspace(reach, -reach, 51).tolist():
            tried = (middle + offset * scale).clamp(scale / 2, scale)
            q = (w / tried[:, None]).round_().clamp_(-qmax, qmax)
            fitted = ((q * w).sum(1) / q.square().sum(1)).clamp(scale / 2, scale)  # the best one for these integers
            error = (q.mul_(fitted[:, None]) - w).square_().sum(1)
            better = error < least  # never with NaN, that of rows of zeros
            best, least = torch.where(better, fitted, best), torch.where(better, error, least)
        middle = best
    return best


def check_hessian(hessian: torch.Tensor, k: int) -> None:
    """Refuse a Hessian of another shape than ``[K, K]``."""
    if hessian.shape != (k, k):
        raise DataError(f"the Hessian of a weight of {k} input channels is [{k}, {k}]; got {list(hessian.shape)}")


def gptq_round(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, qmax: int, damping: float = 0.01
) -> torch.Tensor:
    """Find integers ``q [N, K]`` in -qmax..qmax with a small ``Σ_x ‖(W - s q) x‖² = tr((W - s q) H (W - s q)ᵀ)``.

    Rounding with error feedback: GPTQ (Frantar et al. 2023, arXiv 2210.17323). Columns are rounded one by one, those
    with the largest inputs first, and each is first given what makes good the errors of those before it. With ``H = L D
    Lᵀ``, L of unit diagonal and the columns in rising order, it becomes ``w_k + Σ_{j>k} (w_j - s q_j) L_jk`` (LDLQ,
    Chee et al. 2023, arXiv 2307.13304: the same integers without the inverse of H).

    Args:
        weight: ``[N, K]``.
        scale: ``[N]``, one per row.
        hessian: ``[K, K]``, ``Σ x xᵀ``.
        qmax: 7 for 4 bits, 127 for 8.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        ConfigError: damping is not > 0.
        DataError: the Hessian is not ``[K, K]``, not finite, or not positive once damped.
    """
    n, k = weight.shape
    if not damping > 0:
        raise ConfigError(f"damping is {damping!r}; give a share > 0, usually 0.01")
    check_hessian(hessian, k)
    h = hessian.to(weight.device)
    order = torch.argsort(h.diagonal())
    h = h[order][:, order].double()
    h.diagonal().add_((damping * h.diagonal().mean()).clamp(min=1e-20))  # of zeros only: rounded to nearest
    factor, failed = torch.linalg.cholesky_ex(h)
    del h  # 1.9 GB for 15,360 columns
    if failed or not torch.isfinite(factor).all():
        raise DataError("the Hessian of a layer is not positive definite or not finite; check the calibration batches")
    feedback = factor.div_(factor.diagonal().clone()).T.to(torch.float32)
    # in units of the scale, a column of the weight in a row
    w = (weight.detach().to(torch.float32) / scale.to(torch.float32)[:, None])[:, order].T.contiguous()
    q, errors = torch.empty_like(w), torch.empty_like(w)
    for last in range(k, 0, -FEEDBACK_BLOCK):
        first = max(last - FEEDBACK_BLOCK, 0)
        block = torch.addmm(w[first:last], feedback[first:last, last:], errors[last:])
        # four launches a column: all of FLUX.1 has two million
        rows = zip(range(first, last), block.unbind(), w[first:last].unbind(), q[first:last].unbind(), strict=True)
        for i, corrected, wanted, rounded in reversed(list(rows)):
            corrected.addmv_(errors[i + 1 : last].T, feedback[i, i + 1 : last])
            torch.clamp(corrected, -qmax, qmax, out=rounded).round_()
            torch.sub(wanted, rounded, out=errors[i])
    result = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    result[:, order] = q.T.to(torch.int8)
    return result


def scale_and_zero_point(
    minimum: torch.Tensor, maximum: torch.Tensor, bits: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute scale and zero point of a static range (Eq. 2 and 3).

    Asymmetric: ``s = (max - min) / (2^b - 1)``, ``z = round(qmin - min/s)``; the range is first extended to hold 0, so
    that z lies in qmin..qmax. Symmetric: ``s = max(|min|, |max|) / qmax``, no zero point.

    Args:
        minimum, maximum: 0-d tensors.

    Returns:
        ``scale`` 0-d float32, ``zero_point`` 0-d int32 or None.

    Raises:
        DataError: a bound or the scale is NaN or infinite, or minimum > maximum.
    """
    low, high = minimum.to(torch.float32), maximum.to(torch.float32)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise DataError(f"activation range [{float(low)}, {float(high)}] is not finite; check the calibration data")
    if low > high:
        raise DataError(f"activation range [{float(low)}, {float(high)}] is empty")
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    if symmetric:
        return torch.maximum(low.abs(), high.abs()).clamp(min=reference.SMALLEST_AMAX) / qmax, None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=reference.SMALLEST_AMAX) / (qmax - qmin)
    if not torch.isfinite(scale):
        raise DataError(f"activation range [{float(low)}, {float(high)}] is wider than float32 can hold")
    return scale, (qmin - low / scale).round().to(torch.int32)
