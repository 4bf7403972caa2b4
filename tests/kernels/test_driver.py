"""rowint8.kernels.driver: what reaches the driver, and when Triton's own launcher is used instead."""

import ctypes
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl

from rowint8.kernels import driver, launch, ops, reference
from tests.kernels.cases import absolute, case

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
META = {"block_size": [64, 128], "swizzle": 3}
SIGNATURE = {"w": "tensordesc<i8[64, 128]>", "x": "*bf16", "n": "i32", "eps": "fp32", "big": "i64", "c": "constexpr"}
SIZES = [128, 4, 4, 8, 8, 8, 4, 4, 8, 8, 8]
"""Bytes of the parameters: a descriptor, its shape and strides; a pointer, three numbers; two of scratch."""


class Cuda:
    """Stands in for libcuda: a kernel with parameters of these sizes, and what was launched."""

    def __init__(self, sizes=SIZES, status=0):
        self.sizes, self.status = sizes, status
        self.encoded, self.launched = [], []

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuTensorMapEncodeTiled(self, into, kind, rank, address, dims, strides, box, steps, *rest):
        ctypes.memset(into.value, 7, 128)
        self.encoded.append((kind, rank, address.value, list(dims), list(strides)[: rank - 1], list(box), rest))
        return 0

    def cuLaunchKernelEx(self, config, function, addresses, extra):
        def at(i, kind):
            return kind.from_address(addresses[i]).value

        self.launched.append(
            dict(
                grid=list(config._obj.grid),
                block=list(config._obj.block),
                stream=config._obj.stream,
                early=config._obj.num_attributes and config._obj.attributes[0].value[0],
                map=bytes((ctypes.c_uint8 * 128).from_address(addresses[0])),
                values=(at(5, ctypes.c_uint64), at(6, ctypes.c_int32), at(7, ctypes.c_float), at(8, ctypes.c_int64)),
            )
        )
        return self.status


def compiled(**changed):
    meta = dict(num_warps=12, shared=1000, launch_pdl=True, num_ctas=1, launch_cooperative_grid=False)
    meta |= dict(global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=[META])
    return SimpleNamespace(
        function=5, metadata=SimpleNamespace(**(meta | changed)), src=SimpleNamespace(signature=SIGNATURE)
    )


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(driver, "_cuda", lambda: fake)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return fake


def weight_map(address: int = 4096) -> driver.TensorMap:
    layout = gl.NVMMASharedLayout(128, 8, 2)
    return driver.TensorMap(address, driver.MapShape(torch.int8, (256, 512), (512, 1), (64, 128), layout))


def test_a_launch_writes_addresses_and_numbers_where_the_kernel_reads_them(cuda):
    launcher = driver.make_launcher(compiled(), CUDA)
    assert launcher is not None
    x, tensor_map = torch.zeros(3), weight_map()
    for n in (5, -6):
        launcher((7, 2, 1), (tensor_map, x, n, 1e-5, 2**40))
    assert cuda.encoded == [(0, 2, 4096, [512, 256], [512], [128, 64], (0, 3, 2, 0))], "once, innermost size first"
    first, second = cuda.launched
    assert (first["grid"], first["block"], first["stream"], first["early"]) == ([7, 2, 1], [384, 1, 1], 77, 1)
    assert first["map"] == b"\x07" * 128
    assert first["values"] == (x.data_ptr(), 5, pytest.approx(1e-5), 2**40)
    assert second["values"][1] == -6


def test_a_kernel_that_may_not_start_early_says_so(cuda):
    launcher = driver.make_launcher(compiled(launch_pdl=False), CUDA)
    assert launcher is not None
    launcher((1, 1, 1), (weight_map(), torch.zeros(3), 5, 0.0, 1))
    assert cuda.launched[0]["early"] == 0


def test_an_error_of_the_driver_is_raised(cuda):
    cuda.status = 719
    launcher = driver.make_launcher(compiled(), CUDA)
    assert launcher is not None
    with pytest.raises(RuntimeError, match="CUDA error 719"):
        launcher((1, 1, 1), (weight_map(), torch.zeros(3), 5, 0.0, 1))


def test_equal_memory_elsewhere_is_described_anew(cuda):
    here = weight_map()
    elsewhere = driver.TensorMap(8192, here._shape)
    assert here.encoded(META) == here.encoded(META) != elsewhere.encoded(META)
    assert [each[2] for each in cuda.encoded] == [4096, 8192]
    assert cuda.encoded[0][3:] == cuda.encoded[1][3:]
    assert here.descriptor.shape == [256, 512]
    assert here.descriptor.base.data_ptr() == 4096


