"""What a configuration becomes on a machine: which executor has its ranks, and which steps are recorded."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from longspan import LLM
from longspan.attention.workload import ExpansionCost
from longspan.config import EngineConfig, ParallelConfig, SchedulerConfig, Speculation
from longspan.config.scheduling import GPU_FIXED_ROWS
from longspan.engine import nvml
from longspan.engine.devices import choose_executor
from longspan.engine.rank import process_rank as process_worker
from longspan.engine.rank import serving as rank_serving
from longspan.engine.rank.scaled_weights import ScaledChoice, ScaledWeights
from longspan.engine.rank.short_steps import short_sizes, unexpanded
from longspan.engine.setup import resolve
from longspan.engine.transport.messages import Begin
from longspan.errors import ConfigError
from longspan.weights.mxfp4 import Mxfp4Checkpoint
from longspan.weights.safetensors import SafetensorsCheckpoint
from tests.oracle import tiny_folder


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(8)`: the machine looks as if it had that many; the list has the devices that were made current."""
    current = []

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(nvml, "free_bytes", lambda: 80 << 30)
        monkeypatch.setattr(nvml, "capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return have


def config(**fields):
    return EngineConfig(tiny_folder("llama"), parallel=ParallelConfig(tensor_parallel_size=2), **fields)


@pytest.mark.parametrize(
    "device, ranks, gpus, chosen",
    [
        ("cpu", 1, 0, "threads"),
        ("cpu", 8, 0, "threads"),
        ("cuda", 1, 1, "processes"),
        ("cuda", 1, 8, "processes"),
        ("cuda", 2, 2, "processes"),
        ("cuda", 8, 8, "processes"),
        ("cuda", 4, 8, "processes"),
    ],
)
def test_auto_gives_each_rank_on_gpus_a_process_and_a_gpu(device, ranks, gpus, chosen):
    assert choose_executor("auto", device, ranks, gpus) == chosen


def test_auto_keeps_a_single_rank_in_the_process_that_knows_what_was_added_to_the_engine():
    assert choose_executor("auto", "cuda", 1, 1, extended=True) == "threads"


@pytest.mark.parametrize("wanted", ["auto", "processes"])
def test_more_ranks_than_gpus_are_refused_with_both_numbers_and_the_remedies(wanted):
    with pytest.raises(ConfigError) as error:
        choose_executor(wanted, "cuda", 8, 4)
    message = str(error.value)
    for part in (f"executor={wanted}:", "8 ranks", "has 4", "--executor threads", "fewer ranks (-tp 4, -tp 4 -dcp 2,",
                 "-tp 2 -pcp 2", "-pcp 4", "ray or external"):  # fmt: skip
        assert part in message


@pytest.mark.parametrize("wanted", ["threads", "ray", "external", "dry"])
def test_an_executor_asked_for_may_have_more_ranks_than_this_machine_has_gpus(wanted):
    assert choose_executor(wanted, "cuda", 8, 1) == wanted


def test_processes_on_a_cpu_need_no_gpu():
    assert choose_executor("processes", "cpu", 8, 0) == "processes"


def test_auto_is_the_default_and_is_settled_when_the_configuration_is_resolved():
    assert config().executor == "auto"
    assert resolve(config(device="cpu")).config.executor == "threads"


def test_two_ranks_on_two_gpus_become_processes(gpus):
    gpus(2)
    setup = resolve(config())
    assert setup.config.executor == "processes"
    assert not [note for note in setup.notes if "share one GPU" in note]


def test_two_ranks_on_one_gpu_are_refused_unless_they_are_to_share_it(gpus):
    gpus(1)
    with pytest.raises(ConfigError, match=r"executor=auto: gives each of the 2 ranks a GPU of its own, .* has 1"):
        resolve(config())
    setup = resolve(config(executor="threads"))
    assert any("all 2 ranks share one GPU; without --executor threads" in note for note in setup.notes)


@pytest.mark.parametrize(
    ("given", "pcp", "tokens"),
    [({}, 1, 8192), ({}, 2, 16384), ({"max_num_batched_tokens": 500}, 2, 500), ({"max_num_seqs": 9000}, 1, 9000)],
)
def test_a_step_on_gpus_has_8192_tokens_for_each_pcp_rank_unless_a_number_is_given(gpus, given, pcp, tokens):
    gpus(2)
    parallel = ParallelConfig(prefill_context_parallel_size=pcp)
    settings = EngineConfig(tiny_folder("llama"), parallel=parallel, scheduler=SchedulerConfig(**given))
    found = resolve(settings).config.scheduler
    assert (found.step_tokens, found.fixed_rows) == (tokens, GPU_FIXED_ROWS)
    assert resolve(replace(settings, device="cpu")).config.scheduler.step_tokens == (tokens if given else 2048)


def test_the_python_interface_chooses_the_executor_too():
    with LLM(tiny_folder("llama"), device="cpu", num_threads=1) as llm:
        assert llm.engine.setup.config.executor == "threads"


def test_the_number_of_a_process_is_that_of_its_gpu(monkeypatch):
    served = []
    monkeypatch.setattr(process_worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(process_worker, "end_with_parent", lambda parent: None)
    monkeypatch.setattr(process_worker, "serve_driver", lambda *given: served.append(given))
    process_worker.main("ipc://driver", 5, 8, os.getpid())
    assert served == [("ipc://driver", 5, 8, 5)]


def test_a_rank_takes_its_gpu_before_anything_can_open_a_context_on_another(gpus, monkeypatch):
    current, seen = gpus(8), []

    def resolve_seeing(config):
        seen.append(list(current))
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_serving, "resolve", resolve_seeing)
    with pytest.raises(KeyboardInterrupt):
        rank_serving._serve(Begin(config(device="cuda"), "", 8), 5, 5, SimpleNamespace(), SimpleNamespace(), print)
    assert seen == [[5]]


def on_gpus(gpu=True, dtype="auto", scaled=None, **parallel):
    """The setup of DeepSeek-V2-Lite."""
    found = resolve(EngineConfig("deepseek-v2-lite", executor="dry", dtype=dtype, parallel=ParallelConfig(**parallel)))
    return replace(found, device_type="cuda" if gpu else "cpu", scaled=scaled or ScaledChoice())


def records(**options):
    """Whether decode steps are recorded."""
    return on_gpus(**options).records_decode


def test_a_mixtures_decode_steps_are_recorded_where_all_its_experts_are_in_one_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert records()
    assert not records(dtype="float16")
    assert not records(gpu=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not records()


def test_so_are_those_of_experts_that_stay_in_fp8_or_mxfp4(monkeypatch, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    files = SafetensorsCheckpoint(tmp_path)
    fp8, mxfp4 = ScaledChoice(ScaledWeights(files, fused=True)), ScaledChoice(packed=Mxfp4Checkpoint(files))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert records(scaled=fp8) and records(scaled=mxfp4)
    assert not records(scaled=mxfp4, dtype="float16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert records(scaled=mxfp4)
    assert not records(scaled=fp8)  # a slice of an expert that cuts a block is in bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not records(scaled=mxfp4)


def test_they_are_recorded_over_ranks_of_one_machine_that_all_get_the_same_rows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    two = {"prefill_context_parallel_size": 2, "enable_expert_parallel": True}
    assert records(**two)
    assert not records(**two, ranks_per_node=1)


def test_short_steps_with_prompt_tokens_are_recorded_where_some_schedule_can_be(monkeypatch):
    """Of DeepSeek's latents up to 128 rows: expanding them pays from 171 on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    two = {"prefill_context_parallel_size": 2, "enable_expert_parallel": True}
    for layout in ({}, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, two):
        assert short_sizes(on_gpus(**layout)) == (16, 32, 64, 128)
    latents, plain = on_gpus().attention_shape.expansion, ExpansionCost()
    assert unexpanded((128, 256), latents, plain) == unexpanded((128, 256), plain, latents) == (128,)
    assert unexpanded((128, 256), plain) == (128, 256)
    assert short_sizes(on_gpus(gpu=False)) == ()
    sharded = on_gpus(tensor_parallel_size=2, decode_context_parallel_size=2)
    assert short_sizes(under(sharded, "gather_q"))
    assert short_sizes(under(sharded, "ring_q")) == ()


def under(setup, schedule):
    """The same setup, where the user has chosen a schedule."""
    config = setup.config
    return replace(setup, config=replace(config, scheduler=replace(config.scheduler, schedule=schedule)))


@pytest.mark.parametrize(
    ("recorded", "options"),
    [
        (True, {}),
        (True, {"tensor_parallel_size": 2}),
        (False, {"tensor_parallel_size": 2, "executor": "threads"}),
        (False, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}),
        (False, {"prefill_context_parallel_size": 2}),
        (False, {"tensor_parallel_size": 2, "backend": "cpu"}),
    ],
)
def test_steps_with_drafts_are_recorded_where_every_rank_has_all_pages_of_its_heads(recorded, options):
    """And a backend writes to slots that only the device knows."""
    parallel = {name: size for name, size in options.items() if name.endswith("_size")}
    folder = tiny_folder("llama")
    config = EngineConfig(
        folder, executor="dry", parallel=ParallelConfig(**parallel), attention_backend=options.get("backend", "torch"),
        scheduler=SchedulerConfig(speculative=Speculation("draft", 2, folder)),
    )  # fmt: skip
    found = replace(resolve(config), device_type="cuda")
    found = replace(found, config=replace(found.config, executor=options.get("executor", "processes")))
    assert found.records_drafts == recorded
