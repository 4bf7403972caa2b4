"""Launches compiled Triton kernels through CUDA's driver, in less of the host's time than Triton's own launcher takes.

Triton looks at every argument of every launch, and encodes its TMA descriptors anew. Here a kernel's parameters lie in
memory of their own: a launch writes addresses and numbers there and calls `cuLaunchKernelEx`. A descriptor is encoded
once (`TensorMap`).
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DEPENDENT_LAUNCH = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""
_L2_128_BYTES = 2
"""CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton has it."""
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_ELEMENTS = {torch.int8: 0, torch.float16: 6, torch.bfloat16: 9}
"""CUtensorMapDataType."""
_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int64 * 8))  # the value lies on 8 bytes


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class MapShape:
    """What TMA descriptors of equal memory at different addresses have in common, in the driver's types."""

    def __init__(
        self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], block: Sequence[int], layout: Any
    ) -> None:
        self.dtype, self.shape, self.strides, self.block, self.layout = dtype, shape, strides, block, layout
        rank = len(shape)
        bytes_apart = [stride * dtype.itemsize for stride in strides[:-1]]
        self._sizes = rank, (ctypes.c_uint64 * rank)(*shape[::-1]), (ctypes.c_uint64 * rank)(*bytes_apart[::-1])
        self._steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        self._box: ctypes.Array | None = None

    def encode(self, into: int, address: int, meta: dict[str, Any]) -> None:
        """Writes the CUtensorMap of memory at an address. `meta` is Triton's: box and swizzle."""
        rank, dims, strides = self._sizes
        if self._box is None:
            self._box = (ctypes.c_uint32 * rank)(*meta["block_size"][::-1])
        kind, swizzle = _ELEMENTS[self.dtype], meta["swizzle"]
        places = ctypes.c_void_p(into), kind, rank, ctypes.c_void_p(address)
        form = dims, strides, self._box, self._steps, 0, swizzle, _L2_128_BYTES, 0
        if status := _cuda().cuTensorMapEncodeTiled(*places, *form):
            raise RuntimeError(f"rowint8: cuTensorMapEncodeTiled failed with CUDA error {status} for {self.shape}")


class TensorMap:
    """A TMA descriptor of memory at an address, for Triton to compile with and for launches of our own.

    It does not keep the memory: it may be kept, and used again for whatever lies there later.
    """

    def __init__(self, address: int, shape: MapShape) -> None:
        self._address, self._shape = address, shape
        self._encoded: tuple[ctypes.Array, int] | None = None
        """The memory that holds it, and where in there it begins."""

    @property
    def dtype(self) -> torch.dtype:
        """The memory's, as a tensor has it: what Triton asks of a descriptor's base."""
        return self._shape.dtype

    def data_ptr(self) -> int:
        """The address, likewise."""
        return self._address

    @property
    def descriptor(self) -> TensorDescriptor:
        """What Triton compiles a kernel with."""
        of = self._shape
        return TensorDescriptor(self, list(of.shape), list(of.strides), list(of.block), of.layout)  # type: ignore[arg-type]

    def encoded(self, meta: dict[str, Any]) -> int:
        """Address of the CUtensorMap, made at the first call; see `MapShape.encode`."""
        if self._encoded is None:
            memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
            at = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
            self._shape.encode(at, self._address, meta)
            self._encoded = memory, at  # at once, as threads may do this side by side
        return self._encoded[1]


class Launcher:
    """A compiled kernel and memory for its parameters. Threads take turns."""

    def __init__(self, compiled: Any, device: torch.device) -> None:
        meta = compiled.metadata
        self._compiled = compiled  # Triton unloads a kernel that nobody keeps
        self._device, self._function = device.index, ctypes.c_void_p(compiled.function)
        self._attribute = _Attribute(_DEPENDENT_LAUNCH, (ctypes.c_int64 * 8)(1))
        self._config = _Config(
            block=(32 * meta.num_warps, 1, 1),
            shared_memory=meta.shared,
            attributes=ctypes.pointer(self._attribute),
            num_attributes=int(meta.launch_pdl),
        )
        self._maps = list(getattr(meta, "tensordesc_meta", None) or ())
        self._parameters: list[Any] = []
        writers = [self._writer(kind) for kind in compiled.src.signature.values()]
        self._writers = [(place, write) for place, write in enumerate(writers) if write is not None]
        self._parameters += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's scratch memory: there is none
        addresses = [ctypes.addressof(each) for each in self._parameters]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._lock = Lock()

    def _writer(self, kind: str) -> Callable[[Any], None] | None:
        """What writes an argument of this type; None where the compiled kernel has no such parameter."""
        if kind == "constexpr":
            return None
        if kind.startswith("tensordesc"):
            return self._map_writer(self._maps.pop(0), rank=kind.split("[")[1].split("]")[0].count(",") + 1)
        slot = (ctypes.c_uint64 if kind.startswith("*") else _SCALARS[kind])(0)
        self._parameters.append(slot)
        if kind.startswith("*"):
            return lambda tensor: setattr(slot, "value", tensor.data_ptr())
        return lambda number: setattr(slot, "value", number)

    def _map_writer(self, meta: dict[str, Any], rank: int) -> Callable[[Any], None]:
        """A descriptor stands for itself, its shape and its strides, of which our kernels read only the first."""
        place = len(self._parameters)
        self._parameters.append((ctypes.c_uint8 * _MAP_BYTES)())
        self._parameters += [ctypes.c_int32(0) for _ in range(rank)]
        self._parameters += [ctypes.c_int64(0) for _ in range(rank)]

        def write(tensor_map: TensorMap) -> None:
            self._addresses[place] = tensor_map.encoded(meta)

        return write

    def fits(self) -> bool:
        """Whether the driver finds the same parameters in the kernel, which a new Triton may pass in another way."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found = getattr(_cuda(), "cuFuncGetParamInfo", None)
        if found is None:
            return False

        def ask(i: int) -> int:
            return found(self._function, ctypes.c_size_t(i), ctypes.byref(offset), ctypes.byref(size))

        same = all(not ask(i) and size.value == ctypes.sizeof(each) for i, each in enumerate(self._parameters))
        return same and bool(ask(len(self._parameters)))

    def __call__(self, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Queues the kernel on torch's current stream."""
        with self._lock:
            for place, write in self._writers:
                write(arguments[place])
            self._config.grid[:] = grid
            self._config.stream = torch._C._cuda_getCurrentRawStream(self._device)
            status = _cuda().cuLaunchKernelEx(ctypes.byref(self._config), self._function, self._addresses, None)
        if status:
            raise RuntimeError(f"rowint8: cuLaunchKernelEx failed with CUDA error {status}")


def make_launcher(compiled: Any, device: torch.device) -> Launcher | None:
    """A launcher of a compiled kernel; None where only Triton's own knows how to launch it."""
    meta = compiled.metadata
    scratch = meta.global_scratch_size or meta.profile_scratch_size
    if scratch or meta.num_ctas != 1 or meta.launch_cooperative_grid:
        return None
    try:
        launcher = Launcher(compiled, device)
        return launcher if launcher.fits() else None
    except (AttributeError, KeyError, IndexError, OSError):
        return None
