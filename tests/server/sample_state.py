"""A lively state for trials of the live page, of an engine with an added schedule; it owns invented figures."""

import math
from typing import Any

from longspan.attention.schedules import SCHEDULES

State = dict[str, Any]
SHARDS = 4
ADDED = {"name": "pigeon_kv", "moves": "keys", "colour": "#123456", "sentence": "keys fly"}
PAGES = 1500
ENDED_ID = "r7.7"
HOSTILE_ID = "<img src=x onerror=\"document.body.dataset.broken='yes'\">"


def request(
    name: str, prompt: int, output: int, computed: int, runs: list[list[int]], cached: int = 0, status: str = "running"
) -> State:
    """One request as `/internal/state` tells it; `runs` are (shard, pages) in the order of positions."""
    pages = [sum(count for shard, count in runs if shard == mine) for mine in range(SHARDS)]
    return {
        "id": name, "status": status, "prompt_tokens": prompt, "output_tokens": output, "computed_tokens": computed,
        "cached_tokens": cached, "age_s": 1.5 + prompt / 900, "ttft_s": 0.2 + prompt / 1500 if output else None,
        "pages_by_shard": pages, "runs": runs,
    }  # fmt: skip


def zigzag(pages: int) -> list[list[int]]:
    """A long prompt: shard 0 takes its first and its last part, shard 1 the second and the last but one, and so on."""
    return [[shard, pages] for shard in [*range(SHARDS), *reversed(range(SHARDS))]]


def step(index: int) -> State:
    """A step of a mixed load: every sixth only decodes, short contexts stay local."""
    prefill = 0 if index % 6 == 5 else 512
    return {
        "step": 900 + index, "decode_rows": 5, "prefill_tokens": prefill,
        "decode_schedule": ("gather_q", "ring_q", "tree_q", "gather_q_rs")[index // 16],
        "prefill_schedule": ("ring_kv", ADDED["name"], "local")[index // 4 % 3],
        "seconds": 0.03 + (0.12 + 0.05 * math.sin(index / 3) if prefill else 0.0),
    }  # fmt: skip


def second(t: int) -> State:
    """One second of the history."""
    return {
        "t": 1000.0 + t, "output_tokens_per_s": 42 + 18 * math.sin(t / 9) + 6 * math.sin(t * 1.7),
        "prompt_tokens_per_s": max(0.0, 700 * math.sin(t / 14)), "running": 3 + t // 30, "waiting": max(0, t // 20 - 4),
        "ttft_median_s": 0.84, "ttft_p95_s": 2.1, "itl_median_s": 0.041, "itl_p95_s": 0.12,
    }  # fmt: skip


def lively() -> State:
    """Long, short, half-read, waiting and hostile requests on four shards."""
    requests = [
        request("cmpl-7d21f0a9c3", 32000, 212, 32212, [*zigzag(62), *zigzag(62), *zigzag(62), *zigzag(62), [2, 14]]),
        request("cmpl-9b3e55d210", 11200, 64, 11264, [[1, 40], *zigzag(83)], cached=640),
        request("chatcmpl-short", 420, 37, 457, [[1, 29]]),
        request("chatcmpl-tiny", 130, 5, 135, [[3, 9]]),
        request("cmpl-2c88e1b7f4", 20000, 0, 9216, [*zigzag(36), *zigzag(36)], cached=2048),
        request(HOSTILE_ID, 900, 18, 918, [[2, 26], [3, 32]]),
        request("cmpl-e07f12aa55", 18000, 0, 0, [], status="waiting"),
        request("chatcmpl-queue", 300, 0, 0, [], status="waiting"),
    ]
    used = [sum(r["pages_by_shard"][shard] for r in requests) for shard in range(SHARDS)]
    return {
        "version": "0.1.0", "model": "smollm2", "ready": True, "restarts": 1, "uptime_s": 4523.4,
        "layout": {
            "tensor_parallel_size": 2, "prefill_context_parallel_size": 2, "decode_context_parallel_size": 2,
            "pipeline_parallel_size": 1, "executor": "processes", "page_size": 16, "max_model_len": 65536,
            "capacity_tokens": 16 * PAGES * SHARDS,
        },
        "shards": [{"shard": n, "pcp": n // 2, "pages": PAGES, "used": used[n]} for n in range(SHARDS)],
        "schedules": [
            *(
                {"name": one.name, "moves": one.moves, "colour": one.colour, "sentence": one.sentence}
                for one in SCHEDULES.values()
            ),
            ADDED,
        ],
        "requests": requests, "requests_total": len(requests), "cached_pages_by_shard": [180, 90, 240, 120],
        "steps": [step(index) for index in range(60)],
        "totals": {
            "prompt_tokens": 812345, "output_tokens": 98765, "requests": 431, "preemptions": 2,
            "draft_steps": 900, "mean_acceptance_length": 2.345, "acceptance": [0.81, 0.523],
            "prefix_cached_tokens": 120320, "bytes_by_schedule": {"gather_q": 48_300_000, "ring_kv": 2_130_000_000},
        },
        "history": [second(t) for t in range(120)],
        "ended": [
            {
                "id": ENDED_ID, "reason": "length", "prompt_tokens": 700, "cached_tokens": 128, "output_tokens": 64,
                "ttft_s": 0.31, "e2e_s": 2.75, "ago_s": 4.2,
            },
            {
                "id": "r8.0", "reason": "abort", "prompt_tokens": 90, "cached_tokens": 0, "output_tokens": 3,
                "ttft_s": 0.2, "e2e_s": 0.4, "ago_s": 9.0,
            },
        ],
        "errors": [
            {
                "status": 400, "method": "POST", "path": "/v1/completions", "ago_s": 12.0,
                "reason": "max_tokens: must not be negative",
            }
        ],
    }  # fmt: skip


def empty() -> State:
    """A server that has just started: ranks are ready, and nobody has asked anything."""
    state = lively()
    shards = [{**shard, "used": 0} for shard in state["shards"]]
    totals = dict.fromkeys(("prompt_tokens", "output_tokens", "requests", "preemptions", "prefix_cached_tokens"), 0)
    quiet = {"requests": [], "requests_total": 0, "cached_pages_by_shard": [0] * SHARDS, "steps": [], "history": [],
             "ended": [], "errors": []}  # fmt: skip
    return {**state, **quiet, "shards": shards, "totals": {**totals, "bytes_by_schedule": {}}, "restarts": 0}
