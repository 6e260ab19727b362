"""The GPU list against a driver that is missing, whole, or broken on one GPU."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from mistudio_train.gpu import Gpu, best_gpu, list_gpus

GIB = 1024**3


def gpu(index: int, free: int, total: int) -> Gpu:
    return Gpu(index, "g", "8.0", total * GIB, (total - free) * GIB, free * GIB, 1 - free / total)


def driver_of(monkeypatch: pytest.MonkeyPatch, broken: tuple[int, ...] = ()) -> None:
    """A driver of three GPUs with 10, 20 and 30 GiB, each with 4 GiB in use."""

    def memory(handle: int) -> Any:
        if handle in broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=(handle + 1) * 10 * GIB, used=4 * GIB, free=((handle + 1) * 10 - 4) * GIB)

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-c": 2}[uuid],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0) if handle else (7, 5),
        "nvmlDeviceGetName": lambda handle: f"GPU {handle}",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert list_gpus() == []


def test_every_gpu_is_listed_with_the_memory_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_of(monkeypatch)
    gpus = list_gpus()
    assert [(g.index, g.total_bytes // GIB, g.used_bytes // GIB, g.free_bytes // GIB) for g in gpus] == [
        (0, 10, 4, 6),
        (1, 20, 4, 16),
        (2, 30, 4, 26),
    ]
    assert [g.supports_bfloat16 for g in gpus] == [False, True, True]
    assert gpus[0].utilization == 0.4


def test_a_broken_gpu_is_left_out_and_the_others_keep_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    driver_of(monkeypatch, broken=(1,))
    assert [g.index for g in list_gpus()] == [0, 2]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("2,0", [(0, "GPU 2"), (1, "GPU 0")]), ("GPU-c", [(0, "GPU 2")]), ("", []), ("1,-1,0", [(0, "GPU 1")])],
)
def test_indices_are_those_of_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[tuple[int, str]]
) -> None:
    driver_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(g.index, g.name) for g in list_gpus()] == expected


def test_the_best_gpu_has_most_free_memory_and_at_least_four_gib() -> None:
    assert best_gpu([gpu(0, 6, 10), gpu(1, 9, 10)]) == gpu(1, 9, 10)
    assert best_gpu([gpu(0, 10, 10), gpu(1, 10, 80)]) == gpu(1, 10, 80)
    assert best_gpu([gpu(0, 3, 80)]) is None


def test_listing_gpus_imports_no_torch() -> None:
    code = "import sys, mistudio_train.gpu as g; g.list_gpus(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
