"""Start compiled kernels through the CUDA driver, at a fraction of what Triton's own launcher costs the host.

Triton hands a kernel its run-time arguments in the order of its signature: an address for a tensor, a number, and for a
tensor descriptor the map of the copy engine (TMA) by value, the shape in int32 and the strides in int64; two addresses
of scratch memory come last. The driver says how many bytes each parameter of a kernel has: :class:`DriverKernel`
compares, and refuses a kernel that takes something else.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, byref, c_char, c_int, c_int32, c_int64, c_size_t, c_uint, c_uint32, c_uint64
from ctypes import c_void_p as address_t
from typing import Any, NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from qandc_kernels.errors import DeviceError

__all__ = ["DriverKernel", "NotSupported", "Operand", "Tiles", "sizes"]

SCRATCH = 2  # addresses of scratch memory, the last parameters, which not every version of Triton has
MAP_BYTES = 128  # of a CUtensorMap, which must lie at a multiple of 64
MOST_MAPS = 1024  # of one descriptor, by the address of its tensor
OVERLAPPING = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
L2_128B = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton chooses
MAP_DTYPES = {torch.int8: 0, torch.uint8: 0, torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}


class NotSupported(Exception):  # noqa: N818 (a reason to let Triton start the kernel, no error)
    """Say why a kernel cannot be started here."""


class Operand(NamedTuple):
    """Stand among the arguments of a kernel for the operand at this position."""

    position: int


class Tiles(NamedTuple):
    """Stand among the arguments of a kernel for a descriptor of the operand at this position."""

    position: int
    descriptor: TensorDescriptor


class _Attribute(Structure):
    _fields_ = (("id", c_int), ("padding", c_char * 4), ("value", c_int), ("rest", c_char * 60))


class _Config(Structure):
    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", address_t),
        ("attributes", POINTER(_Attribute)),
        ("attribute_count", c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuFuncGetParamInfo  # noqa: B018 (there since CUDA 12.4)
    except (OSError, AttributeError) as error:
        raise NotSupported(f"no CUDA driver of 12.4 or newer ({error})") from error
    return library


class _Map:
    """Make the descriptor of a tensor for the copy engine, and keep it by the address of the tensor."""

    def __init__(self, descriptor: TensorDescriptor, meta: dict[str, Any]) -> None:
        tensor, rank = descriptor.base, len(descriptor.shape)
        if meta["fp4_padded"] or descriptor.padding != "zero" or tensor.dtype not in MAP_DTYPES:
            raise NotSupported(f"a descriptor of {tensor.dtype}, {meta}")
        size = tensor.element_size()
        shape, strides = descriptor.shape[::-1], descriptor.strides[::-1]  # the innermost first
        self._what = (
            MAP_DTYPES[tensor.dtype],
            c_uint32(rank),
            (c_uint64 * rank)(*shape),
            (c_uint64 * rank)(*(stride * size for stride in strides[1:]), 0),
            (c_uint32 * rank)(*meta["block_size"][::-1]),
            (c_uint32 * rank)(*[1] * rank),
        )
        self._swizzle = meta["swizzle"]
        self._made: dict[int, tuple[Any, int]] = {}

    def __call__(self, address: int) -> int:
        """Return where the map of the tensor at this address lies."""
        made = self._made.get(address)
        if made is None:
            made = self._make(address)
        return made[1]

    def _make(self, address: int) -> tuple[Any, int]:
        memory = (c_char * (MAP_BYTES + 64))()
        place = (ctypes.addressof(memory) + 63) // 64 * 64
        dtype, rank, shape, strides, block, steps = self._what
        code = _driver().cuTensorMapEncodeTiled(
            address_t(place), dtype, rank, address_t(address), shape, strides, block, steps,
            0, self._swizzle, L2_128B, 0,
        )  # fmt: skip
        if code:
            raise DeviceError(f"the CUDA driver makes no descriptor of a tensor at {address:#x} (error {code})")
        if len(self._made) >= MOST_MAPS:
            self._made.clear()
        self._made[address] = memory, place
        return memory, place


def parameters(signature: Sequence[Any], arguments: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield type and value of each parameter of a compiled kernel, for its arguments; a map comes as type ``map``."""
    for kind, argument in zip(signature, arguments, strict=False):  # constants come last, and are no parameters
        if isinstance(kind, tuple):
            yield from parameters(kind, argument)
        elif kind.startswith("tensordesc"):
            yield "map", argument
            yield from (("i32", size) for size in argument.descriptor.shape)
            yield from (("i64", stride) for stride in argument.descriptor.strides)
        elif kind != "constexpr":
            yield kind, argument


