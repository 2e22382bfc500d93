"""Requests of a trace as a simulation sees them: lengths, and page keys made of the trace's block ids.

It owns the reading and the keys; no token is ever made, and it must not know how a request is scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longspan.bench.serving.dataset import BLOCK_TOKENS, read_trace, trace_arrivals
from longspan.cache.prefix import Key, page_key, root_key
from longspan.config import require
from longspan.errors import ConfigError

_ROOT = root_key("simulated")


@dataclass(frozen=True)
class TraceRequest:
    """One request, `arrival_s` seconds after the first one. Equal block ids stand for equal tokens.

    Ids of blocks behind the last one given are not needed: a prompt that begins like no other shares nothing.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    blocks: tuple[int, ...]

    def page_keys(self, page_size: int) -> Iterator[Key]:
        """Content keys of the whole pages of the prompt, first page first."""
        parent = _ROOT
        for start in range(0, self.prompt_tokens - page_size + 1, page_size):
            stop = start + page_size
            blocks = self.blocks[start // BLOCK_TOKENS : -(-stop // BLOCK_TOKENS)]
            parent = page_key(parent, (start % BLOCK_TOKENS, *blocks))
            yield parent


def read_requests(
    path: str, most: int | None, time_scale: float, max_input_len: int | None = None
) -> list[TraceRequest]:
    """The first `most` requests of a trace, in order of arrival; gaps between them are `time_scale` times as long.

    Prompts longer than `max_input_len` are cut to it. Raises `ConfigError` naming line, field and what was expected.
    """
    for name, value in (("num_requests", most), ("max_input_len", max_input_len)):
        require(value is None or value >= 1, name, value, "must be at least 1", "give 1 or more, or leave it out")
    require(time_scale > 0, "time_scale", time_scale, "must be more than 0", "1 is the trace's own pace")
    try:
        rows = sorted(read_trace(Path(path), most or 1 << 62), key=lambda row: row.timestamp)
    except OSError as error:
        raise ConfigError("trace", path, f"cannot be read ({error.strerror})", "give the path of a trace file") from error
    except ConfigError as error:
        raise ConfigError("trace", error.value, error.problem, error.remedy) from error
    arrivals = trace_arrivals([row.timestamp for row in rows], 1 / time_scale)
    return [
        TraceRequest(number, arrival, min(row.input_length, max_input_len or row.input_length), row.output_length,
            tuple(row.hash_ids) or (-1 - number,))
        for number, (row, arrival) in enumerate(zip(rows, arrivals, strict=True))
    ]  # fmt: skip
