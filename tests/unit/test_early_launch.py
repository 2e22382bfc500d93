"""Kernels are launched early on Hopper and later, and wait for their inputs nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from longspan.early_launch import early_options, launches_early  # noqa: E402

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def ask_anew():
    """What is known of a device does not stay from test to test."""
    launches_early.cache_clear()
    yield
    launches_early.cache_clear()


def capability(monkeypatch, major: int, interpret: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=interpret)))


@pytest.mark.parametrize("major, early", [(8, False), (9, True), (12, True)])
def test_kernels_are_launched_early_from_hopper_on(monkeypatch, major, early):
    capability(monkeypatch, major)
    assert launches_early(CUDA) == early


def test_the_interpreter_has_no_such_launches(monkeypatch):
    capability(monkeypatch, 9, interpret=True)
    assert not launches_early(CUDA)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_given_no_option_that_they_do_not_know(device):
    assert early_options(torch.device(device)) == {"EARLY": False}
