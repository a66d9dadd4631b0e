"""What the public ops refuse, and that torch sees them as well-behaved custom ops."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import qandc_kernels
from qandc_kernels import (
    adaln_quantize_per_tensor,
    adaln_quantize_per_token,
    int4_linear,
    int8_linear,
    int8_matmul,
    linear_gate_residual_,
    linear_gelu_quantize,
    quantize_per_tensor,
    quantize_per_token,
    reference,
    select_backend,
    weight_only_linear,
)

XQ = torch.zeros(3, 16, dtype=torch.int8)
WQ = torch.zeros(5, 16, dtype=torch.int8)
GOOD = {"xq": XQ, "wq": WQ, "x_scale": torch.tensor(1.0), "w_scale": torch.ones(5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"xq": XQ.float()}, TypeError, "xq must be int8; got float32"),
        ({"wq": WQ.to(torch.uint8)}, TypeError, "wq must be int8; got uint8"),
        ({"wq": WQ[:, :8]}, ValueError, r"must agree in K; got \(3, 16\) and \(5, 8\)"),
        ({"wq": WQ[0]}, ValueError, "must agree in K"),
        ({"x_scale": 1.0}, TypeError, "x_scale must be a tensor; got float"),
        ({"x_scale": torch.tensor(1.0).half()}, TypeError, "x_scale must be float32"),
        ({"x_scale": torch.ones(4)}, ValueError, r"x_scale must have shape \(\) or \(3,\); got \(4,\)"),
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
        ({"bits": 9}, ValueError, "bits must be an integer from 2 to 8; got 9"),
        ({"bits": 8.0}, ValueError, "got 8.0"),
        ({"x": torch.zeros(1, 65536)}, ValueError, "allowed are up to 65535"),
        ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "one device"),
    ],
)
def test_quantize_per_tensor_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_per_tensor(**{"x": torch.zeros(2, 2), "scale": torch.tensor(1.0), **arguments})


def test_quantize_per_token_refuses():
    with pytest.raises(TypeError, match="float64"):
        quantize_per_token(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8; got 1"):
        quantize_per_token(torch.zeros(2, 2), bits=1)
    with pytest.raises(ValueError, match="at least one dimension"):
        quantize_per_token(torch.tensor(1.0))


def test_int4_linear_refuses():
    packed = torch.zeros(5, 8, dtype=torch.uint8)
    good = {"xq": XQ, "wq_packed": packed, "x_scale": torch.tensor(1.0), "w_scale": torch.ones(5)}
    with pytest.raises(TypeError, match="wq_packed must be uint8; got int8"):
        int4_linear(**{**good, "wq_packed": WQ})
    with pytest.raises(ValueError, match=r"wq_packed \[N, K/2\] must agree in K; got \(3, 16\) and \(5, 16\)"):
        int4_linear(**{**good, "wq_packed": torch.zeros(5, 16, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("k", "w_scale", "message"),
    [
        (
            192,
            torch.ones(5, 7),
            r"w_scale must have shape \(5,\), or \(5, K/G\).*32, 64 or 128.*got \(5, 7\) with K = 192",
        ),
        (192, torch.ones(4, 6), "got \\(4, 6\\)"),
        (160, torch.ones(5, 5), "a multiple of 64; got \\(5, 5\\) with K = 160"),
        (0, torch.ones(5, 0), "got \\(5, 0\\) with K = 0"),
        (192, torch.ones(5, 12), "got \\(5, 12\\)"),  # groups of 16
    ],
)
def test_groups_that_do_not_divide_k(k, w_scale, message):
    xq, packed = torch.zeros(3, k, dtype=torch.int8), torch.zeros(5, k // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        int4_linear(xq, packed, torch.tensor(1.0), w_scale)
    with pytest.raises(ValueError, match=message):
        weight_only_linear(xq.half(), packed, w_scale)


def test_groups_need_int4_weights_and_float_sums():
    xq, packed = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(5, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="for int4 weights in groups"):
        int8_linear(xq, torch.zeros(5, 64, dtype=torch.int8), torch.tensor(1.0), torch.ones(5, 2))
    with pytest.raises(TypeError, match="w_sum must be float32; got int32"):
        int4_linear(xq, packed, torch.tensor(1.0), torch.ones(5, 2), w_sum=torch.zeros(5, dtype=torch.int32))


FUSED = {"xq": XQ[None], "weight": WQ, "x_scale": torch.tensor(1.0), "w_scale": torch.ones(5)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": WQ.float()}, TypeError, "weight must be int8 or uint8; got float32"),
        ({"out_scale": torch.ones(2)}, ValueError, r"out_scale must have shape \(\); got \(2,\)"),
        ({"out_scale": 1.0}, TypeError, "out_scale must be a tensor; got float"),
        ({"out_zero_point": torch.tensor(1)}, TypeError, "out_zero_point must be int32; got int64"),
        ({"multiplier": 2.0}, TypeError, "multiplier must be a tensor; got float"),
        ({"multiplier": torch.ones(4)}, ValueError, r"multiplier must have shape \(5,\)"),
        ({"multiplier": torch.ones(5, device="meta")}, ValueError, "one device"),
        ({"x_scale": torch.ones(3)}, ValueError, r"x_scale must have shape \(\) or \(1, 3\)"),
    ],
)
def test_linear_gelu_quantize_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        linear_gelu_quantize(**{**FUSED, "out_scale": torch.tensor(1.0), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"xq": XQ}, ValueError, r"xq must be \[samples, tokens, K\]; got \(3, 16\)"),
        ({"residual": torch.zeros(1, 3, 4)}, ValueError, r"residual must have shape \(1, 3, 5\)"),
        ({"residual": torch.zeros(1, 5, 3).mT}, ValueError, "residual must be contiguous.*got strides"),
        ({"residual": torch.zeros(1, 3, 5).double()}, TypeError, "residual must be float16"),
        ({"gate": 1.0}, TypeError, "gate must be a tensor; got float"),
        ({"residual": 1.0}, TypeError, "residual must be a tensor; got float"),
        ({"gate": torch.zeros(3, 5)}, ValueError, r"gate must have shape \(1, 5\)"),
        ({"gate": torch.zeros(1, 5, device="meta")}, ValueError, "one device"),
    ],
)
def test_linear_gate_residual_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        linear_gate_residual_(**{**FUSED, "residual": torch.zeros(1, 3, 5), "gate": torch.zeros(1, 5), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 16).double()}, TypeError, "x must be float16 or bfloat16 or float32; got float64"),
        ({"x": torch.zeros(3, 8).half()}, ValueError, r"x \[..., K\] and weight \[N, K\] must agree in K"),
        ({"weight": torch.zeros(5, 16, dtype=torch.uint8)}, ValueError, r"weight \[N, K/2\] must agree in K"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
    ],
)
def test_weight_only_linear_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        weight_only_linear(**{"x": torch.zeros(3, 16).half(), "weight": WQ, "w_scale": torch.ones(5), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.zeros(3, 16)},
            ValueError,
            r"x must be \[samples, tokens, K\] with K from 1 to 65535; got \(3, 16\)",
        ),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "with K from 1 to 65535"),
        ({"x": torch.zeros(2, 3, 16).double()}, TypeError, "x must be float16"),
        ({"shift": torch.zeros(3, 16)}, ValueError, r"shift must have shape \(2, 16\); got \(3, 16\)"),
        ({"scale": torch.zeros(2, 16, dtype=torch.int8)}, TypeError, "scale must be float16"),
        ({"scale": torch.zeros(2, 16, device="meta")}, ValueError, "one device"),
    ],
)
def test_adaln_refuses(changes, error, message):
    good = {"x": torch.zeros(2, 3, 16), "shift": torch.zeros(2, 16), "scale": torch.zeros(2, 16)}
    with pytest.raises(error, match=message):
        adaln_quantize_per_token(**{**good, **changes})
    with pytest.raises(error, match=message):
        adaln_quantize_per_tensor(**{**good, **changes}, q_scale=torch.tensor(1.0))


def test_adaln_refuses_scales():
    x, vector = torch.zeros(2, 3, 16), torch.zeros(2, 16)
    for eps in ("x", -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="eps must be a finite number >= 0; got"):
            adaln_quantize_per_token(x, vector, vector, eps)
    with pytest.raises(ValueError, match=r"q_scale must have shape \(\)"):
        adaln_quantize_per_tensor(x, vector, vector, torch.ones(2))
    with pytest.raises(TypeError, match="zero_point must be int32"):
        adaln_quantize_per_tensor(x, vector, vector, torch.tensor(1.0), torch.tensor(1))


def test_token_dims():
    with pytest.raises(ValueError, match="token_dims must be 1 or 2, and x have as many; got 3, 4 dimensions"):
        quantize_per_token(torch.zeros(2, 3, 4, 5), token_dims=3)
    with pytest.raises(ValueError, match=r"token_dims must be 1 or 2.*got 1\.0"):
        quantize_per_token(torch.zeros(2, 3), token_dims=1.0)
    with pytest.raises(ValueError, match="got 2, 1 dimensions"):
        quantize_per_token(torch.zeros(5), token_dims=2)
    with pytest.raises(ValueError, match="a token of x is 90000; allowed are up to 65535"):
        quantize_per_token(torch.zeros(1, 300, 300), token_dims=2)


def test_int8_matmul_refuses_two_devices():
    with pytest.raises(ValueError, match="one device"):
        int8_matmul(XQ, WQ.to("meta"))


def sample_arguments(device: str) -> dict[str, tuple]:
    x = torch.randn(6, 32, device=device)
    xq, x_scale = quantize_per_token(x)
    wq, w_scale = quantize_per_token(torch.randn(8, 32, device=device))
    zero_point, w_sum = torch.tensor(3, dtype=torch.int32, device=device), wq.sum(1, dtype=torch.int32)
    linear = (x_scale, w_scale, torch.randn(8, device=device), zero_point, w_sum, torch.float16)
    nan = float("nan")  # for the flag to be written to
    one, nan_flag = torch.tensor(1.0, device=device), torch.zeros((), dtype=torch.int32, device=device)
    adaln = x.view(2, 3, 32), torch.randn(2, 32, device=device), torch.randn(2, 32, device=device)
    packed = qandc_kernels.pack_int4(wq // 32)
    x = x.t().contiguous().t()  # the ops promise contiguous results for any strides
    return {
        "quantize_per_tensor": (x.masked_fill(x > 1, nan), torch.tensor(0.1, device=device), zero_point, 8, nan_flag),
        "quantize_per_token": (x, 8, 1),
        "int8_matmul": (xq, wq),
        "int8_linear": (xq, wq, *linear),
        "int4_linear": (xq, packed, *linear),
        "linear_gelu_quantize": (xq, wq, x_scale, w_scale, one, None, zero_point, None, None, None),
        "linear_gate_residual_": (
            torch.randn(2, 3, 8, device=device), xq.view(2, 3, 32), packed, x_scale.view(2, 3), w_scale,
            torch.randn(2, 8, device=device), None, zero_point, w_sum, torch.zeros(2, 3, 8, device=device),
        ),
        "gated_sum": (
            adaln[0], torch.randn(2, 3, 2, 2, 3, 32, device=device), torch.randn(3, 2, 2, 32, device=device),
            torch.ones(2, device=device), None,
        ),
        "guided_step": (
            torch.randn(4, 6, 3, 5, device=device).half(), torch.randn(2, 4, 3, 5, device=device),
            torch.randn(3, 4, device=device), 1.5,
        ),
        "weight_only_linear": (x.half(), wq, w_scale, None),
        "quantized_linear": (
            x.masked_fill(x > 1, nan), packed, w_scale, None, torch.tensor(0.1, device=device), zero_point, w_sum,
            torch.rand(32, device=device) + 0.5, 8, torch.float16, nan_flag,
        ),
        "adaln_quantize_per_tensor": (*adaln, torch.tensor(0.1, device=device), zero_point, 1e-6),
        "adaln_quantize_per_token": (*adaln, 1e-6),
        "batched_linear": (
            torch.randn(3, 2, 32, device=device), torch.randn(3, 8, 32, device=device), w_scale.expand(3, 8), 1.0
        ),
        "attention_quantize_per_tensor": (
            *torch.full((2, 3, 3, 2, 16), nan, device=device).unbind(2), one, zero_point, nan_flag
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", reference.__all__)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(op, device):
    """Schema, fake implementation and dispatch agree with what the op does."""
    torch.library.opcheck(
        getattr(torch.ops.qandc, op).default,
        sample_arguments(device)[op],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("op", reference.__all__)
def test_checks_do_not_break_a_graph(op):
    """Compiled with the layer around it; weights are parameters there."""
    written = ("residual", "out_branch", "nan_flag")
    names = inspect.signature(getattr(qandc_kernels, op)).parameters
    arguments = [
        torch.nn.Parameter(value, requires_grad=False)
        if isinstance(value, torch.Tensor) and name not in written
        else value
        for name, value in zip(names, sample_arguments("cpu")[op], strict=True)
    ]
    torch.compile(getattr(qandc_kernels, op), fullgraph=True, backend="eager")(*arguments)


@pytest.mark.parametrize("per_token", [True, False])
def test_dynamic_shapes_compile(per_token):
    """One graph for all batch sizes."""

    def layer(x, w, scale):
        xq, x_scale = quantize_per_token(x)
        return int8_linear(xq, w, x_scale if per_token else scale, torch.ones(5), out_dtype=torch.float32)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randint(-9, 9, (5, 16), dtype=torch.int8)
    for rows in (2, 3, 7):
        x = torch.randn(rows, 4, 16)
        assert torch.equal(compiled(x, w, torch.tensor(0.1)), layer(x, w, torch.tensor(0.1)))


def test_other_devices_get_the_reference():
    """Registered for every device that has no kernel of its own, not for the CPU alone."""
    for name in reference.__all__:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qandc::{name}", "CompositeExplicitAutograd")


def test_reference_has_the_signatures_of_the_ops():
    for name in reference.__all__:
        op, definition = getattr(qandc_kernels, name), getattr(reference, name)
        assert op is not definition
        assert str(inspect.signature(definition)) == str(inspect.signature(op))
        assert op.__doc__ == definition.__doc__
        assert pickle.loads(pickle.dumps(op)) is op


def test_backend_says_why_not():
    backend = select_backend("cpu")
    assert backend.name == "reference"
    assert "CUDA" in backend.reason


@pytest.mark.gpu
def test_backend_on_a_gpu():
    assert select_backend("cuda").name == "triton"