@pytest.mark.parametrize(
    "sizes",
    [SIZES[:-1], [*SIZES, 8], [64, *SIZES[1:]], [*SIZES[:6], 8, *SIZES[7:]]],
    ids=["fewer", "more", "smaller map", "wider number"],
)
def test_parameters_that_the_driver_knows_otherwise_are_left_to_triton(cuda, sizes):
    cuda.sizes = sizes
    assert driver.make_launcher(compiled(), CUDA) is None


@pytest.mark.parametrize(
    "changed", [dict(global_scratch_size=8), dict(profile_scratch_size=8), dict(num_ctas=2), dict(tensordesc_meta=None)]
)
def test_what_only_triton_can_launch_is_left_to_it(cuda, changed):
    assert driver.make_launcher(compiled(**changed), CUDA) is None


def test_without_a_driver_triton_launches(monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_cuda", missing)
    assert driver.make_launcher(compiled(), CUDA) is None


def test_a_launch_asks_for_fused_multiply_and_add_whatever_triton_does_by_itself():
    asked = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.update(options)

    launch.launch(Kernel(), ("a kernel",), (1, 1, 1), (torch.zeros(3),), dict(H=3), dict(num_warps=4))
    assert asked == dict(H=3, num_warps=4, enable_fp_fusion=True)


def test_a_launcher_keeps_its_kernel_loaded(cuda):
    """Triton unloads a kernel when nobody keeps it, as where two threads compiled the same."""

    class Compiled(SimpleNamespace):
        pass

    kernel = Compiled(**vars(compiled()))
    kept = weakref.ref(kernel)
    launcher = driver.make_launcher(kernel, CUDA)
    del kernel
    gc.collect()
    assert launcher is not None
    assert kept() is not None


def test_threads_that_want_one_kernel_compile_it_once(monkeypatch):
    compilations, launches, together = [], [], Barrier(4)

    class Kernel:
        def __getitem__(self, grid):
            def compile_and_launch(*arguments, **options):
                compilations.append(grid)
                time.sleep(0.05)
                return compilations

            return compile_and_launch

    def run(_):
        together.wait()
        launch.launch(Kernel(), ("a kernel",), (1, 1, 1), (torch.zeros(3),), {}, {})

    monkeypatch.setattr(launch, "_launchers", {})
    monkeypatch.setattr(launch, "make_launcher", lambda *_: lambda grid, arguments: launches.append(grid))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert (len(compilations), len(launches)) == (1, 3)


def test_threads_that_encode_one_descriptor_side_by_side_share_memory_that_stays(monkeypatch):
    together = Barrier(2)

    class Slow:
        dtype = torch.int8

        def encode(self, into, address, meta):
            together.wait()
            ctypes.memset(into, 7, 128)

    shared: Any = driver.TensorMap(0, Slow())  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: shared.encoded({}), range(2)))
    memory, at = shared._encoded
    assert ctypes.addressof(memory) <= at <= ctypes.addressof(memory) + 64
    assert ctypes.string_at(at, 128) == b"\7" * 128


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 40, 300])
def test_our_launches_compute_what_tritons_do(assert_matches, monkeypatch, m):
    x, weight, bias = case(m, 336, 1040, torch.bfloat16, bias=True)
    monkeypatch.setattr(launch, "_launchers", {})
    by_triton = ops.linear(x, *weight, bias)
    assert len(launch._launchers) == 1, "this Triton's kernels are launched by the driver from the second call on"
    by_driver = ops.linear(x, *weight, bias)
    assert torch.equal(by_triton, by_driver)
    assert_matches(by_driver, reference.linear(x, weight, bias), reference.linear(*absolute(x, weight, bias)))


@pytest.mark.gpu
def test_threads_do_not_take_each_others_arguments():
    cases = [case(40, 336, 1040, torch.bfloat16) for _ in range(8)]
    expected = [ops.linear(x, *weight) for x, weight, _ in cases]

    def often(i: int) -> bool:
        x, weight, _ = cases[i]
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [ops.linear(x, *weight) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(out, expected[i]) for out in outs)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8, initializer=torch.cuda.synchronize) as pool:
        assert all(pool.map(often, range(8)))
