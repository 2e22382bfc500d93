"""Without a GPU, Triton's kernels run in its interpreter, and tests that need the device are skipped.

PyTorch computes with one thread: tests' tensors are tiny, and several threads that wait for each other on busy cores
make some tests ten times slower. Engines set their own number.
"""

import os

import pytest
import torch

from tests.folders import remove_shared_folders

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's own switch, read when a kernel is defined

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    remove_shared_folders()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
