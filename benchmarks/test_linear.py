"""Latency of one linear layer of DiT-XL/2: ours, full precision, and quantization that is only simulated.

    pytest benchmarks/ --benchmark-only

Wall time of a call that waits for its result, launches included. Each candidate is compared with a float64 product
before it is timed. Without a GPU the rows are few, and the ops run in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from qandc_kernels import int8_linear, quantize_per_tensor
from qandc_kernels.reference import quantize_per_token

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
ROWS = 4096 if CUDA else 64
DIT_XL_2 = {"qkv": (3456, 1152), "out": (1152, 1152), "fc1": (4608, 1152), "fc2": (1152, 4608)}  # (N, K)


def candidates(n: int, k: int) -> tuple[torch.Tensor, dict[str, Callable[[], torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(shape, generator=generator) for shape in ((ROWS, k), (n, k), (n,)))
    expected = F.linear(x.double(), w.double(), bias.double())
    wq, w_scale = quantize_per_token(w)
    x_scale = x.abs().max() / 127
    x, w, bias = (t.to(DEVICE, DTYPE) for t in (x, w, bias))
    wq, w_scale, x_scale = (t.to(DEVICE) for t in (wq, w_scale, x_scale))
    xq = quantize_per_tensor(x, x_scale)
    w_hat = (wq * w_scale[:, None]).to(DTYPE)
    return expected, {
        "full precision": lambda: F.linear(x, w, bias),
        "simulated W8A8": lambda: F.linear((quantize_per_tensor(x, x_scale) * x_scale).to(DTYPE), w_hat, bias),
        "W8A8": lambda: int8_linear(xq, wq, x_scale, w_scale, bias, out_dtype=DTYPE),
        "quantize + W8A8": lambda: int8_linear(
            quantize_per_tensor(x, x_scale), wq, x_scale, w_scale, bias, out_dtype=DTYPE
        ),
    }


@pytest.mark.parametrize("name", ["full precision", "simulated W8A8", "W8A8", "quantize + W8A8"])
@pytest.mark.parametrize("layer", DIT_XL_2)
def test_linear(benchmark, layer: str, name: str) -> None:
    """One layer, one candidate; groups of the table are layers."""
    expected, functions = candidates(*DIT_XL_2[layer])
    function = functions[name]
    error = (function().cpu().double() - expected).norm() / expected.norm()
    assert error < 0.03

    def call() -> None:
        function()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{layer} {(ROWS, *DIT_XL_2[layer])} on {torch.cuda.get_device_name() if CUDA else 'the CPU'}"
    benchmark.extra_info["relative error"] = error.item()
    benchmark.pedantic(call, warmup_rounds=5, rounds=30 if CUDA else 5, iterations=10 if CUDA else 1)
