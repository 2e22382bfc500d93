"""Which backend a rank uses: by device, by what is installed, by the shape of the cache."""

import pytest
import torch

from longspan.attention.backends import BACKENDS
from longspan.attention.backends.base import BackendShape
from longspan.attention.backends.choice import Choice, choose_backend
from longspan.attention.backends.cpu import CpuBackend
from longspan.attention.backends.dense import TorchBackend
from longspan.errors import ConfigError

GQA = BackendShape(head_dim=128, value_dim=128, kv_factor=2, quantised=False, dtype=torch.bfloat16)
MLA = BackendShape(head_dim=576, value_dim=512, kv_factor=1, quantised=False, dtype=torch.bfloat16)
FLOAT32 = BackendShape(128, 128, 2, quantised=False, dtype=torch.float32, compiled=True)
QUANTISED = BackendShape(head_dim=128, value_dim=128, kv_factor=2, quantised=True, dtype=torch.bfloat16)


def everything(package):
    return True


def nothing(package):
    return False


def shape(**changes):
    return BackendShape(**{**GQA.__dict__, **changes})


@pytest.mark.parametrize("shape", [GQA, MLA, QUANTISED])
@pytest.mark.parametrize(
    "device, is_installed, name",
    [
        ("cpu", everything, "cpu"),
        ("cuda", everything, "triton"),
        ("cuda", nothing, "torch"),
        ("mps", everything, "torch"),
    ],
)
def test_auto_takes_the_fastest_that_is_there(device, is_installed, name, shape):
    assert choose_backend("auto", device, shape, is_installed=is_installed).name == name


def test_auto_falls_back_for_quantised_latents_whose_rank_is_no_power_of_two():
    narrow = shape(head_dim=448, value_dim=384, kv_factor=1, quantised=True)
    choice = choose_backend("auto", "cuda", narrow, is_installed=everything)
    assert choice.name == "torch" and "power of two, not 384" in choice.reason


def test_auto_says_why_it_falls_back():
    choice = choose_backend("auto", "cuda", GQA, is_installed=nothing)
    assert choice.reason.endswith("triton needs the package triton, which is not installed")


@pytest.mark.parametrize("head_dim, kv_factor", [(320, 2), (512, 2), (640, 1)])
def test_auto_falls_back_when_triton_cannot_hold_the_rows(head_dim, kv_factor):
    assert (
        choose_backend("auto", "cuda", shape(head_dim=head_dim, kv_factor=kv_factor), is_installed=everything).name
        == "torch"
    )


@pytest.mark.parametrize(
    "changes, name",
    [({}, "compiled"), ({"compiled": False}, "cpu"), ({"quantised": True}, "compiled"),
     ({"quantised": True, "kv_factor": 1}, "cpu"), ({"dtype": torch.bfloat16}, "cpu"),
     ({"head_dim": 65}, "cpu")],
)  # fmt: skip
def test_on_a_cpu_auto_takes_compiled_kernels_in_fp32_for_rows_that_fill_vectors(changes, name):
    wanted = BackendShape(**{**FLOAT32.__dict__, **changes})
    assert choose_backend("auto", "cpu", wanted).name == name


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_asked_for_by_name_is_taken(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)  # as on a machine with a GPU
    device = "cpu" if name in ("cpu", "compiled") else "cuda"
    asked = FLOAT32 if name == "compiled" else GQA
    assert choose_backend(name, device, asked, is_installed=everything) == Choice(BACKENDS[name], "asked for")


@pytest.mark.parametrize(
    "name, device, cache, message",
    [
        ("fast", "cuda", GQA, "attention_backend=fast: is unknown; choose one of auto, compiled, cpu, cudnn"),
        ("cpu", "cuda", GQA, "attention_backend=cpu: needs a cpu device, not cuda"),
        ("triton", "cpu", GQA, "needs a cuda device, not cpu"),
        ("flashinfer", "cuda", QUANTISED, "cannot read a cache with a scale for each row"),
        ("triton", "cuda", shape(head_dim=512), "heads of up to 256 elements and latents of up to 576, not 512"),
        ("flash_attn", "cuda", MLA, "cannot read a cache of latents"),
        ("flash_attn", "cuda", shape(head_dim=320), "heads of up to 256 elements, a multiple of 8, not 320"),
        ("flashinfer", "cuda", shape(head_dim=80), "takes heads of 64, 128, 256 elements, not 80"),
        ("flashinfer", "cuda", shape(kv_factor=1), "takes latents of 576 elements with 512 of values"),
        ("flashinfer", "cuda", shape(dtype=torch.float32), "computes in bfloat16 or float16, not float32"),
    ],
)
def test_a_backend_that_cannot_be_used_is_an_error_that_says_why(name, device, cache, message):
    with pytest.raises(ConfigError) as error:
        choose_backend(name, device, cache, is_installed=everything)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["triton", "flashinfer", "flash_attn"])
def test_a_backend_that_is_not_installed_is_an_error(name):
    with pytest.raises(ConfigError, match=f"needs the package {name}, which is not installed"):
        choose_backend(name, "cuda", GQA, is_installed=nothing)


def test_latents_are_no_obstacle_to_flashinfer():
    assert choose_backend("flashinfer", "cuda", MLA, is_installed=everything).name == "flashinfer"


@pytest.mark.parametrize("name, kind", [("cpu", CpuBackend), ("torch", TorchBackend)])
def test_a_record_builds_its_backend(name, kind):
    assert isinstance(BACKENDS[name].build(torch.device("cpu"), GQA), kind)
