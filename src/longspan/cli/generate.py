"""`longspan generate`: completes one prompt and prints the completion, as text or as one JSON object.

It owns reading the prompt and printing the result. Only the result goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longspan.cli.explain import constants_line
from longspan.cli.options import Json
from longspan.config import EngineConfig, parse_integers
from longspan.errors import ConfigError, RequestError
from longspan.parallel.trace import COMPUTE, STEP, TRANSFER, TraceSpan, chrome_trace, overlap
from longspan.request import CompletionOutput, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from longspan.bench.measure import Measured
    from longspan.engine.driver.core import EngineStats
    from longspan.engine.setup import EngineSetup
    from longspan.llm import LLM

PromptText = Annotated[str | None, typer.Option("--prompt", help="text of the prompt")]
PromptFile = Annotated[str | None, typer.Option("--prompt-file", help="UTF-8 file with the prompt; - is stdin")]
PromptIds = Annotated[str | None, typer.Option("--prompt-ids", help="token ids of the prompt, as in 1,2,3")]
Chat = Annotated[bool, typer.Option("--chat", help="wrap the prompt in the model's chat template")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="maximum tokens to generate")]
Temperature = Annotated[float, typer.Option("--temperature", help="sampling temperature; 0 is greedy")]
TopP = Annotated[
    float, typer.Option("--top-p", help="sample from the fewest tokens that have this probability together")
]
TopK = Annotated[int, typer.Option("--top-k", help="sample from this many most likely tokens; 0 is all")]
MinP = Annotated[float, typer.Option("--min-p", help="minimum probability, relative to that of the most likely token")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="stop string; may be given several times")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="do not stop at the model's end token")]
TraceFile = Annotated[str | None, typer.Option("--trace", help="file for a Chrome trace of all ranks")]
Completions = Annotated[int, typer.Option("--n", help="number of completions")]


def generate(
    config: EngineConfig,
    prompt: PromptText = None,
    prompt_file: PromptFile = None,
    prompt_ids: PromptIds = None,
    chat: Chat = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    n: Completions = 1,
    trace: TraceFile = None,
    as_json: Json = False,
) -> None:
    """Complete one prompt."""
    params = SamplingParams(
        n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        stop=tuple(stop or ()), ignore_eos=ignore_eos,
    )  # fmt: skip
    given = _given_prompt(prompt, prompt_file, prompt_ids)
    if trace is not None:
        _require_writable(trace)
        config = replace(config, trace=True)
    from longspan.llm import LLM  # imports PyTorch, so options are checked first

    console = Console(stderr=True)
    with console.status(f"loading {config.model}"):
        llm = LLM.from_config(config)
    with llm:
        tokens = _tokens(llm, given, chat)
        console.print(kv_cache_line(llm.engine.setup), highlight=False, soft_wrap=True)
        if llm.engine.executor.constants:
            console.print(constants_line(llm.engine.core.constants), highlight=False, soft_wrap=True)
        for note in llm.engine.setup.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        measured = run_with_progress(llm, tokens, params, console, streaming=not as_json and n == 1)
        stats = llm.stats()
        if trace is not None:
            console.print(_write_trace(trace, llm.engine.executor.trace()), highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_report(measured, stats)))
        return
    if n > 1:
        for completion in measured.outputs[0].outputs:
            print(f"[{completion.index}] {_shown(completion, llm.tokenizer is not None)}")
    console.print(_summary(measured, stats), highlight=False, soft_wrap=True)


def _require_writable(path: str) -> None:
    """Raise `ConfigError` if the trace file cannot be written, before the model is loaded."""
    try:
        Path(path).touch()
    except OSError as error:
        raise ConfigError("trace", path, f"cannot be written ({error.strerror})", "give another path") from error


def _write_trace(path: str, spans_of_rank: dict[int, list[TraceSpan]]) -> str:
    """Write the Chrome trace; returns a summary: seconds of steps, compute and transfers, and their overlap."""
    Path(path).write_text(json.dumps(chrome_trace(spans_of_rank)))
    spans = [span for spans in spans_of_rank.values() for span in spans]
    parts = {lane: sum(s.stop - s.start for s in spans if s.lane == lane) for lane in (COMPUTE, TRANSFER, STEP)}
    both = sum(overlap(spans) for spans in spans_of_rank.values())
    return (
        f"trace: {len(spans):,} spans in {path}; sums over all ranks: {parts[STEP]:.2f} s of steps; rings: "
        f"{parts[COMPUTE]:.2f} s of compute and {parts[TRANSFER]:.2f} s of transfers, of which {both:.2f} s overlap"
    )


def kv_cache_line(setup: EngineSetup) -> str:
    """The size of the KV cache, and how many requests of maximum length fit into it, in one line."""
    shards = " + ".join(f"{pages:,}" for pages in setup.pages_per_shard)
    tokens, longest = setup.capacity_tokens, setup.max_model_len
    return (
        f"KV cache size: {tokens:,} tokens (pages of {setup.config.cache.page_size}: {shards}); maximum concurrency "
        f"for {longest:,} tokens per request: {tokens / longest:.2f}x"
    )


def run_with_progress(
    llm: LLM, tokens: list[int], params: SamplingParams, console: Console, streaming: bool
) -> Measured:
    """Run one request with a progress bar for its prefill. With `streaming`, print its text as it is generated."""
    from longspan.bench.measure import run_batch

    printer = _Printer(llm.tokenizer is not None)
    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("prefill", total=len(tokens))

        def on_output(output: RequestOutput) -> None:
            if not progress.finished:
                progress.update(task, completed=len(tokens))
                progress.stop()
            if streaming:
                printer.show(output)

        measured = run_batch(
            llm.engine, [tokens], params, lambda done, _: progress.update(task, completed=done), on_output
        )
    if streaming:
        print(flush=True)
    return measured


class _Printer:
    """Prints the new part of a growing text."""

    def __init__(self, has_text: bool) -> None:
        self._has_text = has_text
        self._printed = 0

    def show(self, output: RequestOutput) -> None:
        text = _shown(output.outputs[0], self._has_text)
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)


def _shown(completion: CompletionOutput, has_text: bool) -> str:
    """The text of a completion; without a tokenizer its token ids."""
    return completion.text if has_text else " ".join(str(token) for token in completion.token_ids)


def _given_prompt(prompt: str | None, prompt_file: str | None, prompt_ids: str | None) -> str | list[int]:
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompt-ids": prompt_ids}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise RequestError(
            "prompt", f"{len(given)} given", "exactly one is needed", f"give one of {', '.join(sources)}"
        )
    if prompt_ids is not None:
        return list(parse_integers("prompt_ids", prompt_ids))
    text = _read(prompt_file) if prompt_file is not None else prompt or ""
    if not text:
        raise RequestError("prompt", repr(text), f"from {given[0]} is empty", "give at least one character")
    return text


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError("prompt_file", name, f"cannot be read ({reason})", "give a UTF-8 text file") from error


def _tokens(llm: LLM, given: str | list[int], chat: bool) -> list[int]:
    if isinstance(given, str):
        return llm.chat_prompt([{"role": "user", "content": given}]) if chat else llm.encode(given)
    if chat:
        raise RequestError("chat", chat, "needs a prompt of text", "use it with --prompt or --prompt-file")
    return given


def _report(measured: Measured, stats: EngineStats) -> dict[str, Any]:
    output = measured.outputs[0]
    first = output.outputs[0]
    report: dict[str, Any] = {
        "text": first.text,
        "token_ids": first.token_ids,
        "prompt_tokens": len(output.prompt_token_ids),
        "finish_reason": first.finish_reason,
        "kv": {
            "page_size": stats.page_size,
            "capacity_tokens": stats.capacity_tokens,
            "pages_per_shard": stats.pages_per_shard,
            "used_pages_per_shard": stats.peak_pages_per_shard,
        },
        "schedule": {"prefill": stats.prefill_schedule, "decode": stats.decode_schedule},
        "timing": {"ttft_s": measured.ttft_s, "decode_tokens_per_s": measured.decode_tokens_per_s},
        "comm": {
            "bytes": sum(stats.traffic.bytes_by_label.values()),
            "calls": sum(stats.traffic.calls_by_label.values()),
            "by_label": stats.traffic.bytes_by_label,
        },
    }
    if len(output.outputs) > 1:
        report["completions"] = [asdict(completion) for completion in output.outputs]
    return report


def _summary(measured: Measured, stats: EngineStats) -> str:
    rate = measured.decode_tokens_per_s
    decode = f"decode {rate:,.1f} tokens/s" if rate else "no decode steps"
    return (
        f"{measured.prompt_tokens:,} prompt tokens, first token after {measured.ttft_s:.2f} s "
        f"({measured.prefill_tokens_per_s:,.0f} tokens/s), {decode}; schedules: {stats.prefill_schedule} (prefill), "
        f"{stats.decode_schedule} (decode); {sum(stats.traffic.bytes_by_label.values()):,} bytes sent between ranks; "
        f"finished: {measured.outputs[0].outputs[0].finish_reason}"
    )
