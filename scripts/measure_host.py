"""Processor time of a recorded decode step on one rank: everything but the device's work, and but the graph's launch.

    python scripts/measure_host.py [--rows 1,32,256] [--context 1000] [--steps 40] [--scattered] [--sampled] [--churn]
        [--profile]

Neither the model nor the draw computes anything and nothing is recorded, so that the runner's own work remains; no GPU
is needed. With `--scattered` the pages of all requests alternate in the pool, as they do where requests grow side by
side. With `--sampled` no request is greedy. With `--churn` a request ends in every step, and another one begins. With
PYTHONPATH it measures another checkout. Times are those of the thread, so that other processes do not count. Prints
one JSON object for each number of rows.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longspan.attention.backends.triton.backend import TritonBackend
from longspan.attention.backends.triton.work import Tiling
from longspan.cache.pages import PageRef
from longspan.config import CacheConfig, EngineConfig, SchedulerConfig
from longspan.engine.driver.executors.threads import ThreadExecutor
from longspan.engine.rank.graphs import GraphRunner
from longspan.engine.rank.runner import Runner
from longspan.engine.rank.sampling.sampler import Sampler
from longspan.engine.setup import resolve
from longspan.plan.plan import Admission, NewPages, Segment, StepPlan
from longspan.request import SamplingParams

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 16,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float32", "eos_token_id": 0,
}  # fmt: skip
TILING = Tiling(group=4, kv_heads=8, block_m=16, block_n=64, programs=264)  # Llama-3-8B on an H100
PAGE = 16


class NoModel:
    """A model that computes nothing, but makes the plans of its attention as a first layer would."""

    hidden_size, dtype = 16, torch.float32

    def embedding(self, token_ids: Tensor) -> Tensor:
        """See `Model.embedding`."""
        return token_ids

    def layers(self, x: Tensor, positions: Tensor, attention: Any) -> Tensor:
        """See `Model.layers`."""
        for phase in attention._step.phases:
            for group in phase.groups:
                for runs in (group.own.direct, *group.received):
                    runs.plans.plan(TILING)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Logits fp32 [T, vocab]."""
        return torch.zeros(len(x), 8)


class NoRecorder:
    """Runs the work once, and then no more."""

    def record(self, work: Callable[[], Tensor], rows: Tensor | None = None) -> Callable[[], Tensor]:
        """See `Recorder.record`."""
        result = work()
        return lambda: result


def draw_nothing(logits: Tensor, *_: object) -> Tensor:
    """See `Draw`: token 0 for every row."""
    return torch.zeros(2, len(logits), dtype=torch.int64)


class Requests:
    """Requests that decode: the plan of each step, as the scheduler would send it."""

    def __init__(self, rows: int, options: argparse.Namespace) -> None:
        self._rows = rows
        self._most = -(-(options.context + rows + options.steps) // PAGE) + 2
        self._options = options
        self._positions = [options.context + row for row in range(rows)]  # of the next tokens
        self._names = list(map(str, range(rows)))
        self._begun = 0
        self._step = 0

    @property
    def pages(self) -> int:
        """Pages that they need at the end."""
        return self._rows * self._most

    def plan(self) -> StepPlan:
        """The next step: every request decodes one token, whose id the scheduler does not know yet."""
        self._step += 1
        starting = set(range(self._rows if self._step == 1 else 0))
        finished = []
        if self._options.churn and not starting:
            row = self._step % self._rows
            finished.append(self._names[row])
            starting.add(row)
            self._begun += 1
            self._names[row] = f"later {self._begun}"
        admitted = [self._admitted(row) for row in sorted(starting)]
        new = [
            NewPages(self._names[row], (self._page(row, at // PAGE),))
            for row, at in enumerate(self._positions) if at % PAGE == 0 and row not in starting
        ]  # fmt: skip
        segments = tuple(
            Segment(name, at, (1,) if row in starting else (), 0, False, 0, 1, pending=row not in starting)
            for row, (name, at) in enumerate(zip(self._names, self._positions, strict=True))
        )
        self._positions = [at + 1 for at in self._positions]
        return StepPlan(
            self._step, (), (), tuple(finished), tuple(admitted), tuple(new), segments, ("local",), ("local",)
        )

    def _admitted(self, row: int) -> Admission:
        at = self._positions[row]
        params = SamplingParams(temperature=0.8, top_p=0.9) if self._options.sampled else SamplingParams(temperature=0)
        pages = tuple(self._page(row, number) for number in range(at // PAGE + 1))
        return Admission(self._names[row], at, row + 1000 * self._begun, params, pages, ())

    def _page(self, row: int, number: int) -> PageRef:
        return PageRef(0, number * self._rows + row if self._options.scattered else row * self._most + number)


def make_runner(folder: str, pages: int) -> Runner:
    """A runner of one rank whose decode steps are replayed."""
    config = EngineConfig(
        folder, device="cpu", load_format="dummy", executor="threads",
        cache=CacheConfig(pages_per_shard=(pages,), page_size=PAGE), scheduler=SchedulerConfig(async_scheduling=True),
    )  # fmt: skip
    executor = ThreadExecutor(resolve(config))
    (runner,) = executor.runners
    executor.shutdown()
    backend = TritonBackend(torch.device("cpu"), 16, 132)
    runner.attention.ops = replace(runner.attention.ops, backend=backend)
    runner.cuda_graphs = GraphRunner(NoModel(), runner.attention, backend, NoRecorder(), 1, draw=draw_nothing)  # type: ignore[arg-type]
    runner._sampler = Sampler(draw_nothing)
    return runner


def measure(folder: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step, all of it and without sampling."""
    requests = Requests(rows, options)
    runner = make_runner(folder, requests.pages)
    sampling: list[float] = []
    sample = runner._sample

    def timed(*args: Any) -> Any:
        started = time.thread_time()
        found = sample(*args)
        sampling.append(time.thread_time() - started)
        return found

    runner._sample = timed  # type: ignore[method-assign]
    taken: list[float] = []
    profile = cProfile.Profile()
    for step in range(options.steps + 3):
        plan = requests.plan()
        started = time.thread_time()
        if options.profile and step >= 3:
            profile.enable()
        finish = runner.start(plan)
        profile.disable()
        taken.append(time.thread_time() - started)
        finish()
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    others = [all_of_it - part for all_of_it, part in zip(taken, sampling, strict=True)]
    return {
        "rows": rows, "start_ms": round(median(taken[3:]) * 1e3, 3),
        "least_ms": round(min(taken[3:]) * 1e3, 3), "sampling_ms": round(median(sampling[3:]) * 1e3, 3),
        "without_sampling_ms": round(median(others[3:]) * 1e3, 3),
        "worst_ms": round(max(others[3:]) * 1e3, 3),
    }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--scattered", action="store_true")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--churn", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for rows in map(int, options.rows.split(",")):
            print(json.dumps(measure(folder, rows, options)), flush=True)


if __name__ == "__main__":
    main()
