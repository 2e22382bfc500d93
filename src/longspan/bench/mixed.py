"""Compare three placements of KV caches under a mixed load of short and long contexts.

A context is local if one shard holds its KV cache, and spread if the cache is divided among all shards. The placements
are: short contexts local and long ones spread; all spread; all local.

This module owns the load and the measurements. Each placement has its own engine, and the engines run in turn.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.request import SamplingParams


@dataclass(frozen=True)
class MixedLoad:
    """Requests of two kinds, all queued at the start."""

    # number of short prompts
    chats: int
    # their mean tokens
    chat_len: int
    # number of long prompts
    contexts: int
    # their tokens
    context_len: int
    # tokens to generate for each request
    output_len: int
    # seed of lengths and tokens
    seed: int


PLACEMENTS: Mapping[str, Mapping[str, Any]] = {
    "by length": {},
    "all spread": {"local_context": 0},
    "all local": {"schedule": "local"},
}


def run_mixed(
    config: EngineConfig, load: MixedLoad, iterations: int, on_progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each placement: tokens per second in all, and milliseconds between the tokens of chats.

    Values are medians over `iterations` runs.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PLACEMENTS}
    for iteration in range(iterations):
        for name, options in PLACEMENTS.items():
            on_progress(f"{name}, run {iteration + 1} of {iterations}")
            placed = replace(config, scheduler=replace(config.scheduler, **options))
            with Engine(placed) as engine:
                found[name].append(_run(engine, load))
    rows = []
    for name, runs in found.items():
        rate, between, tail = (median(column) for column in zip(*runs, strict=True))
        rows.append(
            {
                "placement": name, "output_tokens_per_s": rate, "chat_ms_between_tokens": between * 1e3,
                "chat_p99_ms_between_tokens": tail * 1e3,
            }
        )  # fmt: skip
    return rows


def _run(engine: Engine, load: MixedLoad) -> tuple[float, float, float]:
    source = random.Random(load.seed)
    vocabulary = engine.setup.model.vocab_size
    lengths = [load.context_len] * load.contexts
    lengths += [source.randint(load.chat_len // 2, load.chat_len * 3 // 2) for _ in range(load.chats)]
    params = SamplingParams(temperature=0, max_tokens=load.output_len, ignore_eos=True)
    for number, length in enumerate(lengths):
        engine.add_request(str(number), [source.randrange(vocabulary) for _ in range(length)], params)
    last: dict[str, float] = {}
    gaps: list[float] = []
    tokens = 0
    started = time.perf_counter()
    while engine.has_unfinished:
        for output in engine.step():
            now = time.perf_counter()
            tokens += 1
            if output.request_id in last and int(output.request_id) >= load.contexts:
                gaps.append(now - last[output.request_id])
            last[output.request_id] = now
    gaps.sort()
    return tokens / (time.perf_counter() - started), median(gaps), gaps[int(0.99 * (len(gaps) - 1))]
