"""Random layers, their exact outputs, and how close a kernel has to come."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qandc_kernels import pack_int4, unpack_int4

# of |expected| and of the typical size of what was added up: a few ulp in float32, half an ulp after a cast
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN = torch.tensor(0x7FC000FF, dtype=torch.int32).view(torch.float32)
"""A NaN whose lowest byte is not 0, as a GPU makes them: that shows where bits of a number are taken for an integer."""


def float_dtypes(device: torch.device) -> list[torch.dtype]:
    """Triton's interpreter computes bfloat16 wrongly."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def random_int8(shape, generator: torch.Generator, bits: int = 8) -> torch.Tensor:
    limit = 1 << bits - 1
    return torch.randint(-limit, limit, shape, generator=generator, dtype=torch.int8)


def make_layer(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    *,
    bits: int = 8,
    per_token: bool = False,
    bias: bool = True,
    zero_point: bool = True,
    group: int = 0,
) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """Arguments of a linear op for shape (samples, tokens, N, K), and its exact output in float64."""
    samples, tokens, n, k = shape
    xq, wq = random_int8((samples, tokens, k), generator), random_int8((n, k), generator, bits)
    factor = 20.0 / (k**0.5 * 128 * 2**bits)  # outputs of the size of 1
    x_scale = (torch.rand((samples, tokens) if per_token else (), generator=generator) + 0.5) * factor
    w_scale = torch.rand((n, k // group) if group else n, generator=generator) + 0.5
    p: dict[str, torch.Tensor | None] = {
        "xq": xq,
        "weight": pack_int4(wq) if bits == 4 else wq,
        "x_scale": x_scale,
        "w_scale": w_scale,
        "bias": torch.randn(n, generator=generator) if bias else None,
        "x_zero_point": torch.tensor(-37, dtype=torch.int32) if zero_point else None,
    }
    weight = wq.double() * (w_scale.double().repeat_interleave(group, 1) if group else w_scale.double()[:, None])
    y = (xq.double() + (37 if zero_point else 0)) @ weight.t()
    y *= x_scale.double()[..., None] if per_token else x_scale.double()
    return p, y + p["bias"].double() if bias else y


def terms_of(p: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """What the sizes of all products and of the bias of a layer of :func:`make_layer` add up to."""
    wq = unpack_int4(p["weight"]) if p["weight"].dtype == torch.uint8 else p["weight"]
    w_scale = p["w_scale"].double() if p["w_scale"].ndim == 2 else p["w_scale"].double()[:, None]
    weight = wq.double().abs() * w_scale.repeat_interleave(wq.shape[1] // w_scale.shape[1], 1)
    zero_point = 0 if p["x_zero_point"] is None else p["x_zero_point"].abs()
    x_scale = p["x_scale"].double() if p["x_scale"].ndim == 0 else p["x_scale"].double()[..., None]
    terms = (p["xq"].double().abs() + zero_point) @ weight.t() * x_scale
    return terms if p["bias"] is None else terms + p["bias"].double().abs()


def to(device: torch.device | str, p: dict[str, Any]) -> dict[str, Any]:
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in p.items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, size: float = 1.0) -> None:
    """Elementwise, in the precision of ``actual``; ``size`` is that of the terms which were added."""
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance * size, rtol=tolerance)


def assert_summed(
    actual: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, additions: int, casts: int = 1
) -> None:
    """``actual`` is a float32 sum, cast last: ``additions`` products in any order, whose sizes add up to ``terms``.

    Each product and each addition is off by at most 2^-24 of what it gives (Higham, Accuracy and Stability, Sec. 3.1),
    so this holds on every machine. With two ``casts`` the sum of products was cast before the bias was added.
    """
    relative = (additions + 4) * 2.0**-24  # 4: scales, bias
    error = relative / (1 - relative) * terms
    unit = torch.finfo(actual.dtype).eps / 2
    allowed = error + unit * (expected.abs() + error + (casts - 1) * terms) + torch.finfo(actual.dtype).tiny
    excess = (actual.cpu().double() - expected).abs() - allowed
    assert excess.numel() == 0 or excess.max() <= 0, f"off by {excess.max().item()} more than rounding allows"


def assert_rounded(q: torch.Tensor, expected: torch.Tensor) -> None:
    """``q`` is ``expected`` rounded and clipped; 1e-3 from a rounding boundary it may be the other neighbour."""
    expected = expected.clamp(-128, 127)
    assert q.dtype == torch.int8
    difference = (q.cpu().double() - expected).abs()
    worst = difference.max().item() if difference.numel() else 0
    assert worst <= 0.5 + 1e-3, f"off by {worst} steps"


def gelu(y: torch.Tensor) -> torch.Tensor:
    return F.gelu(y, approximate="tanh")