def sizes(signature: Sequence[Any], arguments: Sequence[Any]) -> list[int]:
    """Return the bytes of each parameter of a compiled kernel, for its arguments; 0 for unknown kinds."""
    kinds = {"map": MAP_BYTES, "i32": 4, "i64": 8}
    return [8 if kind.startswith("*") else kinds.get(kind, 0) for kind, _ in parameters(signature, arguments)]


class DriverKernel:
    """Hold a compiled kernel with all of its arguments but the addresses of the operands, and start it.

    Args:
        compiled: Triton's ``CompiledKernel``, which has been started once.
        grid: number of programs in three dimensions.
        arguments: in the order of the kernel's signature, with :class:`Operand` and :class:`Tiles` for tensors.

    Raises:
        NotSupported: the kernel takes what is not known here, or there is no driver.
    """

    def __init__(self, compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        meta, driver = compiled.metadata, _driver()
        if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.global_scratch_size or meta.profile_scratch_size:
            raise NotSupported(f"{compiled.name} uses clusters, a cooperative grid or scratch memory")
        signature = list(compiled.src.signature.values())
        given, taken = sizes(signature, arguments), _sizes_taken(driver, compiled.function)
        if taken not in (given + [8] * scratch for scratch in range(SCRATCH + 1)):
            raise NotSupported(f"{compiled.name} takes parameters of {taken} bytes, its arguments are {given}")
        known = [*parameters(signature, arguments), *[("i64", 0)] * SCRATCH]
        descriptors = iter(getattr(meta, "tensordesc_meta", None) or ())
        self._slots = (c_uint64 * len(known))()
        start = ctypes.addressof(self._slots)
        self._parameters = (address_t * len(known))(*(start + 8 * i for i in range(len(known))))
        self._pointers, self._maps = [], []
        for i, (kind, value) in enumerate(known):
            if isinstance(value, Tiles):
                self._maps.append((i, value.position, _Map(value.descriptor, next(descriptors))))
            elif isinstance(value, Operand):
                self._pointers.append((i, value.position))
            else:
                number = c_int32 if kind == "i32" else c_int64
                number.from_buffer(self._slots, 8 * i).value = value
        overlap = _Attribute(OVERLAPPING, b"", 1)
        self._config = _Config(
            grid, (32 * meta.num_warps, 1, 1), meta.shared, None, ctypes.pointer(overlap), int(meta.launch_pdl)
        )
        self._launch = driver.cuLaunchKernelEx
        self._fixed = byref(self._config), address_t(compiled.function), self._parameters, None
        self._compiled = compiled  # its module must stay loaded
        self._lock = threading.Lock()

    def __call__(self, stream: int, addresses: Sequence[int | None]) -> None:
        """Start the kernel on operands at these addresses, in the current context."""
        slots, places = self._slots, self._parameters
        with self._lock:  # the driver has copied everything when it returns
            for i, position in self._pointers:
                slots[i] = addresses[position]  # type: ignore[assignment]
            for i, position, map_of in self._maps:
                places[i] = map_of(addresses[position])  # type: ignore[arg-type]
            self._config.stream = stream
            code = self._launch(*self._fixed)
        if code:
            raise DeviceError(f"the CUDA driver did not start {self._compiled.name} (error {code})")


def _sizes_taken(driver: ctypes.CDLL, function: int) -> list[int]:
    """Return the bytes of each parameter of a loaded kernel."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    while not driver.cuFuncGetParamInfo(address_t(function), c_size_t(len(sizes)), byref(offset), byref(size)):
        sizes.append(size.value)
    return sizes
