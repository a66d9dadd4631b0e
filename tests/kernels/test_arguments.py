"""Every public function and its reference refuse bad values of every parameter, with an error of ours."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import qandc
import qandc_kernels
from qandc_kernels import ArgumentError, linear_gate_residual_, quantize_per_tensor, reference
from qandc_kernels.ops import _checks as op_checks
from tests.kernels.oracle import to

FLOATS = {torch.float16, torch.bfloat16, torch.float32}
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
HUGE = 10**400
ELSE = (True, -1, float("nan"), HUGE, "x", b"x", [], {}, {1}, object(), np.zeros(3), np.array(1), torch.int8, 1j, len)


class Parameter(NamedTuple):
    """A legal value of a parameter, and which of the values that are bad for others are legal for it."""

    good: Any
    legal: tuple[Any, ...] = ()
    dtypes: frozenset[torch.dtype] | set[torch.dtype] = frozenset()
    any_shape: bool = False
    optional: bool = False


def tensor(*shape: int, dtypes=None, dtype=None, **others: Any) -> Parameter:
    dtypes = {dtype or torch.float32} if dtypes is None else dtypes
    return Parameter(torch.ones(shape, dtype=dtype or torch.float32), dtypes=dtypes, **others)


INT32 = {"dtype": torch.int32, "optional": True}
XQ, WQ = tensor(2, 3, 64, dtype=torch.int8), tensor(5, 64, dtype=torch.int8)
SCALES = {"x_scale": tensor(), "w_scale": tensor(5), "bias": tensor(5, dtypes=FLOATS, optional=True)}
LINEAR = {**SCALES, "x_zero_point": tensor(**INT32), "w_sum": tensor(5, **INT32)}
OUT_DTYPE = Parameter(torch.float16)
BITS = Parameter(8)
ADALN = {"x": tensor(2, 3, 64, dtypes=FLOATS), **{name: tensor(2, 64, dtypes=FLOATS) for name in ("shift", "scale")}}
EPS = Parameter(1e-6)
HEADS = {name: tensor(2, 3, 2, 16) for name in "qkv"}
TABLE: dict[str, dict[str, Parameter]] = {
    "quantize_per_tensor": {
        "x": tensor(2, 3, 64, dtypes=FLOATS, any_shape=True),
        "scale": tensor(),
        "zero_point": tensor(**INT32),
        "bits": BITS,
        "nan_flag": tensor(**INT32),
    },
    "quantize_per_token": {
        "x": tensor(2, 3, 64, dtypes=FLOATS, any_shape=True, legal=("meta",)),
        "bits": BITS,
        "token_dims": Parameter(1),
    },
    "gelu_quantize_per_token": {
        "x": tensor(2, 3, 64, dtypes=FLOATS, any_shape=True),
        "multiplier": tensor(64, optional=True),
        "beside": tensor(2, 3, 7, 2, dtypes=FLOATS, optional=True),
    },
    "int8_matmul": {"xq": XQ._replace(any_shape=True), "wq": WQ},
    "int8_linear": {"xq": XQ._replace(any_shape=True), "wq": WQ, **LINEAR, "out_dtype": OUT_DTYPE},
    "int4_linear": {
        "xq": XQ._replace(any_shape=True),
        "wq_packed": tensor(5, 32, dtype=torch.uint8),
        **LINEAR,
        "out_dtype": OUT_DTYPE,
    },
    "linear_gelu_quantize": {
        "xq": XQ._replace(any_shape=True),
        "weight": WQ,
        **LINEAR,
        "out_scale": tensor(),
        "out_zero_point": tensor(**INT32),
        "multiplier": tensor(5, optional=True),
        "beside": tensor(2, 3, 7, 2, dtypes=FLOATS, optional=True),
        "nan_flag": tensor(**INT32),
    },
    "linear_into_": {"out": tensor(2, 3, 5, dtypes=FLOATS), "xq": XQ, "weight": WQ, **LINEAR},
    "linear_gate_residual_": {
        "residual": tensor(2, 3, 5, dtypes=FLOATS),
        "xq": XQ,
        "weight": WQ,
        **LINEAR,
        "gate": tensor(2, 5, dtypes=FLOATS),
        "out_branch": tensor(2, 3, 5, dtypes=FLOATS, optional=True),
    },
    "corrected_gates": {
        "gates": tensor(2, 3, 2, 5, dtypes=FLOATS),
        "gains": tensor(2, 3, 5),
        "offsets": tensor(2, 3, 5),
    },
    "gated_sum": {
        "x": tensor(2, 3, 64, dtypes=FLOATS),
        "features": tensor(1, 2, 2, 2, 3, 64, dtype=torch.int8),
        "gates": tensor(2, 2, 2, 64, dtypes=FLOATS, optional=True),
        "weights": tensor(1, optional=True),
        "scales": tensor(1, 2, 2, 2, 3),
        "offset": tensor(2, 64, optional=True),
    },
    "guided_step": {
        "prediction": tensor(4, 6, 3, 5, dtypes=FLOATS),
        "latents": tensor(2, 4, 3, 5),
        "coefficients": tensor(3, 4),
        "guidance_scale": Parameter(1.5, legal=(-1,)),
    },
    "weight_only_linear": {
        "x": tensor(2, 3, 64, dtype=torch.float16, dtypes=FLOATS, any_shape=True),
        "weight": WQ,
        "w_scale": tensor(5),
        "bias": tensor(5, dtypes=FLOATS, optional=True),
    },
    "quantized_linear": {
        "x": tensor(2, 3, 64, dtypes=FLOATS, any_shape=True),
        "weight": WQ,
        "w_scale": tensor(5),
        "bias": tensor(5, dtypes=FLOATS, optional=True),
        "act_scale": tensor(),  # None needs a zero point of None
        "act_zero_point": tensor(**INT32),
        "w_sum": tensor(5, **INT32),
        "smoothing": tensor(64, optional=True),
        "bits": BITS,
        "out_dtype": OUT_DTYPE._replace(optional=True),
        "nan_flag": tensor(**INT32),
    },
    "adaln_quantize_per_tensor": {
        **ADALN,
        "q_scale": tensor(),
        "zero_point": tensor(**INT32),
        "eps": EPS,
        "out_x": tensor(2, 3, 64, dtypes=FLOATS, optional=True),
    },
    "adaln_quantize_per_token": {**ADALN, "eps": EPS, "out_x": tensor(2, 3, 64, dtypes=FLOATS, optional=True)},
    "batched_linear": {
        "x": tensor(2, 3, 64),
        "weight": tensor(2, 5, 64),
        "bias": tensor(2, 5),
        "share": Parameter(1.0),
    },
    "attention_quantize_per_tensor": {
        **HEADS,
        "out_scale": tensor(),
        "out_zero_point": tensor(**INT32),
        "nan_flag": tensor(**INT32),
        "key_bias": tensor(2, 3, dtypes=FLOATS, optional=True),
    },
    "qk_norm_rope_": {
        "qkv": tensor(2, 3, 3, 2, 16, dtypes=FLOATS),
        "q_weight": tensor(16, dtypes=FLOATS),
        "k_weight": tensor(16, dtypes=FLOATS),
        "cos": tensor(3, 16),
        "sin": tensor(3, 16),
        "eps": EPS,
    },
    "pack_int4": {"q": tensor(2, 4, dtype=torch.int8, any_shape=True, legal=("meta",))},
    "unpack_int4": {"packed": tensor(2, 4, dtype=torch.uint8, any_shape=True, legal=("meta",))},
    "select_backend": {"device": Parameter("cpu", legal=(b"x",))},
    "use_backend": {"name": Parameter("reference")},
    "warm_up": {
        "layers": Parameter([(64, 64)], legal=([],)),
        "rows": Parameter((8, 16), legal=([], {1})),
        "dtype": Parameter(torch.float16),
        "w_bits": Parameter(4),
        "tokens": Parameter(4),
        "device": Parameter("cpu"),
    },
}
SCALARS = {
    "bits": (0, 1, 9, 8.0, np.int64(8)),
    "token_dims": (0, 3, 1.0),
    "eps": (-1e-9, float("inf"), 1e39),
    "share": (0, 0.0, float("inf"), 1e39),
    "guidance_scale": (float("inf"), -float("inf"), 1e39),
    "out_dtype": (torch.float64, torch.float8_e4m3fn, np.float16, "float16"),
    "dtype": (torch.float64, torch.float8_e4m3fn, np.float16, "float16"),
    "device": ("gpu", "cuda:-1", 10**30, 1.5),
    "name": ("Triton", "cuda", ("triton",)),
    "w_bits": (3, 8.0, 0),
    "tokens": (0, 1.0, 2**40),
    "rows": ([0], [-1], [2**40], [8, 8.0], [True], [None], "88", b"88", np.array([8]), 8, {8: 8}, itertools.count(1)),
    "layers": (
        [(0, 8)], [(8, 0)], [(8, 7)], [(8, 8, 8)], [8], [(8, 65536)], [(2**40, 8)], [(8.0, 8)], [{8, 16}], ["88"],
        [None], {8: 8}, np.ones((1, 2)), itertools.repeat((8, 8)),
    ),
}  # fmt: skip


def bad_tensors(parameter: Parameter) -> Iterator[tuple[str, Any]]:
    good = parameter.good
    for dtype in DTYPES:
        if dtype not in parameter.dtypes:
            yield str(dtype), good.to(dtype)
    if "meta" not in parameter.legal:  # it is where the tensors beside it are
        yield "meta", good.to("meta")
    yield "numpy", good.numpy()
    yield "no memory yet", torch.nn.UninitializedParameter(requires_grad=False, dtype=good.dtype)
    yield "list", good.tolist() or [1]
    if not parameter.any_shape:
        yield "one dimension more", good[..., None].repeat_interleave(2, -1)
        yield "larger", torch.ones([n + 1 for n in good.shape] or [2], dtype=good.dtype)
        yield "nine dimensions", torch.ones((2,) * 9, dtype=good.dtype)
    if good.ndim:
        yield "no dimension", good.flatten()[0]
        yield "huge", good[..., :1].expand(2**41, *good.shape[:-1], 1)
        yield "sparse", good.to_sparse()
    if good.ndim == 2 and good.dtype != torch.uint8:
        yield "compressed", good.to_sparse_csr()
    if good.is_floating_point():
        yield "nested", torch.nested.nested_tensor([good.flatten(), good.flatten()])
        yield "jagged", torch.nested.nested_tensor([good.flatten(), good.flatten()], layout=torch.jagged)
        yield "quantized", torch.quantize_per_tensor(good.float(), 1.0, 0, torch.qint8)


def bad_values(name: str, parameter: Parameter) -> Iterator[tuple[str, Any]]:
    if not parameter.optional and name != "guidance_scale":
        yield "None", None
    yield "generator", (i for i in ("x",))
    for value in ELSE:
        if not any(type(value) is type(legal) and value == legal for legal in parameter.legal):
            yield str(type(value)), value
    if isinstance(parameter.good, torch.Tensor):
        yield from bad_tensors(parameter)
    else:
        yield "tensor", torch.ones(())
        for value in SCALARS[name]:
            yield type(value).__name__, value


def fresh(function: str) -> dict[str, Any]:
    return {
        name: good.clone() if isinstance(good := parameter.good, torch.Tensor) else good
        for name, parameter in TABLE[function].items()
    }


IMPLEMENTATIONS = [(qandc_kernels, name) for name in TABLE] + [(reference, name) for name in reference.__all__]
CALLS = [
    pytest.param(module, function, parameter, id=f"{module.__name__.split('.')[-1]}-{function}-{parameter}")
    for module, function in IMPLEMENTATIONS
    for parameter in TABLE[function]
]


def test_the_table_is_complete():
    public = {name for name in qandc_kernels.__all__ if inspect.isfunction(getattr(qandc_kernels, name))}
    public.remove("capturing")  # whose arguments torch checks
    assert set(TABLE) == public
    for name in public:
        assert set(TABLE[name]) == set(inspect.signature(getattr(qandc_kernels, name)).parameters), name


@pytest.mark.parametrize(("module", "function", "parameter"), CALLS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: nested and compressed tensors are beta
def test_bad_values_are_refused(module, function, parameter):
    call, accepted = getattr(module, function), []
    call(**fresh(function))
    for what, value in bad_values(parameter, TABLE[function][parameter]):
        try:
            call(**{**fresh(function), parameter: value})
            accepted.append(what)
        except ArgumentError:
            pass
    assert not accepted


@pytest.mark.parametrize(("module", "function", "parameter"), CALLS)
def test_values_that_the_table_calls_legal(module, function, parameter):
    call, spec = getattr(module, function), TABLE[function][parameter]
    for dtype in spec.dtypes:
        call(**{**fresh(function), parameter: spec.good.to(dtype)})
    if spec.optional:
        call(**{**fresh(function), parameter: None})
    if isinstance(spec.good, float):
        for number in (1, 10**30, np.float64(0.5), 1e38):
            call(**{**fresh(function), parameter: number})


@pytest.mark.parametrize("function", reference.__all__)
def test_checks_take_what_the_ops_take(function):
    check = inspect.signature(getattr(op_checks, f"check_{function}")).parameters
    op = inspect.signature(getattr(qandc_kernels, function)).parameters
    assert [(name, p.default) for name, p in check.items()] == [(name, p.default) for name, p in op.items()]


@pytest.mark.parametrize("function", reference.__all__)
def test_all_tensors_on_meta(function):
    """Tools that count operations or plan memory run a model without values."""
    real = fresh(function)
    meta = to("meta", real)
    for module in (qandc_kernels, reference):
        call = getattr(module, function)
        results, shapes = call(**meta), call(**real)
        for result, expected in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, shapes)), strict=True):
            assert result.is_meta
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


def test_our_errors_are_one_family():
    assert issubclass(ArgumentError, TypeError)
    assert issubclass(ArgumentError, ValueError)
    for name in ("ArgumentError", "DeviceError", "QandCError"):
        assert issubclass(getattr(qandc_kernels, name), qandc.QandCError)
        assert getattr(qandc.errors, name) is getattr(qandc_kernels, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here():
    with pytest.raises(qandc_kernels.DeviceError, match="cuda is not here"):
        qandc_kernels.select_backend("cuda")
    with pytest.raises(qandc_kernels.DeviceError, match="cuda:7 is not here"):
        qandc_kernels.warm_up([(64, 64)], [8], device="cuda:7")


def views(memory: torch.Tensor, *shapes: tuple[int, ...], offset: int = 0) -> Iterator[torch.Tensor]:
    for shape in shapes:
        yield memory[offset : offset + torch.Size(shape).numel()].view(shape)


@pytest.mark.parametrize("call", [linear_gate_residual_, reference.linear_gate_residual_])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_outputs_share_no_memory(call, dtype):
    good, memory = fresh("linear_gate_residual_"), torch.zeros(100, dtype=dtype)
    residual, gate, bias = views(memory, (2, 3, 5), (2, 5), (5,))
    (behind,) = views(memory, (2, 3, 5), offset=30)
    (overlapping,) = views(memory, (2, 3, 5), offset=29)
    for changes in (
        {"out_branch": residual},
        {"out_branch": overlapping},
        {"gate": gate},
        {"gate": memory[29:39].view(2, 5)},
        {"gate": memory[20:].as_strided((2, 5), (40, 1))},
        {"bias": bias},
    ):
        with pytest.raises(ArgumentError, match=f"shares memory with {next(iter(changes))}; clone it"):
            call(**{**good, "residual": residual, **changes})
    with pytest.raises(ArgumentError, match="out_branch is written to and shares memory with gate"):
        call(**{**good, "out_branch": residual, "gate": gate})
    assert not memory.any()  # refused before any work
    call(**{**good, "residual": residual, "out_branch": behind, "gate": memory[60:70].view(2, 5)})
    for expanded in (
        torch.zeros(5).expand(2, 3, 5),
        torch.zeros(()).expand(2, 3, 5),
        torch.zeros(5, 3, 2).permute(2, 1, 0),
    ):
        for name in ("residual", "out_branch"):
            with pytest.raises(ArgumentError, match=f"{name} must be contiguous"):
                call(**{**good, name: expanded})


@pytest.mark.parametrize("call", [linear_gate_residual_, reference.linear_gate_residual_])
def test_outputs_have_no_gradient_to_lose(call):
    good = fresh("linear_gate_residual_")
    for name in ("residual", "out_branch"):
        arguments = {**good, name: good[name].clone().requires_grad_()}
        with pytest.raises(ArgumentError, match=f"{name} requires a gradient"):
            call(**arguments)
        with torch.no_grad():
            call(**arguments)


@pytest.mark.parametrize("call", [quantize_per_tensor, reference.quantize_per_tensor])
def test_a_flag_of_its_own(call):
    good, one = fresh("quantize_per_tensor"), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="nan_flag is written to and shares memory with zero_point"):
        call(**{**good, "zero_point": one[0], "nan_flag": one[0]})
    with pytest.raises(ArgumentError, match="nan_flag is written to and shares memory with scale"):
        call(**{**good, "scale": one[0].view(torch.float32), "nan_flag": one[0]})
    call(**{**good, "zero_point": one[0], "nan_flag": one[1]})
    call(**{**good, "nan_flag": one[:1]})
    with pytest.raises(ArgumentError, match="nan_flag must have shape"):
        call(**{**good, "nan_flag": one})


def test_refusals_cost_no_work_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ArgumentError, match=r"x has 2199023255552 rows; allowed are up to 1073741824, split it"):
            quantize_per_tensor(torch.zeros(1, 1).expand(2**41, 1), torch.ones(()))
