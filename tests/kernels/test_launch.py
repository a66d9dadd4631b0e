"""Kernels that are started again without Triton: the same results, whatever was called before."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.tools.tensor_descriptor import TensorDescriptor

from qandc_kernels import (
    capturing,
    int4_linear,
    int8_linear,
    pack_int4,
    quantize_per_tensor,
    quantize_per_token,
    reference,
)
from qandc_kernels.errors import DeviceError
from qandc_kernels.triton import _launch
from qandc_kernels.triton._driver import DriverKernel, NotSupported, Operand, Tiles
from qandc_kernels.triton._launch import Launches, Start

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}


class FakeCompiled:
    """Stand for Triton's CompiledKernel, and for what the driver starts: notes the starts."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def ready(self, grid, arguments):
        return lambda stream, addresses: self.calls.append((grid, stream, arguments, list(addresses)))


class FakeKernel:
    """Stand for a JITFunction: notes how often Triton's own start was taken."""

    arg_names = ("x", "out", "n", "SIZE")

    def __init__(self) -> None:
        self.starts: list[tuple[object, ...]] = []
        self.compiled: list[FakeCompiled] = []

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.starts.append((grid, arguments, constants))
            self.compiled.append(FakeCompiled())
            return self.compiled[-1]

        return start


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("qandc_kernels.triton._launch.CompiledKernel", FakeCompiled)
    monkeypatch.setattr("qandc_kernels.triton._launch.DriverKernel", FakeCompiled.ready)
    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr("torch._C._cuda_getDevice", lambda: -1, raising=False)  # where tensors on a CPU are
    kernel, launches = FakeKernel(), Launches()

    def call(x: torch.Tensor, out: torch.Tensor | None = None, size: int = 8, copy: bool = False) -> None:
        start = Start(kernel, (2, 1, 1), lambda x, out: (x, out, x_size), {"num_warps": 4, "SIZE": size})
        x_size = x.numel()
        views = (x.clone(), out) if copy else (x.view(-1) if x.is_contiguous() else x, out)
        launches((x, out), size, lambda: ((start,), views))

    return kernel, call


def test_a_second_call_of_the_same_kind_is_started_without_triton(fake):
    kernel, call = fake
    first, second = torch.zeros(4, 16), torch.zeros(4, 16)
    call(first)
    call(second)
    assert len(kernel.starts) == 1
    assert kernel.compiled[0].calls == [((2, 1, 1), 7, (Operand(0), Operand(1), 64), [second.data_ptr(), None])]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.double(), None),
        lambda x: (x.t(), None),
        lambda x: (x[:2], None),
        lambda x: (torch.zeros(65)[1:].view(4, 16), None),  # another alignment
        lambda x: (x, x),
        lambda x: (x, None, 16),
    ],
    ids=["dtype", "strides", "shape", "alignment", "not None", "constant"],
)
def test_calls_of_another_kind_are_started_by_triton(fake, other):
    kernel, call = fake
    x = torch.zeros(4, 16)
    call(x)
    call(*other(x))
    assert len(kernel.starts) == 2
    call(x)
    call(*other(x))
    assert len(kernel.starts) == 2
    assert [len(compiled.calls) for compiled in kernel.compiled] == [1, 1]


def test_operands_that_have_to_be_copied_are_copied_every_time(fake):
    kernel, call = fake
    x = torch.zeros(4, 16)
    for _ in range(3):
        call(x, copy=True)
    assert len(kernel.starts) == 3


@pytest.mark.parametrize("knob", ["debug", "launch_enter_hook", "launch_exit_hook"])
def test_whoever_watches_launches_sees_them(fake, monkeypatch, knob):
    from triton import knobs

    kernel, call = fake
    x = torch.zeros(4, 16)
    call(x)
    with monkeypatch.context() as patched:
        if knob == "debug":
            patched.setattr(knobs.runtime, "debug", True)
        else:
            patched.setattr(getattr(knobs.runtime, knob), "calls", [lambda metadata: None])
        call(x)
    assert len(kernel.starts) == 2
    call(x)
    assert len(kernel.starts) == 2


def test_starts_that_are_kept_are_bounded(fake, monkeypatch):
    monkeypatch.setattr("qandc_kernels.triton._launch.LARGEST_NUMBER", 3)
    kernel, call = fake
    for size in (1, 2, 3, 4, 5, 1):
        call(torch.zeros(size))
    assert len(kernel.starts) == 6


def test_what_the_driver_cannot_start_triton_starts_and_a_warning_says_why(fake, monkeypatch, caplog):
    def refuse(*arguments: object) -> None:
        raise NotSupported("a kernel of another kind")

    monkeypatch.setattr(_launch, "DriverKernel", refuse)
    kernel, call = fake
    for _ in range(3):
        call(torch.zeros(4, 16))
    assert len(kernel.starts) == 3
    assert [record.getMessage() for record in caplog.records if "a kernel of another kind" in record.getMessage()]
    assert len(caplog.records) == 1


