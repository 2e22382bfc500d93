"""Processor time of everything around a decode step but the ranks: scheduler, core, messages and outputs.

    python scripts/measure_core.py [--rows 1,32,256] [--context 1000] [--steps 60] [--sampled] [--logprobs] [--churn]
        [--tokenizer MODEL] [--profile core|frontend]

No rank computes: tokens are made up. Plans and results are encoded and decoded as for ranks in other processes, outputs
as between a server's two processes. With `--churn` a request ends in every step, and another one begins. With
PYTHONPATH it measures another checkout. Times are those of the thread, so that other processes do not count, in
milliseconds: medians, and the least. Prints one JSON object for each number of rows.

`core` is what a step waits for: `schedule` and `commit` are the scheduler's, `plan` encodes the plan, `result` decodes
the result, and `outputs` is the core's own. `tell` and `heard` are the message to the server's process, where
`frontend` makes outputs of it (text too with `--tokenizer`).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from longspan.config import CacheConfig, EngineConfig, SchedulerConfig
from longspan.engine.driver.build import build_core
from longspan.engine.driver.core import EngineCore
from longspan.engine.driver.executors.dry import DryExecutor
from longspan.engine.frontend.output_processor import CoreCalls, OutputProcessor
from longspan.engine.setup import resolve
from longspan.engine.transport.messages import FromWorker, StepDone
from longspan.plan.plan import StepPlan
from longspan.plan.result import StepResult
from longspan.request import SampledToken, SamplingParams
from longspan.server import messages
from longspan.weights.source import resolve_model
from longspan.weights.tokenizer import load_tokenizer

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 16,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float32", "eos_token_id": 0,
}  # fmt: skip
WARM_UP = 5
PARTS = ("core", "schedule", "plan", "result", "commit", "outputs", "tell", "heard", "frontend")


class Stopwatch:
    """Sums the thread's time by part, for one step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def of(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose time is added to that of a part."""

        def timed(*args: Any, **more: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*args, **more)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + time.thread_time() - started

        return timed


class Messenger(DryExecutor):
    """Ranks that answer at once, in messages."""

    def __init__(self, setup: Any, watch: Stopwatch, with_logprobs: bool) -> None:
        super().__init__(setup)
        self._with_logprobs = with_logprobs
        self._encode = watch.of("plan", StepPlan.encode)
        self._decode = watch.of("result", lambda sent: msgspec.msgpack.decode(sent, type=FromWorker))
        self._outside = watch.of("ranks", self._answer)
        self._sent: deque[bytes] = deque()

    def submit(self, plan: StepPlan) -> None:
        """See `Executor.submit`."""
        self._encode(plan)
        self._outside(plan)

    def _answer(self, plan: StepPlan) -> None:
        super().submit(plan)
        tokens = self._done.popleft().tokens
        if not self._with_logprobs:
            tokens = tuple(SampledToken(t.request_id, t.token_id, None, t.position) for t in tokens)
        self._sent.append(msgspec.msgpack.encode(StepDone(StepResult(tokens))))

    def collect(self, while_waiting: Callable[[], None]) -> StepResult:
        """See `Executor.collect`."""
        return StepResult.joined([self._decode(self._sent.popleft()).result])


