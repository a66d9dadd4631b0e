"""What the public ops refuse, and that torch sees them as well-behaved custom ops."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import qandc_kernels
from qandc_kernels import (
    ArgumentError,
    int4_linear,
    int8_linear,
    quantize_per_token,
    reference,
    weight_only_linear,
)

XQ, WQ = torch.zeros(3, 16, dtype=torch.int8), torch.zeros(5, 16, dtype=torch.int8)
PACKED = torch.zeros(5, 8, dtype=torch.uint8)
ONE, VECTOR, META = torch.tensor(1.0), torch.ones(5), torch.ones(5, device="meta")
SCALES = {"x_scale": ONE, "w_scale": VECTOR}
TOKENS, VECTORS = torch.zeros(2, 3, 16), torch.zeros(2, 16)
HEADS, FEATURES = torch.zeros(2, 4, 2, 16), torch.zeros(1, 3, 2, 2, 3, 16)
GAINS = torch.zeros(3, 2, 8)
PREDICTION, LATENTS = torch.zeros(4, 6, 3, 5), torch.zeros(2, 4, 3, 5)
GOOD = {  # what each op takes
    "int8_matmul": {"xq": XQ, "wq": WQ},
    "int8_linear": {"xq": XQ, "wq": WQ, **SCALES},
    "int4_linear": {"xq": XQ, "wq_packed": PACKED, **SCALES},
    "linear_into_": {"out": torch.zeros(3, 5), "xq": XQ, "weight": WQ, **SCALES},
    "linear_gelu_quantize": {"xq": XQ[None], "weight": WQ, **SCALES, "out_scale": ONE},
    "linear_gate_residual_": {
        "xq": XQ[None], "weight": WQ, **SCALES, "residual": torch.zeros(1, 3, 5), "gate": torch.zeros(1, 5)
    },
    "weight_only_linear": {"x": torch.zeros(3, 16).half(), "weight": WQ, "w_scale": VECTOR},
    "quantize_per_tensor": {"x": torch.zeros(2, 2), "scale": ONE},
    "quantize_per_token": {"x": torch.zeros(2, 2)},
    "gelu_quantize_per_token": {"x": torch.zeros(2, 2), "beside": torch.zeros(2, 3, 4)},
    "adaln_quantize_per_token": {"x": TOKENS, "shift": VECTORS, "scale": VECTORS},
    "attention_quantize_per_tensor": {"q": HEADS, "k": HEADS, "v": HEADS, "out_scale": ONE},
    "batched_linear": {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(2, 5, 4), "bias": torch.zeros(2, 5)},
    "gated_sum": {"x": TOKENS, "features": FEATURES},
    "corrected_gates": {"gates": torch.zeros(3, 2, 5, 8), "gains": GAINS, "offsets": GAINS},
    "guided_step": {
        "prediction": PREDICTION, "latents": LATENTS, "coefficients": torch.zeros(3, 4), "guidance_scale": 1.5
    },
}  # fmt: skip
ROPE = {"q_weight": torch.ones(8), "k_weight": torch.ones(8), "cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}
GOOD["qk_norm_rope_"] = {"qkv": torch.zeros(2, 3, 3, 2, 8), **ROPE}
LONG = torch.zeros(1, 65536, dtype=torch.int8)
REFUSALS = [  # changes to that, and what the message says; test_arguments.py tries all kinds of values
    ("int8_matmul", {"xq": LONG, "wq": LONG}, "up to K = 65535"),
    ("int8_linear", {"xq": XQ.float()}, "xq must be int8; got float32"),
    ("int8_linear", {"wq": WQ[:, :8]}, r"must agree in K; got \(3, 16\) and \(5, 8\)"),
    ("int8_linear", {"wq": WQ[0]}, "must agree in K"),
    ("int8_linear", {"x_scale": 1.0}, "x_scale must be a tensor; got float"),
    ("int8_linear", {"x_scale": torch.ones(4)}, r"x_scale must have shape \(\) or \(3,\); got \(4,\)"),
    ("int8_linear", {"w_scale": torch.ones(3)}, r"w_scale must have shape \(5,\); got \(3,\)"),
    ("int8_linear", {"w_scale": torch.ones(5, 2)}, "for int4 weights in groups"),
    ("int8_linear", {"out_dtype": torch.int8}, "out_dtype must be float16"),
    ("int8_linear", {"w_scale": META}, "one device; got xq on cpu.*w_scale on meta"),
    ("int4_linear", {"wq_packed": PACKED.repeat(1, 2)}, r"wq_packed \[N, K/2\] .*; got \(3, 16\) and \(5, 16\)"),
    ("linear_gelu_quantize", {"weight": WQ.float()}, "weight must be int8 or uint8; got float32"),
    ("linear_gelu_quantize", {"x_scale": torch.ones(3)}, r"x_scale must have shape \(\) or \(1, 3\)"),
    ("linear_into_", {"out": torch.zeros(5, 3).mT}, "its last stride must be 1"),
    ("linear_gate_residual_", {"xq": XQ}, r"xq must be \[samples, tokens, K\]; got \(3, 16\)"),
    ("linear_gate_residual_", {"residual": torch.zeros(1, 5, 3).mT}, "residual must be contiguous.*got strides"),
    ("weight_only_linear", {"x": torch.zeros(3, 8).half()}, r"x \[..., K\] and weight \[N, K\] must agree in K"),
    ("weight_only_linear", {"weight": PACKED.repeat(1, 2)}, r"weight \[N, K/2\] must agree in K"),
    ("quantize_per_tensor", {"x": XQ}, "x must be float16 or bfloat16 or float32"),
    ("quantize_per_tensor", {"x": ONE}, "at least one dimension"),
    ("quantize_per_tensor", {"bits": 9}, "bits must be an integer from 2 to 8; got 9"),
    ("quantize_per_tensor", {"bits": 8.0}, r"got 8\.0"),
    ("quantize_per_tensor", {"x": torch.zeros(1, 65536)}, "allowed are up to 65535"),
    ("quantize_per_token", {"token_dims": 3}, "must be 1 or 2, and x have as many; got 3, 2 dimensions"),
    ("quantize_per_token", {"token_dims": 1.0}, r"token_dims must be 1 or 2.*got 1\.0"),
    ("quantize_per_token", {"x": torch.zeros(1, 300, 300), "token_dims": 2}, "a token of x is 90000; .* up to 65535"),
    ("gelu_quantize_per_token", {"multiplier": torch.ones(3)}, r"multiplier must have shape \(2,\); got \(3,\)"),
    ("gelu_quantize_per_token", {"beside": VECTORS}, r"beside must be \[..., heads, D\] as x .*; got \(2, 16\)"),
    ("gelu_quantize_per_token", {"x": torch.zeros(1, 65530), "beside": torch.zeros(1, 2, 3)}, "at most 65535 .* 6 \\+"),
    ("adaln_quantize_per_token", {"x": VECTORS}, r"x must be \[samples, tokens, K\] .*; got \(2, 16\)"),
    ("adaln_quantize_per_token", {"x": TOKENS[..., :0]}, "with K from 1 to 65535"),
    ("adaln_quantize_per_token", {"eps": -1.0}, "eps must be a finite number >= 0; got -1.0"),
    ("attention_quantize_per_tensor", {"q": TOKENS}, r"q must be \[batch, tokens, heads, D\]"),
    ("attention_quantize_per_tensor", {"k": HEADS.half()}, "k must be float32"),
    ("attention_quantize_per_tensor", {"v": torch.zeros(2, 5, 2, 16)}, r"v must have shape \(2, 4, 2, 16\)"),
    ("attention_quantize_per_tensor", {"k": torch.zeros(2, 4, 1, 16)}, r"k must be \[batch, keys, heads, D\]"),
    ("attention_quantize_per_tensor", {"key_bias": torch.zeros(2, 5)}, r"key_bias must have shape \(2, 4\)"),
    ("batched_linear", {"x": torch.zeros(2, 3)}, r"x must be \[L, M, K\]"),
    ("batched_linear", {"weight": torch.zeros(2, 5, 4).half()}, "weight must be float32"),
    ("batched_linear", {"share": 0}, "share must be a finite number > 0"),
    ("gated_sum", {"x": TOKENS[..., 1:]}, r"x must be \[samples, tokens, D\]"),
    ("gated_sum", {"features": FEATURES[0]}, r"features \[S, L, K, samples, tokens, D\]"),
    ("gated_sum", {"features": FEATURES.to(torch.int8)}, "int8 features need scales"),
    ("gated_sum", {"scales": torch.ones(1, 3, 2, 2, 3)}, "int8 features need scales"),
    ("gated_sum", {"features": torch.zeros(1, 2, 3, 2, 3, 16).transpose(1, 2)}, "features must be contiguous"),
    ("corrected_gates", {"gates": GAINS}, r"gates must be \[L, K, samples, D\]"),
    ("corrected_gates", {"gains": torch.zeros(2, 3, 8).transpose(0, 1)}, "gains must be contiguous"),
    ("qk_norm_rope_", {"qkv": HEADS}, r"qkv must be \[samples, tokens, 3, heads, D\]"),
    ("qk_norm_rope_", {"qkv": torch.zeros(2, 3, 3, 2, 7)}, "with an even D from 2 to 1024"),
    ("qk_norm_rope_", {"cos": torch.ones(4, 8)}, r"cos must have shape \(3, 8\)"),
    ("qk_norm_rope_", {"qkv": torch.zeros(1, 3, 3, 2, 8).expand(2, -1, -1, -1, -1)}, "its elements apart; .*clone it"),
    ("qk_norm_rope_", {"qkv": torch.zeros(2, 3, 3, 8, 2).mT}, "its last stride must be 1"),
    ("guided_step", {"latents": LATENTS[0]}, r"latents must be \[B, C, H, W\]"),
    ("guided_step", {"latents": ONE}, r"latents must be \[B, C, H, W\]"),
    ("guided_step", {"prediction": PREDICTION[:2]}, r"prediction \[2 B, C or more, H, W\]"),
    ("guided_step", {"prediction": PREDICTION[:, :3]}, "C or more"),
    ("guided_step", {"prediction": PREDICTION[..., :4]}, "C or more"),
    ("guided_step", {"guidance_scale": None}, r"prediction \[B, C or more, H, W\]"),
    ("guided_step", {"guidance_scale": float("nan")}, "guidance_scale must be a finite number or None"),
]


@pytest.mark.parametrize(("op", "changes", "message"), REFUSALS)
def test_refusals_say_what_was_given_and_what_is_allowed(op, changes, message):
    with pytest.raises(ArgumentError, match=message):
        getattr(qandc_kernels, op)(**{**GOOD[op], **changes})


@pytest.mark.parametrize(
    ("k", "w_scale", "message"),
    [
        (192, torch.ones(5, 7), r"have shape \(5,\), or \(5, K/G\).*32, 64 or 128.*got \(5, 7\) with K = 192"),
        (192, torch.ones(4, 6), "got \\(4, 6\\)"),
        (160, torch.ones(5, 5), "a multiple of 64; got \\(5, 5\\) with K = 160"),
        (0, torch.ones(5, 0), "got \\(5, 0\\) with K = 0"),
        (192, torch.ones(5, 12), "got \\(5, 12\\)"),  # groups of 16
    ],
)
def test_groups_that_do_not_divide_k(k, w_scale, message):
    xq, packed = torch.zeros(3, k, dtype=torch.int8), torch.zeros(5, k // 2, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=message):
        int4_linear(xq, packed, ONE, w_scale)
    with pytest.raises(ArgumentError, match=message):
        weight_only_linear(xq.half(), packed, w_scale)


def test_sums_of_groups_are_floats():
    xq, packed = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(5, 32, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="w_sum must be float32; got int32"):
        int4_linear(xq, packed, ONE, torch.ones(5, 2), w_sum=torch.zeros(5, dtype=torch.int32))


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
        "gelu_quantize_per_token": (x, torch.rand(32, device=device), torch.randn(6, 2, 5, device=device)),
        "int8_matmul": (xq, wq),
        "int8_linear": (xq, wq, *linear),
        "int4_linear": (xq, packed, *linear),
        "linear_gelu_quantize": (
            xq, wq, x_scale, w_scale, one, None, zero_point, None, None, None,
            x.masked_fill(x > 1, nan)[:, None], nan_flag,
        ),
        "linear_into_": (torch.randn(6, 8, device=device), xq, wq, *linear[:-1]),
        "linear_gate_residual_": (
            torch.randn(2, 3, 8, device=device), xq.view(2, 3, 32), packed, x_scale.view(2, 3), w_scale,
            torch.randn(2, 8, device=device), None, zero_point, w_sum, torch.zeros(2, 3, 8, device=device),
        ),
        "corrected_gates": (
            torch.randn(3, 2, 2, 32, device=device).half(), *torch.randn(2, 3, 2, 32, device=device),
        ),
        "gated_sum": (
            adaln[0], torch.randn(2, 3, 2, 2, 3, 32, device=device), torch.randn(3, 2, 2, 32, device=device),
            torch.ones(2, device=device), None, torch.randn(2, 32, device=device),
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
        "adaln_quantize_per_tensor": (
            *adaln, torch.tensor(0.1, device=device), zero_point, 1e-6, torch.zeros(2, 3, 32, device=device)
        ),
        "adaln_quantize_per_token": (*adaln, 1e-6, torch.zeros(2, 3, 32, device=device)),
        "batched_linear": (
            torch.randn(3, 2, 32, device=device), torch.randn(3, 8, 32, device=device), w_scale.expand(3, 8), 1.0
        ),
        "qk_norm_rope_": (
            torch.randn(2, 3, 3, 2, 16, device=device).half(), *torch.randn(2, 16, device=device),
            *torch.randn(2, 3, 16, device=device), 1e-6,
        ),
        "attention_quantize_per_tensor": (
            *torch.full((2, 3, 3, 2, 16), nan, device=device).unbind(2), one, zero_point, nan_flag,
            torch.zeros(2, 3, device=device),
        ),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("op", reference.__all__)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(op, device):
    """Schema, fake implementation and dispatch agree with what the op does."""
    torch.library.opcheck(
        getattr(torch.ops.qandc, op).default,
        sample_arguments(device)[op],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("op", reference.__all__)
def test_checks_do_not_break_a_graph(op):
    """Compiled with the layer around it; weights are parameters there."""
    written = ("residual", "out_branch", "nan_flag", "qkv", "out", "out_x")
    names = inspect.signature(getattr(qandc_kernels, op)).parameters
    arguments = [
        torch.nn.Parameter(value, requires_grad=False)
        if isinstance(value, torch.Tensor) and name not in written
        else value
        for name, value in zip(names, sample_arguments("cpu")[op], strict=True)
    ]
    torch.compile(getattr(qandc_kernels, op), fullgraph=True, backend="eager")(*arguments)


@pytest.mark.slow
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