class FakeDriver:
    """Stand for the CUDA driver: notes what a kernel with parameters of these bytes would read."""

    def __init__(self, sizes: list[int], code: int = 0) -> None:
        self.sizes, self.code = sizes, code
        self.starts: list[tuple[object, ...]] = []
        self.maps: list[int] = []

    def cuFuncGetParamInfo(self, function, index, offset, size) -> int:  # noqa: N802
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuTensorMapEncodeTiled(self, place, dtype, rank, address, shape, strides, block, steps, *rest) -> int:  # noqa: N802
        assert (dtype, rank.value, list(shape), strides[0]) == (0, 2, [64, 8], 64)
        assert (list(block), list(steps)) == ([32, 16], [1, 1])
        assert rest == (0, 3, 2, 0)
        assert place.value % 64 == 0
        ctypes.c_uint64.from_address(place.value).value = address.value
        self.maps.append(address.value)
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra) -> int:  # noqa: N802
        kinds = {4: ctypes.c_int32, 8: ctypes.c_int64, 128: ctypes.c_int64}
        values = [kinds[size].from_address(parameters[i]).value for i, size in enumerate(self.sizes)]
        c = config._obj
        overlaps = c.attribute_count and (c.attributes[0].id, c.attributes[0].value)
        self.starts.append((list(c.grid), list(c.block), c.shared, c.stream, function.value, overlaps, values))
        return self.code


def _compiled(launch_pdl: bool = False) -> SimpleNamespace:
    tiles = {"swizzle": 3, "elem_size": 1, "elem_type": 0, "block_size": [16, 32], "fp4_padded": False}
    meta = SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, global_scratch_size=0, profile_scratch_size=0, num_warps=4,
        shared=100, launch_pdl=launch_pdl, tensordesc_meta=[tiles],
    )  # fmt: skip
    kinds = ("tensordesc<i8[16,32]>", "*fp32", "i32", ("*bf16", "constexpr", "i64"), "constexpr")
    return SimpleNamespace(name="k", metadata=meta, function=99, src=SimpleNamespace(signature=dict(enumerate(kinds))))


def _arguments() -> tuple[object, ...]:
    descriptor = TensorDescriptor.from_tensor(torch.zeros(8, 64, dtype=torch.int8), [16, 32])
    return Tiles(2, descriptor), Operand(0), -5, (Operand(3), None, 1 << 40)


SIZES = [128, 4, 4, 8, 8, 8, 4, 8, 8]  # the map with shape and strides, a pointer, a number, a pointer, a number


@pytest.mark.parametrize("scratch", [0, 1, 2])
@pytest.mark.parametrize("launch_pdl", [False, True])
def test_the_driver_is_given_what_the_kernel_takes(monkeypatch, scratch, launch_pdl):
    driver = FakeDriver(SIZES + [8] * scratch)
    monkeypatch.setattr("qandc_kernels.triton._driver._driver", lambda: driver)
    start = DriverKernel(_compiled(launch_pdl), (7, 2, 1), _arguments())
    expected = []
    for addresses in ([11, None, 16, 13], [21, None, 32, 23], [31, None, 16, 33]):
        start(5, addresses)
        values = [addresses[2], 8, 64, 64, 1, addresses[0], -5, addresses[3], 1 << 40] + [0] * scratch
        expected.append(([7, 2, 1], [128, 1, 1], 100, 5, 99, (6, 1) if launch_pdl else 0, values))
    assert driver.starts == expected
    assert driver.maps == [16, 32]


@pytest.mark.parametrize("sizes", [SIZES[:-1], [*SIZES, 4], [*SIZES, 8, 8, 8], [128, 4, 4, 8, 8, 8, 8, 8, 8]])
def test_a_kernel_that_takes_something_else_is_refused(monkeypatch, sizes):
    monkeypatch.setattr("qandc_kernels.triton._driver._driver", lambda: FakeDriver(sizes))
    with pytest.raises(NotSupported, match="parameters of"):
        DriverKernel(_compiled(), (1, 1, 1), _arguments())


