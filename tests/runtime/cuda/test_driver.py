"""What the NVIDIA driver reports, with a stand-in for libcuda."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from histostream.runtime.cuda.driver import find_gpus, gpu_count, gpu_sm, has_driver


class Driver:
    """A driver with one GPU of compute capability 8.6, or one that does not start."""

    status = 0

    def cuInit(self, _: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuGetErrorName(self, error: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = 13000
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"a GPU"
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        size._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> int:
        value._obj.value = {16: 28, 75: 8, 76: 6}[attribute]
        return 0


def test_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert (has_driver(), gpu_count(), gpu_sm(), gpu_sm(1)) == (True, 1, "sm86", None)
    gpus = find_gpus()
    (gpu,) = gpus.gpus
    assert (gpu.name, gpu.memory_mib, gpu.capability, gpu.multiprocessors) == ("a GPU", 8192, "8.6", 28)
    assert (gpus.cuda, gpus.problem) == ("13.0", "")


def test_a_driver_that_does_not_start_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    driver.status = 100
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert (has_driver(), gpu_count(), gpu_sm()) == (True, 0, None)
    assert find_gpus().problem == "the driver cannot start: CUDA_ERROR_NO_DEVICE"


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert (has_driver(), gpu_count(), gpu_sm()) == (False, 0, None)
    assert "no NVIDIA driver" in find_gpus().problem
