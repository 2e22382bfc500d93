"""Time from a prompt's last chunk on the prefill side to the first token on the decode side, with and without overlap.

Both instances run in this process, each stepped by a thread of its own, and both ways take turns, so what disturbs the
machine disturbs both. `python scripts/measure_disaggregation.py MODEL`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from threading import Thread

from longspan.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig, TransferConfig
from longspan.engine.driver.build import build_core
from longspan.engine.setup import resolve
from longspan.request import CoreRequest, SamplingParams, TokenOutput


@dataclass
class Times:
    """Of one request, in seconds: from start to the last chunk, from there to the first token."""

    prefill: float
    handover: float


class Side:
    """An instance whose core a thread steps. `first` is when a token came, `computed` when a prompt was."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = build_core(resolve(config))
        self.first = self.computed = 0.0
        self.todo: list[CoreRequest] = []
        self._over = False
        self._keeps = self.core.role.keeps
        self.core.role.keeps = self._note  # type: ignore[method-assign]
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its core is still stepped."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End it."""
        self._over = True
        self._thread.join()
        self.core.shutdown()

    def _note(self, output: TokenOutput) -> bool:
        self.computed = time.perf_counter()
        return self._keeps(output)

    def _run(self) -> None:
        while not self._over:
            while self.todo:
                self.core.add(self.todo.pop())
            if any(output.tokens for output in self.core.step()):
                self.first = time.perf_counter()
            if not self.core.has_unfinished:
                self.core.role.wait(0.005)


def measure(prefill: Side, decode: Side, number: int, tokens: int) -> Times:
    """One prompt through both sides."""
    prompt = [(number * 7919 + position * 31) % 40000 + 5 for position in range(tokens)]  # nobody has its pages
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    decode.first = 0.0
    started = time.perf_counter()
    decode.todo.append(CoreRequest(str(number), prompt, params, 0, 1, prefill_at=(prefill.core.role.info.address,)))
    while not decode.first:
        time.sleep(0.001)
        if not (prefill.is_alive and decode.is_alive):
            raise RuntimeError("an instance has failed")
    return Times(prefill.computed - started, decode.first - prefill.computed)


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prefill-pcp", type=int, default=2)
    parser.add_argument("--decode-tp", type=int, default=1)
    given = parser.parse_args()

    def side(role: str, overlap: bool, **sizes: int) -> Side:
        return Side(
            EngineConfig(
                given.model, parallel=ParallelConfig(**sizes), cache=CacheConfig(enable_prefix_caching=False),
                scheduler=SchedulerConfig(max_num_batched_tokens=given.chunk, max_num_seqs=8),
                transfer=TransferConfig(role, overlap=overlap),
            )
        )  # fmt: skip

    decode = side("decode", True, tensor_parallel_size=given.decode_tp)
    ways = {way: side("prefill", way, prefill_context_parallel_size=given.prefill_pcp) for way in (True, False)}
    times: dict[bool, list[Times]] = {True: [], False: []}
    for number in range(2 * given.repeat + 2):
        way = number % 2 == 0
        found = measure(ways[way], decode, number, given.tokens)
        if number >= 2:  # the first of each warms up
            times[way].append(found)
    moved = decode.core.role.counters
    print(f"{given.tokens} tokens, {moved.bytes / moved.fetched / 1e6:.0f} MB of KV each")
    for way, name in ((True, "overlapped"), (False, "at the end")):
        prefills, handovers = ([getattr(t, field) for t in times[way]] for field in ("prefill", "handover"))
        print(
            f"{name}: prefill {statistics.median(prefills):.2f} s; last chunk to first token "
            f"{statistics.median(handovers):.3f} s ({min(handovers):.3f}..{max(handovers):.3f})"
        )
    for instance in (decode, *ways.values()):
        instance.close()


if __name__ == "__main__":
    main()