class Load:
    """Requests that decode, and what serves them."""

    def __init__(self, folder: str, rows: int, options: argparse.Namespace) -> None:
        steps = options.steps + WARM_UP + 2 * rows
        limit = options.context + steps + 8
        config = EngineConfig(
            folder, device="cpu", load_format="dummy", executor="dry",
            cache=CacheConfig(pages_per_shard=((rows + 2) * (limit // 16 + 2),), enable_prefix_caching=True),
            scheduler=SchedulerConfig(async_scheduling=True, max_num_seqs=rows, max_model_len=limit),
        )  # fmt: skip
        self._options = options
        self.watch = Stopwatch()
        setup = resolve(config)
        tokenizer = load_tokenizer(resolve_model(options.tokenizer)) if options.tokenizer else None
        self.core: EngineCore = build_core(setup)
        self.core.executor = Messenger(setup, self.watch, options.logprobs)
        scheduler = self.core.scheduler
        scheduler.schedule = self.watch.of("schedule", scheduler.schedule)  # type: ignore[method-assign]
        scheduler.commit = self.watch.of("commit", scheduler.commit)  # type: ignore[method-assign]
        self.frontend = OutputProcessor(setup, tokenizer)
        self._step = self.watch.of("all", self.core.step)
        self._tell = self.watch.of("tell", msgspec.msgpack.encode)
        self._hear = self.watch.of("heard", lambda sent: msgspec.msgpack.decode(sent, type=messages.FromCore))
        self._take = self.watch.of("frontend", self.frontend.take)
        self._begun, self._alive = 0, deque[str]()
        self._load = messages.CoreLoad((0,), self.core.scheduler.counters())
        for _ in range(rows):
            self._begin(steps)
        while self.core.scheduler.counters().waiting or any(s.remaining > 1 for s in scheduler.running):
            self.step(None, None)

    def _begin(self, tokens: int) -> None:
        options, name = self._options, f"request-{self._begun:08x}-of-a-client"  # as long as a server's
        params = SamplingParams(
            temperature=0.8 if options.sampled else 0, top_p=0.9 if options.sampled else 1, max_tokens=tokens,
            ignore_eos=True, logprobs=0 if options.logprobs else None,
        )  # fmt: skip
        prompt = [self._begun % 30000 + 1, *range(1, options.context)]
        self.frontend.add(name, prompt, params, None)
        self._begun += 1
        self._alive.append(name)
        self._carry_out()

    def churn(self, tokens: int) -> None:
        """End the oldest request, and begin another."""
        self.frontend.abort(self._alive.popleft())
        self._begin(tokens)

    def _carry_out(self) -> None:
        calls, self.frontend.core_calls = self.frontend.core_calls, CoreCalls()
        for request in calls.start:
            self.core.add(request)
        for name in calls.finish:
            self.core.finish(name)

    def step(self, in_core: cProfile.Profile | None, in_frontend: cProfile.Profile | None) -> dict[str, float]:
        """Seconds of the parts of one step."""
        self.watch.spent.clear()
        with in_core or nullcontext():
            outputs = self._step()
        sent = self._tell(messages.NewTokens(outputs, self._load, len(outputs)))
        with in_frontend or nullcontext():
            self._take(self._hear(sent).outputs)
        self._carry_out()
        spent = self.watch.spent
        spent["core"] = spent["all"] - spent.get("ranks", 0.0)
        inside = sum(spent.get(part, 0.0) for part in ("schedule", "plan", "result", "commit"))
        spent["outputs"] = spent["core"] - inside
        return dict(spent)


def measure(folder: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the parts of a step."""
    load = Load(folder, rows, options)
    profile = cProfile.Profile()
    core, frontend = (profile if options.profile == name else None for name in ("core", "frontend"))
    taken = []
    for number in range(options.steps + WARM_UP):
        if options.churn:
            load.churn(options.steps)
        warm = number >= WARM_UP
        spent = load.step(core if warm else None, frontend if warm else None)
        taken += [spent] if warm else []
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    found = {part: [1e3 * spent.get(part, 0.0) for spent in taken] for part in PARTS}
    return {
        "rows": rows, **{part: round(median(times), 3) for part, times in found.items()},
        "least_core": round(min(found["core"]), 3), "least_frontend": round(min(found["frontend"]), 3),
    }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--churn", action="store_true")
    parser.add_argument("--tokenizer")
    parser.add_argument("--profile", choices=("core", "frontend"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        for rows in map(int, options.rows.split(",")):
            print(json.dumps(measure(folder, rows, options)), flush=True)


if __name__ == "__main__":
    main()
