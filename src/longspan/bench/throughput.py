"""Requests and tokens per second of continuous batching under a random load.

It owns the load and the counting; it uses the engine's public interface only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from longspan.engine.engine import Engine
from longspan.request import SamplingParams

_SPREAD = 0.5  # lengths are uniform within ±50 % of the mean


def run_throughput(
    engine: Engine, num_prompts: int, input_len: int, output_len: int, seed: int, on_done: Callable[[int], None]
) -> dict[str, Any]:
    """Queue all requests at once and run them to the end. `on_done` is called with the number that have finished."""
    generator = random.Random(seed)
    vocab = engine.setup.model.vocab_size

    def around(mean: int) -> int:
        return max(1, round(mean * generator.uniform(1 - _SPREAD, 1 + _SPREAD)))

    lengths = [(around(input_len), around(output_len)) for _ in range(num_prompts)]
    for number, (prompt_len, max_tokens) in enumerate(lengths):
        prompt = [generator.randrange(vocab) for _ in range(prompt_len)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(f"load-{number}", prompt, params)
    started, finished = time.perf_counter(), 0
    while engine.has_unfinished:
        finished += sum(output.finished for output in engine.step())
        on_done(finished)
    seconds = time.perf_counter() - started
    prompt_tokens, output_tokens = (sum(column) for column in zip(*lengths, strict=True))
    return {
        "requests": num_prompts,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "seconds": seconds,
        "requests_per_s": num_prompts / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
        "preemptions": engine.stats().scheduler.preemptions,
    }
