"""The contestants of a comparison, each in a process of its own, so that neither's threads or memory touch the other's.

It owns those processes and what one timed run of each kind does; it must not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from longspan.config import EngineConfig
from longspan.errors import EngineError, LongspanError

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Timing:
    """One run: seconds until every request had its first token, and of the decode steps after it."""

    prefill_s: float
    decode_s: float
    decode_tokens: int


Runner = Callable[[Prompts, int], Timing]


@dataclass(frozen=True)
class LongspanSide:
    """This engine in one configuration."""

    config: EngineConfig

    def open(self) -> Runner:
        """Load the model; the engine lives as long as its process."""
        from longspan.bench.measure import run_batch
        from longspan.engine.engine import Engine
        from longspan.request import SamplingParams

        engine = Engine(self.config)

        def run(prompts: Prompts, output_len: int) -> Timing:
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            measured = run_batch(engine, prompts, params)
            return Timing(measured.ttft_s, measured.decode_s, measured.decode_tokens)

        return run


@dataclass(frozen=True)
class TransformersSide:
    """Hugging Face transformers on the same weights: one forward for the prompts, then a greedy loop over its cache."""

    config: EngineConfig
    num_threads: int

    def open(self) -> Runner:
        """Load the model."""
        import warnings

        import torch

        from longspan.bench.twin import transformers_twin
        from longspan.clock import now
        from longspan.engine.setup import resolve

        warnings.filterwarnings("ignore", module="transformers")  # of names that a release to come drops
        torch.set_num_threads(self.num_threads)
        setup = resolve(self.config)
        device = setup.device()
        model = transformers_twin(setup.source, setup.dtype).to(device)

        @torch.inference_mode()
        def run(prompts: Prompts, output_len: int) -> Timing:
            started = now(device)
            out = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            first = now(device)
            for _ in range(output_len - 1):
                out = model(tokens, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            return Timing(first - started, now(device) - first, len(prompts) * (output_len - 1))

        return run


class SideProcess:
    """A side in its own process. Use it in a `with` block; raises `EngineError` if the side fails."""

    def __init__(self, side: LongspanSide | TransformersSide) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side), daemon=True)
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Until the model is loaded."""
        self._receive()

    def run(self, prompts: Prompts, output_len: int) -> Timing:
        """One timed run."""
        self._pipe.send((prompts, output_len))
        timing: Timing = self._receive()
        return timing

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> SideProcess:
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


def _serve(pipe: Connection, side: LongspanSide | TransformersSide) -> None:
    try:
        run = side.open()
        pipe.send(None)
        while True:
            pipe.send(run(*pipe.recv()))
    except LongspanError as error:
        pipe.send(str(error))
    except (EOFError, KeyboardInterrupt):
        return
