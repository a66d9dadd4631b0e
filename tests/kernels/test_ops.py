"""What the public ops refuse, and that torch sees them as well-behaved custom ops."""

from __future__ import annotations

import pytest
import torch

import qandc_kernels
from qandc_kernels import int8_linear, int8_matmul, quantize_per_tensor, quantize_per_token, reference, select_backend

XQ = torch.zeros(3, 16, dtype=torch.int8)
WQ = torch.zeros(5, 16, dtype=torch.int8)
GOOD = {"xq": XQ, "wq": WQ, "x_scale": torch.tensor(1.0), "w_scale": torch.ones(5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"xq": XQ.float()}, TypeError, "xq must be int8; got float32"),
        ({"wq": WQ.to(torch.uint8)}, TypeError, "weight must be int8; got uint8"),
        ({"wq": WQ[:, :8]}, ValueError, r"must agree in K; got \(3, 16\) and \(5, 8\)"),
        ({"wq": WQ[0]}, ValueError, "must agree in K"),
        ({"x_scale": 1.0}, TypeError, "x_scale must be a tensor; got float"),
        ({"x_scale": torch.tensor(1.0).half()}, TypeError, "x_scale must be float32"),
        ({"x_scale": torch.ones(4)}, ValueError, r"x_scale must have shape \(\) or \(3,\)"),
        ({"w_scale": torch.ones(3)}, ValueError, r"w_scale must have shape \(5,\); got \(3,\)"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, TypeError, "bias must be float16"),
        ({"x_zero_point": torch.tensor(1.0)}, TypeError, "x_zero_point must be int32"),
        ({"w_sum": torch.zeros(4, dtype=torch.int32)}, ValueError, "w_sum must have shape"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be float16"),
        ({"w_scale": torch.ones(5, device="meta")}, ValueError, "one device; got xq on cpu.*w_scale on meta"),
    ],
)
def test_int8_linear_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        int8_linear(**{**GOOD, **changes})


def test_k_beyond_int32_is_refused():
    x, w = torch.zeros(1, 65536, dtype=torch.int8), torch.zeros(1, 65536, dtype=torch.int8)
    with pytest.raises(ValueError, match="exact up to K = 65535"):
        int8_matmul(x, w)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 2, dtype=torch.int8)}, TypeError, "x must be float16 or bfloat16 or float32"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \(\)"),
        ({"zero_point": torch.tensor(1)}, TypeError, "zero_point must be int32; got int64"),
        ({"bits": 9}, ValueError, "bits must be 2 to 8; got 9"),
        ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "one device"),
    ],
)
def test_quantize_per_tensor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_per_tensor(**{"x": torch.zeros(2, 2), "scale": torch.tensor(1.0), **arguments})


def test_quantize_per_token_refuses():
    with pytest.raises(TypeError, match="float64"):
        quantize_per_token(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="bits must be 2 to 8; got 1"):
        quantize_per_token(torch.zeros(2, 2), bits=1)


def sample_arguments(device: str) -> dict[str, tuple]:
    x = torch.randn(6, 32, device=device)
    xq, x_scale = quantize_per_token(x)
    wq, w_scale = quantize_per_token(torch.randn(8, 32, device=device))
    zero_point, w_sum = torch.tensor(3, dtype=torch.int32, device=device), wq.sum(1, dtype=torch.int32)
    linear = (x_scale, w_scale, torch.randn(8, device=device), zero_point, w_sum, torch.float16)
    packed = qandc_kernels.pack_int4(wq // 32)
    return {
        "quantize_per_tensor": (x, torch.tensor(0.1, device=device), zero_point, 8),
        "quantize_per_token": (x, 8),
        "int8_matmul": (xq, wq),
        "int8_linear": (xq, wq, *linear),
        "int4_linear": (xq, packed, *linear),
    }


@pytest.mark.parametrize(
    "op", ["quantize_per_tensor", "quantize_per_token", "int8_matmul", "int8_linear", "int4_linear"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(op, device):
    """Schema, fake implementation and dispatch agree with what the op does."""
    torch.library.opcheck(
        getattr(torch.ops.qandc, op).default,
        sample_arguments(device)[op],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_reference_has_the_signatures_of_the_ops():
    import inspect

    for name in reference.__all__:
        public = inspect.signature(getattr(qandc_kernels, name))
        assert str(inspect.signature(getattr(reference, name))) == str(public)


def test_backend_says_why_not():
    backend = select_backend("cpu")
    assert backend.name == "reference"
    assert "CUDA" in backend.reason


@pytest.mark.gpu
def test_backend_on_a_gpu():
    assert select_backend("cuda").name == "triton"
