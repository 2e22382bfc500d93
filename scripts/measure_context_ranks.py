"""One rank and context ranks on one CPU machine, in turn: tokens a second of prefill, milliseconds of a decode step.

    python scripts/measure_context_ranks.py smollm2 --ranks 2 --schedules auto,gather_kv --contexts 2000,6000

Each contestant is a process that is alive all the time and waits while another one computes. After its prompt it takes
decode steps in bursts, so that neighbouring bursts see the same machine. Prints for each context the tokens a second of
the prefill, the least and the median step, and the median ratio of one rank's bursts to those beside them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

BURST = 12  # steps


def serve(model: str, ranks: int, schedule: str) -> None:
    """Be a contestant: for each line `start CONTEXT` or `steps COUNT` print its measurements."""
    from longspan.llm import LLM
    from longspan.request import SamplingParams

    options = {} if ranks == 1 else {"prefill_context_parallel_size": ranks, "schedule": schedule}
    engine = LLM(model, dtype="float32", enable_prefix_caching=False, **options).engine
    print("ready", flush=True)
    last = ""
    for number, line in enumerate(sys.stdin):
        what, count = line.split()
        if what == "start":
            engine.abort(last)  # the request of the context before
            last = str(number)
            prompt = [100 + (7 * i + i * i + 31 * number) % 20000 for i in range(int(count))]
            began = time.perf_counter()
            engine.add_request(last, prompt, SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True))
            while engine.progress(last)[0] < int(count):
                engine.step()
            print(int(count) / (time.perf_counter() - began), flush=True)
        else:
            seconds = []
            for _ in range(int(count)):
                began = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - began)
            print(*seconds, flush=True)


@dataclass
class Contestant:
    """A process that serves."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, line: str) -> list[float]:
        """What it prints for a line."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a contestant without pipes")
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return [float(number) for number in self.process.stdout.readline().split()]


def compare(contestants: list[Contestant], context: int, bursts: int) -> None:
    """Measure all of them at one context, and print it."""
    prefill = [one.ask(f"start {context}")[0] for one in contestants]
    steps: list[list[list[float]]] = [[] for _ in contestants]
    for _ in range(bursts):
        for one, found in zip(contestants, steps, strict=True):
            found.append(one.ask(f"steps {BURST}"))
    for one, speed, found in zip(contestants, prefill, steps, strict=True):
        every = [seconds * 1e3 for burst in found for seconds in burst]
        ratio = median(median(first) / median(own) for first, own in zip(steps[0], found, strict=True))
        print(
            f"{context:>7} {one.name:>14}: prefill {speed:6.0f} tokens/s, decode {min(every):6.1f} / "
            f"{median(every):6.1f} ms, speed {ratio:.2f} of one rank",
            flush=True,
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--schedules", default="auto", help="one contestant of RANKS ranks for each of them")
    parser.add_argument("--contexts", default="2000,4000,6000")
    parser.add_argument("--bursts", type=int, default=12)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.model, given.ranks, given.serve)
        return
    kinds = [("one rank", 1, "auto"), *((name, given.ranks, name) for name in given.schedules.split(","))]
    contestants = [
        Contestant(name, subprocess.Popen(
            [sys.executable, __file__, given.model, "--ranks", str(ranks), "--serve", schedule],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ))
        for name, ranks, schedule in kinds
    ]  # fmt: skip
    for one in contestants:
        if one.process.stdout is None or one.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{one.name} did not start")
    for context in given.contexts.split(","):
        compare(contestants, int(context), given.bursts)
    for one in contestants:
        one.process.communicate()


if __name__ == "__main__":
    main()
