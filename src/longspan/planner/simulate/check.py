"""Compares predictions with measurements: the same batches and the same trace in a simulation and in a real engine.

It owns the batches, the trace and the comparison.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import torch

from longspan.bench.measure import run_batch
from longspan.bench.serving.client import Finished, Outcome
from longspan.bench.serving.report import RunReport, summarise
from longspan.config import CacheConfig, EngineConfig, ParallelConfig
from longspan.engine.engine import Engine
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import Hardware
from longspan.planner.measured_engine import decode_step
from longspan.planner.models import find_model
from longspan.planner.simulate.instance import InstanceConfig, SimulatedInstance
from longspan.planner.simulate.run import simulate
from longspan.planner.simulate.setup import instance_config, limits_of
from longspan.planner.simulate.trace_requests import TraceRequest
from longspan.planner.timing import Report, typical
from longspan.request import SamplingParams

PREFILLS = (512, 1024, 2048, 4096, 8192)  # tokens of prompts
BATCHES = (1, 2, 4, 8, 16)  # decoding requests
LAYOUTS = (ParallelConfig(), ParallelConfig(1, 2, 1))
_CONTEXT, _OUTPUT = 512, 24  # tokens of a decoding request: its prompt, and those it generates
_ONCE = 4096  # prompts from this length on are measured once
_REQUESTS, _RATE, _SEED = 40, 1.0, 0  # trace: number of requests, arrivals per second, random seed
_VOCABULARY = 100  # token ids of prompts lie below it


@dataclass(frozen=True)
class CheckRow:
    """The predicted and the measured time of one batch."""

    kind: str  # prefill or decode
    size: int  # tokens of the prompt, or number of decoding requests
    ranks: int
    predicted_s: float
    measured_s: float  # seconds in the first round over all batches
    again_s: float  # seconds in the second round; those of the first for long prompts

    @property
    def error(self) -> float:
        """Relative error of the prediction, against the mean of both measurements."""
        return self.predicted_s / ((self.measured_s + self.again_s) / 2) - 1

    @property
    def agrees(self) -> bool:
        """Whether the two measurements differ by at most 10 %."""
        return max(self.measured_s, self.again_s) <= 1.1 * min(self.measured_s, self.again_s)


@dataclass(frozen=True)
class TraceCheck:
    """Reports of the same requests in a simulation and in a real engine."""

    simulated: RunReport
    real: RunReport

    @property
    def throughput_error(self) -> float:
        """Relative error of the simulated output tokens per second."""
        return self.simulated.output_tokens_per_s / self.real.output_tokens_per_s - 1

    @property
    def ttft_error(self) -> float:
        """Relative error of the simulated median time to first token."""
        if self.simulated.ttft_s is None or self.real.ttft_s is None:
            return 0.0
        return self.simulated.ttft_s.median / self.real.ttft_s.median - 1


@dataclass(frozen=True)
class Checks:
    """All comparisons of one model on one machine."""

    rows: tuple[CheckRow, ...]
    trace: TraceCheck

    @property
    def median_error(self) -> float:
        """Median of the absolute errors of all rows."""
        return median(abs(row.error) for row in self.rows)


def run_checks(model: str, machine: Hardware, executor: str, report: Report) -> Checks:
    """Compare all batches and the trace, for a model with weights. Takes some minutes."""
    rows: list[CheckRow] = []
    for layout in _layouts():
        config = _engine_config(model, executor, layout)
        simulated = _simulated(config, machine)
        with Engine(config) as engine:
            _measured(engine, 1, 64, 4)
            rows += _rows(engine, simulated, report)
    config = _engine_config(model, executor, LAYOUTS[0])
    report("a trace")
    return Checks(tuple(rows), check_trace(config, machine, small_trace()))


def _layouts() -> tuple[ParallelConfig, ...]:
    """The layouts that this machine can run: ranks may share cores, but not a GPU."""
    return LAYOUTS[: torch.cuda.device_count()] if torch.cuda.is_available() else LAYOUTS


def small_trace() -> list[TraceRequest]:
    """The trace: short requests that arrive at random times."""
    generator = random.Random(_SEED)
    arrivals = accumulate((generator.expovariate(_RATE) for _ in range(_REQUESTS - 1)), initial=0.0)
    return [
        TraceRequest(number, arrival, generator.randrange(32, 512), generator.randrange(8, 48), (number,))
        for number, arrival in enumerate(arrivals)
    ]


def check_trace(config: EngineConfig, machine: Hardware, requests: Sequence[TraceRequest]) -> TraceCheck:
    """Send the requests at their arrival times to an engine and to its simulation."""
    simulated = _simulated(config, machine)
    expected = simulate(simulated, requests, 1, limits_of(simulated, None, requests), lambda _: None)
    with Engine(config) as engine:
        _measured(engine, 1, 64, 4)
        return TraceCheck(expected.report, _play(engine, requests))


def _engine_config(model: str, executor: str, layout: ParallelConfig) -> EngineConfig:
    return EngineConfig(model, executor=executor, parallel=layout, cache=CacheConfig(enable_prefix_caching=False))


def _simulated(config: EngineConfig, machine: Hardware) -> InstanceConfig:
    """The simulation of an engine with this configuration."""
    shape, weights = find_model(config.model, "bf16" if torch.cuda.is_available() else "fp32")
    scheduler = config.scheduler
    deployment = Deployment(
        shape, machine, config.parallel, weights, int(weights.embedding), config.cache.page_size,
        max_num_batched_tokens=scheduler.step_tokens, max_num_seqs=scheduler.running_limit,
    )  # fmt: skip
    return instance_config(deployment, scheduler, config.cache.memory_bytes, config.cache.enable_prefix_caching)


def _rows(engine: Engine, simulated: InstanceConfig, report: Report) -> list[CheckRow]:
    """All batches of one layout, measured in two rounds: the speed of a shared machine changes within seconds."""
    ranks, longest = engine.setup.grid.world_size, engine.setup.max_model_len - 2
    loads = {("prefill", size): (1, min(size, longest), 2) for size in PREFILLS}
    loads |= {("decode", size): (size, _CONTEXT, _OUTPUT) for size in BATCHES}
    found: dict[tuple[str, int], list[float]] = {situation: [] for situation in loads}
    for number in range(2):
        for (kind, size), (requests, prompt, _) in loads.items():
            report(f"{kind} of {size} {'tokens' if kind == 'prefill' else 'requests'} on {ranks} ranks")
            if kind == "decode":
                found[kind, size].append(decode_step(engine, requests, prompt, _OUTPUT))
            elif number == 0 or prompt < _ONCE:
                again = range(max(1, _ONCE // prompt // 2))
                found[kind, size].append(typical([_measured(engine, 1, prompt, 1)[0] for _ in again]))
    return [
        CheckRow(kind, size, ranks, _predicted(simulated, *load)[kind == "decode"], found[kind, size][0],
            found[kind, size][-1])
        for (kind, size), load in loads.items()
    ]  # fmt: skip


def _measured(engine: Engine, requests: int, prompt: int, output: int) -> tuple[float, float]:
    """(seconds until all requests have their first token, seconds of a step after that) in the engine."""
    generator = random.Random(_SEED)
    prompts = [generator.choices(range(_VOCABULARY), k=prompt) for _ in range(requests)]
    found = run_batch(engine, prompts, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True))
    return found.ttft_s, found.decode_s / max(found.decode_tokens, 1) * requests


def _predicted(simulated: InstanceConfig, requests: int, prompt: int, output: int) -> tuple[float, float]:
    """The same two times in the simulation."""
    instance = SimulatedInstance(simulated)
    completions = [instance.add(number, prompt, output, (), 0.0) for number in range(requests)]
    instance.advance(float("inf"))
    begun = max(completion.token_times[0] for completion in completions)
    ended = max(completion.token_times[-1] for completion in completions)
    tokens = sum(at > begun for completion in completions for at in completion.token_times)
    return begun, (ended - begun) / max(tokens, 1) * requests


def _play(engine: Engine, requests: Sequence[TraceRequest]) -> RunReport:
    """Run the trace in the engine: requests are added between steps once their arrival time has come."""
    generator = random.Random(_SEED)
    prompts = [generator.choices(range(_VOCABULARY), k=request.prompt_tokens) for request in requests]
    times: dict[str, list[float]] = {str(request.number): [] for request in requests}
    todo, peak, running = list(zip(requests, prompts, strict=True)), 0, 0
    began = time.perf_counter()
    while todo or engine.has_unfinished:
        now = time.perf_counter() - began
        while todo and todo[0][0].arrival_s <= now:
            request, prompt = todo.pop(0)
            params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(str(request.number), prompt, params)
            running += 1
        peak = max(peak, running)
        if not engine.has_unfinished:
            time.sleep(max(0.0, todo[0][0].arrival_s - now))
            continue
        for output in engine.step():
            times[output.request_id] += [time.perf_counter() - began] * (
                len(output.outputs[0].token_ids) - len(times[output.request_id])
            )
            running -= output.finished
    outcomes = tuple(
        Outcome(
            request.arrival_s, request.arrival_s, tuple(times[str(request.number)]), request.prompt_tokens,
            request.max_tokens, request.max_tokens, False, None,
        )
        for request in requests
    )  # fmt: skip
    return summarise(Finished(outcomes, time.perf_counter() - began, peak, 0.0), None)
