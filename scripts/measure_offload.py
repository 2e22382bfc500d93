"""Time to first token of an evicted context: computed again, and loaded from memory and from disk.

    python scripts/measure_offload.py MODEL [--context 4096] [--repetitions 3] [--folder FOLDER] [--device auto]

The device has room for one context and a little more, so each of two contexts evicts the other. All cases run in turn.
The disk is measured twice: as the operating system keeps the file in memory, and with that copy given up before each
load. Prints a table and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict

from longspan import LLM, SamplingParams
from longspan.cache.offload import OffloadCounters

_ONE = SamplingParams(temperature=0, max_tokens=1)
_PAGE = 16


class Side:
    """One engine; `cold` gives up the system's copy of the file on disk before each load."""

    def __init__(self, options: argparse.Namespace, cold: bool = False, **tiers: object) -> None:
        pages = options.context // _PAGE + 8
        self.llm = LLM(
            options.model, device=options.device, page_size=_PAGE, pages_per_shard=(pages,),
            max_num_batched_tokens=options.chunk, max_num_seqs=1, **tiers,
        )  # fmt: skip
        self._cold = cold

    def first_token(self, context: list[int]) -> float:
        """Seconds."""
        if self._cold:
            file = os.open(str(self.llm.engine.core.setup.config.cache.offload.disk_file), os.O_RDWR)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        began = time.perf_counter()
        self.llm.generate(context, _ONE)
        return time.perf_counter() - began


def contexts(options: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    """Two that share nothing."""
    numbers = random.Random(0)
    return [[numbers.randrange(vocabulary) for _ in range(options.context)] for _ in range(2)]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    size = 4 << 30
    disk = {"kv_offload_disk": options.folder, "kv_offload_disk_bytes": size}
    sides = {
        "computed": Side(options),
        "memory": Side(options, kv_offload_memory=size),
        "disk, kept by the system": Side(options, **disk),
        "disk, read": Side(options, cold=True, **disk),
    }
    both = contexts(options, sides["computed"].llm.engine.setup.model.vocab_size)
    for side in sides.values():  # computed, saved: from now on each context evicts the other
        for context in both:
            side.first_token(context)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repetitions):
        for context in both:
            for name, side in sides.items():
                seconds[name].append(side.first_token(context))
    computed = statistics.median(seconds["computed"])
    rows = {}
    for name, side in sides.items():
        counters: OffloadCounters = side.llm.stats().offload
        median = statistics.median(seconds[name])
        rows[name] = {"seconds": seconds[name], "median": median, "times_faster": computed / median, **asdict(counters)}
        spread = f"{min(seconds[name]):.3f}..{max(seconds[name]):.3f}"
        print(f"{name:26} {median:8.3f} s ({spread}) {computed / median:6.1f}x  {counters}")
        side.llm.shutdown()
    print(json.dumps({"context": options.context, "model": options.model, "sides": rows}))


if __name__ == "__main__":
    main()
