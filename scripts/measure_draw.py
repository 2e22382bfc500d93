"""Microseconds of a draw in a graph, and whether two versions draw the same tokens.

    python scripts/measure_draw.py [--other NAME=SOURCE] [--batch 1,32] [--vocabulary 128256] [--device cuda]

Logits are bf16: flat ones, as a random model has them, those of a few likely tokens, and those of one. SOURCE is the
`src` folder of another version, as `git worktree add /tmp/old REVISION` makes one. Versions run in turn, each in a
process of its own; a time is the median of the rounds. Tokens are those of 64 positions a case. On a CPU the kernels
run in Triton's interpreter, which shows that the script works and nothing more. Prints a table to the standard error,
and one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_p": {"top_p": 0.95},
    "top_p 0.8": {"top_p": 0.8},
    "top_k": {"top_k": 50},
    "top_k, top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
}
DRAWS, POSITIONS = 20, 64


def all_logits(batch: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Logits bf16 [batch, vocabulary]."""
    flat = torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(batch))
    one = flat * 3
    one[:, vocabulary // 3] = 40.0
    return {name: logits.bfloat16().to(device) for name, logits in (("flat", flat), ("steep", flat * 3), ("one", one))}


def measure(batch: int, vocabulary: int, device: str) -> dict[str, dict[str, object]]:
    """By case, microseconds of a draw and a digest of tokens, of the version that is imported."""
    from longspan.engine.rank.sampling.gumbel import DrawParameters
    from longspan.engine.rank.sampling.kernels import draw
    from longspan.request import SamplingParams

    found: dict[str, dict[str, object]] = {}
    draws, steps = (DRAWS, POSITIONS) if device == "cuda" else (1, 2)
    positions = [torch.full((batch,), step, dtype=torch.int64, device=device) for step in range(steps)]
    for name, logits in all_logits(batch, vocabulary, device).items():
        for case, fields in CASES.items():
            params = SamplingParams(**fields)  # type: ignore[arg-type]
            parameters = None
            if case != "greedy":
                parameters = DrawParameters.of([params] * batch, range(batch), torch.device(device))
            tokens = [draw(logits, parameters, at)[0].cpu() for at in positions]
            digest = hashlib.sha256(torch.stack(tokens).numpy().tobytes()).hexdigest()[:16]

            def some(logits: Tensor = logits, parameters: DrawParameters | None = parameters) -> None:
                for at in positions[:draws]:
                    draw(logits, parameters, at)

            found[f"{batch:3} {name:6} {case}"] = {"us": timed(some, device) / draws, "tokens": digest}
    return found


def timed(some: Callable[[], None], device: str) -> float:
    """Microseconds of a call: of a replay of its graph on a GPU."""
    if device != "cuda":
        start = time.perf_counter()
        some()
        return (time.perf_counter() - start) * 1e6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        some()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph.replay()
    begin.record()
    for _ in range(20):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    took: float = begin.elapsed_time(end)
    return took * 1e3 / 20


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", default="")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        batches = [measure(int(batch), options.vocabulary, options.device) for batch in options.batch.split(",")]
        print(json.dumps({case: found for batch in batches for case, found in batch.items()}))
        return
    sources = {"this": str(Path(__file__).resolve().parents[1] / "src")}
    if options.other:
        name, _, source = options.other.partition("=")
        sources[name] = source
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in sources}
    for _ in range(options.rounds):
        for name, source in sources.items():
            paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            if options.device == "cpu":
                environment["TRITON_INTERPRET"] = "1"
            command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-3000:]}")
            rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    table = []
    for case in rounds["this"][0]:
        times = {name: median(one[case]["us"] for one in found) for name, found in rounds.items()}
        same = len({found[0][case]["tokens"] for found in rounds.values()}) == 1
        table.append({"case": case, **times, "same_tokens": same})
        shown = "  ".join(f"{name} {took:8.1f}" for name, took in times.items())
        print(f"{case:26} {shown}  {'' if same else 'OTHER TOKENS'}", file=sys.stderr)
    device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(json.dumps({"device": device, "vocabulary": options.vocabulary, "microseconds": table}))


if __name__ == "__main__":
    main()
