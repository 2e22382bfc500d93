"""The state of a server as one JSON object, for the live page.

It owns the object's format; the values come from the core, the output processor and the metrics.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from longspan.server.async_engine import AsyncEngine
from longspan.server.messages import CoreState, SequenceReport
from longspan.version import __version__

_SHOWN = 64


def state_of(engine: AsyncEngine, core: CoreState | None, model: str, started: float) -> dict[str, Any]:
    """The JSON object. `core` is None while there is no core. `started` is in `time.monotonic()`."""
    setup, metrics = engine.setup, engine.metrics
    drafts = metrics.load.scheduler.drafts
    parallel = setup.config.parallel
    requests = _requests(engine, core.sequences if core else [])
    return {
        "version": __version__,
        "model": model,
        "ready": engine.is_ready,
        "restarts": engine.restarts,
        "uptime_s": round(time.monotonic() - started, 1),
        "layout": {
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
            "decode_context_parallel_size": parallel.decode_context_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "executor": setup.config.executor,
            "page_size": setup.config.cache.page_size,
            "max_model_len": setup.max_model_len,
            "capacity_tokens": setup.capacity_tokens,
        },
        "shards": [
            {
                "shard": shard, "pcp": setup.grid.pcp_of_shard[shard], "pages": pages,
                "used": core.load.used_pages[shard] if core else 0,
            }
            for shard, pages in enumerate(setup.pages_per_shard)
        ],
        "schedules": [
            {"name": each.name, "moves": each.moves, "colour": each.colour, "sentence": each.sentence}
            for each in setup.schedules.values()
        ],
        "requests": requests[:_SHOWN],
        "requests_total": len(engine.output_processor),
        "cached_pages_by_shard": list(core.cached_pages) if core else [0] * len(setup.pages_per_shard),
        "steps": [{**asdict(step), "seconds": round(step.seconds, 5)} for step in (core.steps if core else [])],
        "totals": {
            **metrics.totals, "preemptions": metrics.load.scheduler.preemptions,
            "draft_steps": drafts.steps, "mean_acceptance_length": drafts.mean_length, "acceptance": drafts.rates,
            "bytes_by_schedule": core.bytes_by_label if core else {},
        },
        "history": list(metrics.history.points),
        "ended": metrics.history.recently_ended(),
        "errors": metrics.history.errors(),
    }  # fmt: skip


def _requests(engine: AsyncEngine, sequences: list[SequenceReport]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for report in sequences:
        output = engine.output_processor.request_of(report.request_id)
        if output is None:
            continue
        index = engine.output_processor.core_ids(output.request_id).index(report.request_id)
        arrived, first = engine.times(output.request_id)
        pages = [0] * len(engine.setup.pages_per_shard)
        for shard, count in report.runs:
            pages[shard] += count
        found.append(
            {
                "id": report.request_id,
                "status": "running" if report.running else "waiting",
                "prompt_tokens": len(output.prompt_token_ids),
                "output_tokens": len(output.outputs[index].token_ids),
                "computed_tokens": report.computed_tokens,
                "cached_tokens": output.num_cached_tokens,
                "age_s": round(time.monotonic() - arrived, 2),
                "ttft_s": None if first is None else round(first - arrived, 3),
                "pages_by_shard": pages,
                "runs": report.runs,
            }
        )
    return found
