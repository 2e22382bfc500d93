"""The contestants of a comparison. Each has a process, so that they do not share threads or memory.

It owns those processes and what one timed run of each contestant does; it must not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from longspan.config import EngineConfig
from longspan.errors import EngineError, LongspanError
from longspan.scheduler.acceptance import DraftCounts

_PATIENCE_S = 10.0
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ContestantTiming:
    """The times of one run."""

    # seconds until every request had its first token
    prefill_s: float
    # seconds of the decode steps after that
    decode_s: float
    # tokens generated in `decode_s`, of all requests
    decode_tokens: int
    # its drafts
    drafts: DraftCounts = field(default_factory=DraftCounts)


Runner = Callable[[Prompts, int], ContestantTiming]


@dataclass(frozen=True)
class LongspanContestant:
    """Longspan in one configuration."""

    # model, layout and options
    config: EngineConfig

    def open(self) -> Runner:
        """Load the model and return the function for one timed run. The engine is not shut down before its process."""
        from longspan.bench.measure import run_batch
        from longspan.engine.engine import Engine
        from longspan.request import SamplingParams

        engine = Engine(self.config)

        def run(prompts: Prompts, output_len: int) -> ContestantTiming:
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            before = engine.stats().scheduler.drafts
            measured = run_batch(engine, prompts, params)
            drafts = engine.stats().scheduler.drafts.since(before)
            return ContestantTiming(measured.ttft_s, measured.decode_s, measured.decode_tokens, drafts)

        return run


@dataclass(frozen=True)
class TransformersContestant:
    """Hugging Face transformers on the same weights: one forward pass for the prompts, then greedy decoding."""

    # names model, dtype and device
    config: EngineConfig
    # CPU threads
    num_threads: int

    def open(self) -> Runner:
        """Load the model and return the function for one timed run."""
        import torch

        from longspan.bench.reference import cache_name, transformers_reference
        from longspan.clock import now
        from longspan.engine.setup import resolve

        torch.set_num_threads(self.num_threads)
        setup = resolve(self.config)
        device = setup.device()
        model = transformers_reference(setup.source, setup.dtype).to(device)
        cache = cache_name(model)

        @torch.inference_mode()
        def run(prompts: Prompts, output_len: int) -> ContestantTiming:
            started = now(device)
            out = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            first = now(device)
            for _ in range(output_len - 1):
                out = model(tokens, **{cache: out[cache]}, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            return ContestantTiming(first - started, now(device) - first, len(prompts) * (output_len - 1))

        return run


class ContestantProcess:
    """A contestant in its own process, to be used in a `with` block. Raises `EngineError` if the contestant fails."""

    def __init__(self, side: LongspanContestant | TransformersContestant) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side), daemon=True)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Wait until the model is loaded."""
        self._receive()

    def run(self, prompts: Prompts, output_len: int) -> ContestantTiming:
        """Run the prompts once, with `output_len` tokens each, and return the times."""
        self._pipe.send((prompts, output_len))
        timing: ContestantTiming = self._receive()
        return timing

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # it ends by itself once it has read that, and cleans up
        self._process.join(_PATIENCE_S)
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise EngineError("a benchmark process ended unexpectedly; its message is above") from None
        if isinstance(answer, str):
            raise EngineError(answer)
        return answer


def _serve(pipe: Connection, side: LongspanContestant | TransformersContestant) -> None:
    try:
        run = side.open()
        pipe.send(None)
        while True:
            pipe.send(run(*pipe.recv()))
    except LongspanError as error:
        pipe.send(str(error))
    except (EOFError, KeyboardInterrupt):
        return
