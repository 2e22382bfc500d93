"""The main job on real input: a question about a long text, its context spread over two ranks.

The text is this project's own documents (about 6,000 tokens); the model is SmolLM2-135M-Instruct from the package that
`make install` brings. Run it with `make demo`.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from longspan import LLM, RequestOutput, SamplingParams
from longspan.cache.pages import PageRef

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("docs/architecture.md", "docs/invariants.md", "LICENSE")
QUESTION = "What is the name of the engine this text describes, and what does it shard?"
COLOURS = ("cyan", "magenta", "yellow", "green")
CHART_WIDTH = 64


def build_prompt(llm: LLM) -> list[int]:
    """The documents and the question as a conversation."""
    text = "\n\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    return llm.chat_prompt([{"role": "user", "content": f"{text}\n\n{QUESTION}"}])


def ask(llm: LLM, prompt: list[int], console: Console) -> tuple[RequestOutput, list[PageRef], float, float]:
    """Stream the answer; returns it with its page table, the time to the first token and the decode rate."""
    params = SamplingParams(max_tokens=80, temperature=0)
    columns = (
        TextColumn("reading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    started = time.perf_counter()
    engine = llm.engine
    engine.add_request("question", prompt, params)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prefill", total=len(prompt))
        outputs: list[RequestOutput] = []
        while not outputs:
            outputs = engine.step()
            progress.update(task, completed=len(prompt) if outputs else engine.progress("question")[0])
    first = time.perf_counter()
    console.print(f"\n[bold]{QUESTION}[/bold]")
    shown, output = "", outputs[0]
    pages: list[PageRef] = []
    while True:
        console.print(output.outputs[0].text[len(shown) :], end="", highlight=False, markup=False)
        shown = output.outputs[0].text
        if output.finished:
            break
        pages = engine.pages("question")
        output = next(o for o in engine.step() if o.request_id == "question")
    console.print("\n")
    decode_seconds = time.perf_counter() - first
    return output, pages, first - started, (len(output.outputs[0].token_ids) - 1) / decode_seconds


def chart(pages: list[PageRef], shards: int) -> Table:
    """Where the context's pages live: one row a shard, the context from left to right."""
    table = Table(title="Where the context lives", show_header=True, header_style="bold")
    table.add_column("rank")
    table.add_column("context, first token to last (one cell: a few pages)")
    table.add_column("pages", justify="right")
    width = min(CHART_WIDTH, len(pages))
    cuts = [round(len(pages) * cell / width) for cell in range(width + 1)]
    for shard in range(shards):
        row = Text()
        for start, stop in pairwise(cuts):
            mine = sum(page.shard == shard for page in pages[start:stop])
            full = mine * 2 > stop - start
            row.append("█" if full else "▒" if mine else "·", style=COLOURS[shard % len(COLOURS)] if mine else "dim")
        table.add_row(str(shard), row, str(sum(page.shard == shard for page in pages)))
    return table


def main() -> None:
    """Read, ask, show."""
    console = Console()
    ranks = 2
    with console.status(f"loading SmolLM2-135M on {ranks} context-parallel ranks"):
        llm = LLM("smollm2", prefill_context_parallel_size=ranks, max_num_batched_tokens=1024)
    with llm:
        prompt = build_prompt(llm)
        stats = llm.stats()
        console.print(
            f"KV cache: {stats.capacity_tokens:,} tokens in pages of {stats.page_size} on {ranks} shards; "
            f"the prompt has {len(prompt):,} tokens"
        )
        output, pages, ttft, decode_rate = ask(llm, prompt, console)
        console.print(chart(pages, ranks))
        stats = llm.stats()
        table = Table(title="What travelled between the ranks, and how fast it went", header_style="bold")
        for column in ("prefill schedule", "decode schedule", "bytes", "collectives", "prefill", "decode"):
            table.add_column(column)
        table.add_row(
            stats.prefill_schedule,
            stats.decode_schedule,
            f"{sum(stats.traffic.bytes_by_label.values()):,}",
            f"{sum(stats.traffic.calls_by_label.values()):,}",
            f"{len(prompt) / ttft:,.0f} tokens/s",
            f"{decode_rate:,.1f} tokens/s",
        )
        console.print(table)
        console.print(f"finished: {output.outputs[0].finish_reason}")


if __name__ == "__main__":
    main()
