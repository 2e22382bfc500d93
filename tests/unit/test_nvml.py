"""What a GPU is, asked of its driver's library; a made-up one here, because there is no GPU."""

import ctypes

import pytest
import torch

from longspan.engine import nvml


class Library:
    """Answers as NVML does, for GPU 3 or the GPU of one UUID."""

    def __init__(self, status=0):
        self.status, self.asked = status, []
        for name in ("nvmlInit_v2", "nvmlShutdown"):
            setattr(self, name, lambda: 0)

        def by_index(number, handle):
            self.asked.append(number)
            return self.status

        def by_uuid(name, handle):
            self.asked.append(name)
            return self.status

        def memory(gpu, found):
            found._obj.free = 7 << 30
            return self.status

        def capability(gpu, major, minor):
            major._obj.value, minor._obj.value = 9, 0
            return self.status

        self.nvmlDeviceGetHandleByIndex_v2, self.nvmlDeviceGetHandleByUUID = by_index, by_uuid
        self.nvmlDeviceGetMemoryInfo, self.nvmlDeviceGetCudaComputeCapability = memory, capability


@pytest.fixture
def library(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = Library()
    monkeypatch.setattr(nvml, "CDLL", lambda name: made)
    return made


def test_memory_and_capability_are_asked_of_the_first_gpu_that_is_visible_without_pytorch(library, monkeypatch):
    for name in ("mem_get_info", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda: pytest.fail("opens a CUDA context"))
    assert (nvml.free_bytes(), nvml.capability()) == (7 << 30, (9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert nvml.free_bytes() == 7 << 30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6a")
    assert nvml.free_bytes() == 7 << 30
    assert library.asked == [0, 0, 3, b"GPU-8f6a"]


@pytest.mark.parametrize("problem", ["missing", "fails"])
def test_without_the_library_pytorch_answers(library, monkeypatch, problem):
    library.status = 999
    if problem == "missing":
        monkeypatch.setattr(nvml, "CDLL", ctypes.CDLL)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 80))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert (nvml.free_bytes("libnowhere.so"), nvml.capability("libnowhere.so")) == (5, (8, 0))
