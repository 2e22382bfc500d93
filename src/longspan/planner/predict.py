"""What the planner says of a published setup.

It owns the way from a row to a deployment and a step; it must not know how rows are written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from longspan.errors import ConfigError, LongspanError
from longspan.hardware import Hardware, hardware
from longspan.planner.deployment import Deployment
from longspan.planner.models import find_model
from longspan.planner.outlook import even_shares
from longspan.planner.rows import Row
from longspan.planner.step import Chunk, StepModel, StepTime

_UNBOUNDED = 1 << 40  # other engines make a block of all keys of a shard
_LARGE_GB = 70  # from here on engines take larger steps and more requests by default


@dataclass(frozen=True)
class Assumed:
    """What rows do not say."""

    dtype: str = "bf16"
    weight_dtype: str | None = None
    kv_element_bytes: int = 2
    memory_fraction: float = 0.9
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Prediction:
    """In the row's unit; `error` is relative to `value`, where there is one."""

    id: str
    predicted: float
    value: float | None
    error: float | None


def predict(row: Row, assumed: Assumed = Assumed(), machine: Hardware | None = None) -> Prediction:
    """The row's number; `machine` takes the place of the hardware it names. Raises `ConfigError` or `ModelError`."""
    deployed = deployment(row, assumed, machine)
    if row.quantity == "kv_tokens":
        deployed.check_fits(deployed.page_size)
        found = float(deployed.capacity_tokens)
    else:
        found = step_time(row, deployed).seconds * row.scale
    error = None if not row.value else found / row.value - 1
    return Prediction(row.id, found, row.value, error)


def predict_all(rows: Sequence[Row], assumed: Assumed) -> list[Prediction]:
    """Every row's number; an error names the row."""
    found = []
    for row in rows:
        try:
            found.append(predict(row, assumed))
        except LongspanError as error:
            raise ConfigError("row", row.id, str(error), "correct it in the file") from error
    return found


def deployment(row: Row, assumed: Assumed, machine: Hardware | None = None) -> Deployment:
    """What the row describes."""
    model, weights = find_model(row.model, assumed.dtype, assumed.weight_dtype)
    machine = machine or hardware(row.hardware)
    large = machine.memory_gb >= _LARGE_GB
    return Deployment(
        model, machine, row.parallel, weights, assumed.kv_element_bytes,
        memory_fraction=assumed.memory_fraction, gpus_per_node=assumed.gpus_per_node,
        max_num_batched_tokens=8192 if large else 2048, max_num_seqs=1024 if large else 256,
        travelling_tokens=_UNBOUNDED, partial_element_bytes=assumed.kv_element_bytes,
    )  # fmt: skip


def step_time(row: Row, deployed: Deployment) -> StepTime:
    """The one step in which the row's tokens are computed, unchunked."""
    prefill = row.quantity == "ttft"
    schedule = row.schedule or ("local" if deployed.grid.num_shards == 1 else "gather_kv" if prefill else "gather_q")
    return StepModel(deployed).time(chunks(row, deployed), schedule, schedule)


def chunks(row: Row, deployed: Deployment) -> list[Chunk]:
    """The row's requests, their tokens spread evenly; decoding ones take turns on the pcp indices.

    A ring of queries is padded: each pcp index has as many, so that blocks are alike.
    """
    grid, prefill = deployed.grid, row.quantity == "ttft"
    tokens = even_shares(row.cached_tokens + row.new_tokens, grid.num_shards)
    spread = even_shares(row.new_tokens, grid.pcp)
    places = range(grid.pcp)
    decoding = row.batch if row.schedule != "ring_q" else math.ceil(row.batch / grid.pcp) * grid.pcp
    alone = [tuple(row.new_tokens * (home == n) for n in places) for home in islice(cycle(places), decoding)]
    rows = [spread] * row.batch if prefill else alone
    return [Chunk(row.new_tokens, row.cached_tokens, own, tokens, prefill) for own in rows]
