"""Steps of one engine on a GPU: milliseconds, how long the device is busy in them, and with which kernels.

    python scripts/measure_steps.py MODEL [OPTION=VALUE ...] [--cases 1x1024,32x2048] [--prefill 32768] [--kernels 12]

For each case (batch x context): a greedy step and one at temperature 1 and top_p 0.95, beside the floor: the bytes of
weights and cached tokens at the rate at which kernels read memory. Then the time to the first token of short prompts,
and the rate of a long prefill. With `--kernels` a second engine, whose rank is a thread of this process, is traced for
100 greedy steps of each case. The device idles for what a step takes longer than it is busy there. OPTIONs are keywords
of `LLM`. It uses public names only, so that it can run an older version too (PYTHONPATH). Prints lines for people on
stderr and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longspan import LLM, SamplingParams

_STEPS = 100
_SHORT = 30  # tokens of a short prompt
_REPEATS = 5


class Steps:
    """The steps of one engine."""

    def __init__(self, llm: LLM, vocab: int) -> None:
        self._llm = llm
        self._vocab = vocab
        self._seed = 0

    def prompts(self, batch: int, tokens: int) -> list[list[int]]:
        """Prompts that no earlier call has returned."""
        self._seed += 1
        return [
            [(self._seed * 104729 + row * 7919 + at * 31) % (self._vocab - 200) + 100 for at in range(tokens)]
            for row in range(batch)
        ]

    def seconds(self, prompts: Sequence[Sequence[int]], count: int, temperature: float = 0.0) -> float:
        """Seconds to generate `count` tokens for each prompt."""
        params = SamplingParams(max_tokens=count, temperature=temperature, top_p=0.95, ignore_eos=True)
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._llm.generate(prompts, params)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def step_ms(self, prompts: Sequence[Sequence[int]], temperature: float) -> float:
        """Milliseconds of a decode step, of prompts that are cached: the median of three differences."""
        self.seconds(prompts, 4, temperature)
        found = [
            self.seconds(prompts, _STEPS + 1, temperature) - self.seconds(prompts, 1, temperature) for _ in range(3)
        ]
        return median(found) / _STEPS * 1e3

    def trace(self, prompts: Sequence[Sequence[int]], temperature: float = 0.0) -> dict[str, Any]:
        """What the device does in decode steps: kernels a step, busy milliseconds, share of idle time."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.seconds(prompts, _STEPS + 1, temperature)
        kernels = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in profiled.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        kernels = kernels[len(kernels) // 10 :]  # the beginning is the prefill
        busy, until = 0.0, kernels[0][0]
        for start, end, _ in kernels:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        steps = _STEPS * 0.9
        time_of: Counter[str] = Counter()
        count_of: Counter[str] = Counter()
        for start, end, name in kernels:
            time_of[name[:80]] += end - start
            count_of[name[:80]] += 1
        return {
            "busy_ms": busy / steps / 1e3, "kernels": len(kernels) / steps,
            "by_kernel": [
                {"name": name, "ms": spent / steps / 1e3, "count": count_of[name] / steps}
                for name, spent in time_of.most_common(40)
            ],
        }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cases", default="1x1024,32x2048")
    parser.add_argument("--prefill", type=int, default=32768)
    parser.add_argument("--kernels", type=int, default=0, help="kernels to print for each case; 0: no trace")
    parser.add_argument("--read-tb-s", type=float, default=3.0, help="the rate at which kernels read memory")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    options = parser.parse_args()
    keywords = {name: json.loads(value) for name, value in (each.split("=", 1) for each in options.options)}
    config = json.loads((Path(options.model) / "config.json").read_text())
    weights = sum(path.stat().st_size for path in Path(options.model).glob("*.safetensors"))
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": []}
    cases = [tuple(map(int, case.split("x"))) for case in options.cases.split(",")]
    started = time.perf_counter()
    with LLM(options.model, **keywords) as llm:
        report["start_s"] = time.perf_counter() - started
        steps = Steps(llm, config["vocab_size"])
        first = [steps.seconds(steps.prompts(1, _SHORT), 1) * 1e3 for _ in range(_REPEATS)]
        report["short_ttft_ms"] = {"first": first[0], "median_of_next": median(first[1:])}
        firsts = ", ".join(f"{each:.1f}" for each in first)
        _say(f"start {report['start_s']:.1f} s; first token of {_SHORT} tokens: {firsts} ms")
        for batch, context in cases:
            floor = (weights + batch * (context + _STEPS // 2) * _bytes_per_token(config)) / options.read_tb_s / 1e9
            report["cases"].append(_case(steps, batch, context, floor))
        if options.prefill:
            rates = [options.prefill / steps.seconds(steps.prompts(1, options.prefill), 1) for _ in range(2)]
            report["prefill_tokens_per_s"] = {"tokens": options.prefill, "rate": max(rates), "first": rates[0]}
            _say(f"prefill of {options.prefill}: {', '.join(f'{rate:,.0f}' for rate in rates)} tokens/s")
    if options.kernels:
        with LLM(options.model, **{**keywords, "executor": "threads"}) as llm:
            steps = Steps(llm, config["vocab_size"])
            for row in report["cases"]:
                _trace(steps, row, options.kernels)
    print(json.dumps(report))


def _case(steps: Steps, batch: int, context: int, floor: float) -> dict[str, Any]:
    prompts = steps.prompts(batch, context)
    steps.seconds(prompts, 1)
    greedy, sampled = (steps.step_ms(prompts, temperature) for temperature in (0.0, 1.0))
    _say(
        f"batch {batch} x {context}: greedy {greedy:.3f} ms, {greedy / floor:.2f} of the floor {floor:.3f}; sampled "
        f"{sampled:.3f} ms ({sampled / greedy:.3f})"
    )
    return {
        "batch": batch, "context": context, "floor_ms": floor, "greedy_ms": greedy, "sampled_ms": sampled,
        "over_floor": greedy / floor, "sampled_over_greedy": sampled / greedy,
    }  # fmt: skip


def _trace(steps: Steps, row: dict[str, Any], kernels: int) -> None:
    prompts = steps.prompts(row["batch"], row["context"])
    steps.seconds(prompts, 4)
    row.update(steps.trace(prompts))
    row["idle_share"] = max(0.0, 1 - row["busy_ms"] / row["greedy_ms"])
    _say(
        f"batch {row['batch']} x {row['context']}: device busy {row['busy_ms']:.3f} ms, idle {row['idle_share']:.1%}, "
        f"{row['kernels']:.0f} kernels a step"
    )
    for kernel in row["by_kernel"][:kernels]:
        _say(f"   {kernel['ms']:8.4f} ms {kernel['count']:6.1f} x {kernel['name']}")


def _bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes of a cached token in 16 bits."""
    layers = config["num_hidden_layers"]
    if "kv_lora_rank" in config:
        return int(2 * layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]))
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * 2 * layers * config["num_key_value_heads"] * dim)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
