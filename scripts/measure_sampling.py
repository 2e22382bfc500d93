"""What sampling adds to a step: milliseconds of the device and of the host, greedy against sampled.

    python scripts/measure_sampling.py [--device cuda] [--batch 1,32,256] [--vocabulary 128256] [--repeats 50]

Rows keep their parameters from step to step, as in decoding. Device time is that of steps which were started one after
the other and not read (on a CPU it is the host's); host time is that of starting one. Prints a table and one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longspan.engine.rank.sampling.rows import SampleRow
from longspan.engine.rank.sampling.sampler import Sampler
from longspan.request import SamplingParams

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "top_k, top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "penalties": {"top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "logprobs": {"temperature": 0, "logprobs": 5},
}
PROMPT = list(range(1000))


def steps(sampler: Sampler, logits: Tensor, params: SamplingParams, first: int, count: int) -> list[float]:
    """Start `count` steps of the same rows, of which none is read; returns the host's seconds of each."""
    seconds = []
    for position in range(first, first + count):
        rows = [SampleRow(str(i), params, i, position, PROMPT, len(PROMPT)) for i in range(len(logits))]
        start = time.perf_counter()
        sampler.start(logits, rows)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(logits: Tensor, fields: dict[str, Any], repeats: int) -> dict[str, float]:
    """Milliseconds a step."""
    sampler, params = Sampler(), SamplingParams(**fields)
    steps(sampler, logits, params, 0, 5)  # compiles kernels
    if logits.device.type != "cuda":
        host = steps(sampler, logits, params, 5, repeats)
        return {"device_ms": median(host) * 1e3, "host_ms": median(host) * 1e3}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(200_000_000)  # the device is kept busy until all steps are launched, so the host's time is hidden
    begin.record()
    host = steps(sampler, logits, params, 5, repeats)
    end.record()
    torch.cuda.synchronize()
    return {"device_ms": begin.elapsed_time(end) / repeats, "host_ms": median(host) * 1e3}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    found = []
    for batch in map(int, options.batch.split(",")):
        generator = torch.Generator().manual_seed(batch)
        flat = torch.randn(batch, options.vocabulary, generator=generator)
        # a random model's logits, which are flat and of few values in bf16, and logits with a few likely tokens
        for name, logits in (("flat", flat.bfloat16().float()), ("steep", flat * 4)):
            there = logits.to(options.device)
            for case, fields in CASES.items():
                with torch.inference_mode():
                    times = measure(there, fields, options.repeats)
                found.append({"batch": batch, "logits": name, "case": case, **times})
                print(f"{batch:4} {name:6} {case:14} device {times['device_ms']:8.3f} host {times['host_ms']:8.3f}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(json.dumps({"device": device, "vocabulary": options.vocabulary, "milliseconds": found}))


if __name__ == "__main__":
    main()
