"""Random layers, their exact outputs, and how close a kernel has to come."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qandc_kernels import pack_int4

# of |expected| and of the typical size of what was added up: a few ulp in float32, half an ulp after a cast
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


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


def to(device: torch.device, p: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if t is None else t.to(device) for name, t in p.items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, size: float = 1.0) -> None:
    """Elementwise, in the precision of ``actual``; ``size`` is that of the terms which were added."""
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance * size, rtol=tolerance)


def assert_rounded(q: torch.Tensor, expected: torch.Tensor) -> None:
    """``q`` is ``expected`` rounded and clipped; 1e-3 from a rounding boundary it may be the other neighbour."""
    expected = expected.clamp(-128, 127)
    assert q.dtype == torch.int8
    difference = (q.cpu().double() - expected).abs()
    worst = difference.max().item() if difference.numel() else 0
    assert worst <= 0.5 + 1e-3, f"off by {worst} steps"


def gelu(y: torch.Tensor) -> torch.Tensor:
    return F.gelu(y, approximate="tanh")
