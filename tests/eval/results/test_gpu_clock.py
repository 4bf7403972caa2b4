"""rowint8.eval.results.gpu_clock: the clock that the driver's library tells, and None wherever it does not."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from rowint8.eval.results import gpu_clock as clock


class Library:
    """NVML with one GPU, "GPU-abc", at 1980 MHz."""

    unknown = 0

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        device._obj.value = 7
        return 0 if uuid == b"GPU-abc" else 6

    def nvmlDeviceGetClockInfo(self, device, kind, found):
        assert (device.value, kind) == (7, 1)
        found._obj.value = 1980
        return self.unknown


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    clock._reader.cache_clear()
    yield
    clock._reader.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_there_is_no_clock_without_a_gpu():
    assert clock.sm_mhz() is None


def test_the_driver_tells_the_clock(gpu):
    assert clock.sm_mhz() == 1980


def test_a_clock_that_the_driver_does_not_tell_is_none(gpu, monkeypatch):
    monkeypatch.setattr(Library, "unknown", 3)
    assert clock.sm_mhz() is None


def test_a_gpu_or_driver_that_is_not_found_is_none(gpu, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert clock.sm_mhz() is None
    clock._reader.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="other"))
    assert clock.sm_mhz() is None
