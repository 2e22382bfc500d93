"""The requests of a trace for a simulation: arrivals, lengths, and page keys made from the trace's block ids.

It owns the reading and the keys; requests have no tokens, and it must not know how they are scheduled.
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
    """One request of a trace."""

    number: int  # position in order of arrival
    arrival_s: float  # seconds after the first request
    prompt_tokens: int
    max_tokens: int  # tokens it generates
    blocks: tuple[int, ...]  # ids of its prompt's blocks: equal ids are equal tokens; the last ones may be missing

    def page_keys(self, page_size: int) -> Iterator[Key]:
        """Keys of the full pages of the prompt, in position order."""
        parent = _ROOT
        for start in range(0, self.prompt_tokens - page_size + 1, page_size):
            stop = start + page_size
            blocks = self.blocks[start // BLOCK_TOKENS : -(-stop // BLOCK_TOKENS)]
            parent = page_key(parent, (start % BLOCK_TOKENS, *blocks))
            yield parent


def read_requests(
    path: str, most: int | None, time_scale: float, max_input_len: int | None = None
) -> list[TraceRequest]:
    """The first `most` requests of a trace in order of arrival; the gaps between them are multiplied by `time_scale`.

    Prompts longer than `max_input_len` are cut to it. Raises `ConfigError`, which names line, field and remedy.
    """
    for name, value in (("num_requests", most), ("max_input_len", max_input_len)):
        require(value is None or value >= 1, name, value, "must be at least 1", "give 1 or more, or leave it out")
    require(time_scale > 0, "time_scale", time_scale, "must be more than 0", "1 keeps the times of the trace")
    try:
        rows = sorted(read_trace(Path(path), most or 1 << 62), key=lambda row: row.timestamp)
    except OSError as error:
        raise ConfigError(
            "trace", path, f"cannot be read ({error.strerror})", "give the path of a trace file"
        ) from error
    except ConfigError as error:
        raise ConfigError("trace", error.value, error.problem, error.remedy) from error
    arrivals = trace_arrivals([row.timestamp for row in rows], 1 / time_scale)
    return [
        TraceRequest(number, arrival, min(row.input_length, max_input_len or row.input_length), row.output_length,
            tuple(row.hash_ids) or (-1 - number,))
        for number, (row, arrival) in enumerate(zip(rows, arrivals, strict=True))
    ]  # fmt: skip
