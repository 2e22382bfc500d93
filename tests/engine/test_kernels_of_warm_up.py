"""The kernels that Triton would compile for requests are among those that warm-up has compiled: seen without a GPU.

Launches only note the key by which Triton looks for a compiled kernel, and give zeros. So what is tested is everything
but the device: which tiles are chosen, and which arguments Triton compiles a kernel for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from longspan import SamplingParams
from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.workload import ExpansionCost
from longspan.engine.rank.draft_graphs import DraftGraphs, RecordedParts
from longspan.engine.rank.graphs import GraphRunner, graph_sizes
from longspan.engine.rank.recorder import EagerRecorder
from longspan.engine.rank.short_steps import SHORT_SIZES, ShortSteps
from tests.engine.test_ready import make_all_ready
from tests.engine.test_recorded_decode import of_layout
from tests.oracle import prompt_of, tiny_folder

LENGTHS = (30, 1, 7, 100, 47)
MIXTURES = [LENGTHS, (129, 3), (64, 64, 1), (300, 5), (7,) * 20, (24,) * 12]
PARAMS = [SamplingParams(max_tokens=3, temperature=0), SamplingParams(max_tokens=3, temperature=0.8, top_p=0.9)]
WRITTEN = {
    "attend_kernel": (9, 10),
    "latent_kernel": (7, 8),
    "_merge_kernel": (3, 4),
}  # arguments that hold a kernel's result


class Keys:
    """What Triton would compile for each launch."""

    def __init__(self, monkeypatch):
        self.found = set()

        def launcher(kernel, grid):
            return lambda *args, **options: self._launch(kernel, args, options)

        for kind in (JITFunction, InterpretedFunction):
            monkeypatch.setattr(kind, "__getitem__", launcher, raising=False)

    def _launch(self, kernel, args, options):
        plain = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize", ())
        names = kernel.fn.__code__.co_varnames
        key = [
            native_specialize_impl(CUDABackend, arg, False, name not in (plain or ()), True)
            for name, arg in zip(names, args, strict=False)
        ]
        for number in WRITTEN.get(kernel.fn.__name__, ()):
            args[number].zero_()
        self.found.add((kernel.fn.__name__, str(key), str(sorted(options.items()))))


def started(tiny, model, **layout):
    """An engine whose attention is Triton's, as on GPUs of type Hopper; its steps are recorded as far as there.

    Its steps are shorter than the contexts whose columns are divided among programs.
    """
    llm = tiny(
        model, dtype="bfloat16", max_num_batched_tokens=320, max_num_seqs=24, kv_cache_memory_bytes=1 << 22,
        debug=False, schedule="gather_q" if layout else "auto", **layout,
    )  # fmt: skip
    setup = llm.engine.setup
    for runner in llm.engine.executor.runners:
        attention = runner.attention
        backend = TritonBackend(torch.device("cpu"), attention.ops.value_dim, processors=132, specialised=True)
        attention.ops = replace(attention.ops, backend=backend)
        if not attention.preparer.expansion.pays(SHORT_SIZES[-1], 1):
            recorder, pcp = EagerRecorder(), setup.grid.pcp
            parts = runner.model, attention, backend, recorder
            short = ShortSteps(*parts, SHORT_SIZES, **of_layout(setup))
            runner.cuda_graphs = GraphRunner(*parts, pcp, graph_sizes(8), short)
    return llm


def started_with_drafts(tiny, ahead):
    """The same where a small model drafts, and its drafts may be verified ahead."""
    llm = tiny(
        "llama", dtype="bfloat16", max_num_batched_tokens=512, kv_cache_memory_bytes=1 << 22, debug=False,
        attention_backend="torch", speculative=f"draft:3:{tiny_folder('llama')}", async_scheduling=ahead,
    )  # fmt: skip
    (runner,) = llm.engine.executor.runners
    attentions = runner.attention, runner.drafter.attention
    model, own = (TritonBackend(torch.device("cpu"), each.ops.value_dim, processors=132) for each in attentions)
    for attention, backend in zip(attentions, (model, own), strict=True):
        attention.ops = replace(attention.ops, backend=backend)
    drafter = runner.drafter
    parts = RecordedParts(runner.model, runner.attention, model, drafter.chain, own, drafter.first_input)
    runner.drafter = drafter.with_graphs(DraftGraphs(parts, EagerRecorder(), (8,), ()))
    return llm


MODELS = ["llama", "deepseek-v3", "deepseek-v3 recorded", "deepseek-v3-wide", "drafts", "drafts ahead"]
LAYOUTS = {"dcp": {"tp": 2, "dcp": 2}, "pcp": {"pcp": 2}}


@pytest.mark.parametrize("model", [*MODELS, "llama dcp", "llama pcp", "deepseek-v3 recorded dcp"])
def test_requests_launch_only_what_warm_up_has_launched(tiny, model, monkeypatch):
    keys = Keys(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))  # or queries are converted first
    if "recorded" in model:  # as with DeepSeek's own widths no short step has expanded latents
        monkeypatch.setattr(ExpansionCost, "of", staticmethod(lambda *_: ExpansionCost(1, 170)))
    drafts = model.startswith("drafts")
    layout = LAYOUTS.get(model.split()[-1], {})
    llm = started_with_drafts(tiny, model.endswith("ahead")) if drafts else started(tiny, model.split()[0], **layout)
    make_all_ready(llm)
    warm = set(keys.found)
    assert {name for name, _, _ in warm} >= {"latent_kernel" if "wide" in model else "attend_kernel", "_write_kernel"}
    for lengths in MIXTURES:
        for params in PARAMS:
            llm.generate([prompt_of(length, 9 + number) for number, length in enumerate(lengths)], params)
    missed = keys.found - warm
    assert not missed, "\n".join(map(str, sorted(missed)))
