"""Prefill and decode rates of one batch, for one contestant or for several in turn.

It owns the order of the runs and the statistics; it must not know how a contestant runs a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from longspan.bench.contestants import ContestantProcess, ContestantTiming, LongspanContestant, TransformersContestant
from longspan.scheduler.acceptance import DraftCounts

_SAFE_FIRST_TOKEN = 100  # ids below are control tokens in many vocabularies


@dataclass(frozen=True)
class BatchLoad:
    """The batch that is run."""

    # tokens of each prompt
    input_len: int
    # tokens to generate for each
    output_len: int
    # number of prompts
    batch_size: int
    # runs that are counted
    iterations: int
    # runs before them that are not counted
    warmup: int
    # seed of the prompts' random tokens
    seed: int
    # random token ids are below this
    vocab_size: int

    def prompts(self, number: int) -> list[list[int]]:
        """The prompts of run `number`, different for each run."""
        generator = random.Random(self.seed + number)
        first = min(_SAFE_FIRST_TOKEN, self.vocab_size - 1)
        return [
            [generator.randrange(first, self.vocab_size) for _ in range(self.input_len)] for _ in range(self.batch_size)
        ]


def run_latency(
    load: BatchLoad,
    contestants: Mapping[str, LongspanContestant | TransformersContestant],
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Rates of every contestant, and the ratios of the first one's rates to those of each other one.

    Contestants run in turn (A B A B) on the same tokens. A ratio is the median of the ratios of neighbouring runs, so a
    slow drift of the machine's speed does not change it.
    """
    timings: dict[str, list[ContestantTiming]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ContestantProcess(side)) for name, side in contestants.items()}
        for name, process in processes.items():
            on_progress(f"loading {name}")
            process.wait_ready()
        for number in range(load.warmup + load.iterations):
            for name, process in processes.items():
                on_progress(f"{name}: run {number + 1} of {load.warmup + load.iterations}")
                timing = process.run(load.prompts(number), load.output_len)
                if number >= load.warmup:
                    timings[name].append(timing)
    tokens = load.batch_size * load.input_len
    report: dict[str, Any] = {name: _rates(tokens, runs) for name, runs in timings.items()}
    first, *others = timings
    if others:
        report["ratio"] = {other: _ratio(timings[first], timings[other]) for other in others}
    return report


def _rates(prompt_tokens: int, runs: list[ContestantTiming]) -> dict[str, Any]:
    drafts = DraftCounts()
    for run in runs:
        drafts = drafts.plus(run.drafts)
    rates: dict[str, Any] = {
        "ttft_s": _spread([run.prefill_s for run in runs]),
        "prefill_tokens_per_s": _spread([prompt_tokens / run.prefill_s for run in runs]),
        "decode_tokens_per_s": _spread([run.decode_tokens / run.decode_s for run in runs if run.decode_tokens]),
    }
    if drafts.steps:
        rates["speculation"] = {"mean_acceptance_length": drafts.mean_length, "acceptance_by_position": drafts.rates}
    return rates


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def _ratio(ours: list[ContestantTiming], theirs: list[ContestantTiming]) -> dict[str, float | None]:
    pairs = list(zip(ours, theirs, strict=True))
    decode = [b.decode_s / b.decode_tokens * a.decode_tokens / a.decode_s for a, b in pairs if a.decode_tokens]
    return {
        "prefill": median(b.prefill_s / a.prefill_s for a, b in pairs),
        "decode": median(decode) if decode else None,
    }
