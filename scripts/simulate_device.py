"""How much a device idles between decode steps: the real core and rank loop over a device that only takes time.

    python scripts/simulate_device.py [--device-ms 20] [--ratios 0.1,0.2,0.4,0.6,0.8] [--requests 4] [--steps 60]
                                      [--drafts 0] [--drafts-by prompt-lookup|model] [--caller-ms 0] [--tp 1]

The device is a thread that works through a queue of steps. Starting a step takes host time, which is a ratio of the
device's. The caller takes time with the outputs of each step. With drafts, all of them are right. With several ranks
each has a device, and the one that idles most is shown. No GPU is needed. With PYTHONPATH it measures another checkout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Event, Thread
from typing import Any

import torch

from longspan.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig, Speculation
from longspan.engine.driver.build import build_core
from longspan.engine.driver.executors import threads
from longspan.engine.rank.build import BuiltRank
from longspan.engine.setup import resolve
from longspan.plan.plan import StepPlan
from longspan.plan.result import DraftTokens, StepResult
from longspan.request import CoreRequest, SampledToken, SamplingParams

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float32", "eos_token_id": 0,
}  # fmt: skip
SETTLING = 5  # steps at both ends that are not counted: prefill, and requests that end


class SimulatedDevice:
    """A stream: steps are computed one after the other, each in the same time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._queue: SimpleQueue[Event] = SimpleQueue()
        self.spans: list[tuple[float, float]] = []  # when each step began and ended
        Thread(target=self._compute, daemon=True).start()

    def launch(self) -> Event:
        """Queue a step. The event is set when it is done."""
        done = Event()
        self._queue.put(done)
        return done

    def idle(self) -> float:
        """The share of the time between two steps in which the device had none."""
        spans = self.spans[SETTLING:-SETTLING]
        gaps = sum(after[0] - before[1] for before, after in pairwise(spans))
        return gaps / (spans[-1][1] - spans[0][0])

    def _compute(self) -> None:
        while True:
            done = self._queue.get()
            started = time.perf_counter()
            stop = started + self._seconds
            time.sleep(max(0.0, stop - time.perf_counter()))
            self.spans.append((started, max(stop, time.perf_counter())))
            done.set()


class SimulatedRunner:
    """A runner whose `start` takes host time and queues a step on the device. Rank 0 of its TP group returns tokens."""

    is_asynchronous = True
    device = torch.device("cpu")

    def __init__(self, rank: int, device: SimulatedDevice, host_seconds: float, drafts: int) -> None:
        self._rank = rank
        self._device = device
        self._host_seconds = host_seconds
        self._drafts = drafts

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """See `Runner.start`."""
        time.sleep(self._host_seconds)
        done = self._device.launch()
        sampled = [segment for segment in plan.segments if segment.sample]
        tokens = tuple(
            SampledToken(segment.request_id, 1, None, position)
            for segment in sampled
            for position in range(segment.stop - segment.sample, segment.stop)
        )
        drafts = tuple(DraftTokens(each.request_id, each.stop - 1, (1,) * self._drafts) for each in sampled)

        def finish() -> StepResult:
            done.wait()
            return StepResult(tokens, drafts=drafts) if self._rank == 0 else StepResult()

        return finish

    def close(self) -> None:
        """See `Runner.close`."""


def measure(folder: str, host: float, device: float, options: argparse.Namespace) -> dict[str, Any]:
    """Idle share and seconds a step of one ratio."""
    requests, drafts = options.requests, options.drafts
    tokens = (options.steps + 2 * SETTLING) * (1 + drafts)
    devices = [SimulatedDevice(device) for _ in range(options.tp)]
    runners: list[Any] = [SimulatedRunner(rank, each, host, drafts) for rank, each in enumerate(devices)]
    how = f"draft:{drafts}:{folder}" if options.drafts_by == "model" else f"prompt-lookup:{drafts}"
    threads.build_runner = lambda _, rank, *others: BuiltRank(runners[rank], None, None)  # type: ignore[assignment]
    config = EngineConfig(
        folder, device="cpu", load_format="dummy", executor="threads",
        parallel=ParallelConfig(tensor_parallel_size=options.tp),
        cache=CacheConfig(pages_per_shard=(requests * (tokens // 16 + 3),), page_size=16),
        scheduler=SchedulerConfig(
            async_scheduling=True, speculative=Speculation.parse("speculative", how) if drafts else None
        ),
    )  # fmt: skip
    core = build_core(resolve(config))
    for number in range(requests):
        params = SamplingParams(temperature=0, ignore_eos=True)
        core.add(CoreRequest(str(number), [1] * (drafts + 3), params, 0, tokens))
    while core.has_unfinished:
        core.step()
        time.sleep(options.caller_ms / 1e3)
    core.shutdown()
    ends = [stop for _, stop in devices[0].spans[SETTLING:-SETTLING]]
    each = [after - before for before, after in pairwise(ends)]
    return {
        "host_ms": host * 1e3, "device_ms": device * 1e3, "step_ms": round(median(each) * 1e3, 3),
        "idle": round(max(each.idle() for each in devices), 4),
    }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device-ms", type=float, default=20.0)
    parser.add_argument("--ratios", default="0.1,0.2,0.4,0.6,0.8")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--drafts-by", choices=("prompt-lookup", "model"), default="prompt-lookup")
    parser.add_argument("--caller-ms", type=float, default=0.0)
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for ratio in map(float, options.ratios.split(",")):
            device = options.device_ms / 1e3
            print(json.dumps(measure(folder, ratio * device, device, options)), flush=True)


if __name__ == "__main__":
    main()