@pytest.mark.parametrize(
    "field", ["num_ctas", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"]
)
def test_a_kernel_of_another_kind_is_refused(monkeypatch, field):
    monkeypatch.setattr("qandc_kernels.triton._driver._driver", lambda: FakeDriver(SIZES))
    compiled = _compiled()
    setattr(compiled.metadata, field, 2)
    with pytest.raises(NotSupported):
        DriverKernel(compiled, (1, 1, 1), _arguments())


def test_what_the_driver_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr("qandc_kernels.triton._driver._driver", lambda: FakeDriver(SIZES, code=700))
    with pytest.raises(DeviceError, match="error 700"):
        DriverKernel(_compiled(), (1, 1, 1), _arguments())(5, [11, None, 16, 13])


# on a GPU: all kinds of calls in any order, compared with the reference


def _matrix(generator: torch.Generator, rows: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    x = torch.randn(rows + 1, 2 * k + 8, generator=generator).to(dtype)
    if layout == "misaligned":
        return x[1:, 1 : k + 1]
    if layout == "transposed":
        return x[1:, :k].t().contiguous().t()
    return x[1:, :k].contiguous() if layout == "contiguous" else x[1:, :k]


def _product(generator: torch.Generator, rows: int, k: int, dtype: torch.dtype, layout: str, options: int):
    """A product, and where its result and the reference's are compared."""
    n = 64 if options & 4 else 80
    packed, per_token, with_bias, with_zero = options & 1, options & 2, options & 8, options & 16 and not options & 2
    xq = torch.randint(-128, 128, (rows, 2 * k), generator=generator, dtype=torch.int8)
    xq = {"misaligned": xq[:, 1 : k + 1], "transposed": xq[:, :k].t().contiguous().t()}.get(layout, xq[:, :k])
    wq = torch.randint(-7, 8, (n, k), generator=generator, dtype=torch.int8)
    weight = pack_int4(wq) if packed else wq
    x_scale = torch.rand(rows, generator=generator) if per_token else torch.tensor(0.01)
    w_scale = torch.rand(n, generator=generator)
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    zero = torch.tensor(3, dtype=torch.int32) if with_zero else None
    return (int4_linear if packed else int8_linear), (xq, weight, x_scale, w_scale, bias, zero, None, dtype)


@st.composite
def calls(draw) -> list[tuple[str, int, int, torch.dtype, str, int]]:
    call = st.tuples(
        st.sampled_from(["product", "per tensor", "per token"]),
        st.sampled_from([1, 33, 64, 200]),
        st.sampled_from([64, 96, 130]),
        st.sampled_from(list(TOLERANCE)),
        st.sampled_from(["contiguous", "rows apart", "misaligned", "transposed"]),
        st.integers(0, 31),
    )
    return draw(st.lists(call, min_size=6, max_size=6))


def _run(device: str, many: list[tuple[str, int, int, torch.dtype, str, int]]) -> None:
    for i, (kind, rows, k, dtype, layout, options) in enumerate(many * 2):
        generator = torch.Generator().manual_seed(i)

        def moved(value: object) -> object:  # strides and alignment as they are
            if not isinstance(value, torch.Tensor):
                return value
            whole = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype)
            whole.copy_(torch.tensor(value.untyped_storage(), dtype=torch.uint8).view(value.dtype)[: len(whole)])
            return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())

        if kind == "product":
            op, arguments = _product(generator, rows, k, dtype, layout, options)
        else:
            x = _matrix(generator, rows, k, dtype, layout)
            zero = torch.tensor(-5, dtype=torch.int32) if options & 1 else None
            op: Callable[..., object] = quantize_per_tensor if kind == "per tensor" else quantize_per_token
            arguments = (x, torch.tensor(0.02), zero) if kind == "per tensor" else (x, 8 if options & 1 else 6)
        expected = getattr(reference, op.__name__)(*arguments)
        actual = op(*map(moved, arguments))
        for mine, theirs in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected)), strict=True):
            if theirs.dtype == torch.int8:
                assert torch.equal(mine.cpu(), theirs)
            else:
                scale = theirs.abs().max().item() + 1e-6
                torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=TOLERANCE[theirs.dtype] * scale)


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_calls_in_any_order_equal_the_reference(many):
    _run("cuda", many)


@pytest.mark.gpu
def test_calls_from_threads_on_streams_and_in_graphs(seeded):
    x = torch.randn(64, 128, generator=seeded).cuda().half()
    w = torch.randint(-127, 128, (96, 128), generator=seeded, dtype=torch.int8).cuda()
    scale, w_scale = torch.tensor(0.02).cuda(), torch.rand(96, generator=seeded).cuda()

    def work(x: torch.Tensor) -> torch.Tensor:
        return int8_linear(quantize_per_tensor(x, scale), w, scale, w_scale, out_dtype=torch.float16)

    expected = work(x)
    found: list[bool] = []

    def many() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.extend(torch.equal(work(x), expected) for _ in range(200))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 800
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with capturing(graph):
        output = work(static)
    static.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(output, expected.flip(0))


@pytest.mark.gpu
def test_a_call_on_another_gpu(seeded):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, scale = torch.randn(8, 64, generator=seeded), torch.tensor(0.02)
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        found = quantize_per_tensor(x.to(device), scale.to(device))
        assert found.device == torch.device(device)
        assert torch.equal(found.cpu(), reference.quantize_per_tensor(x, scale))
