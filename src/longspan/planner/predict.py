"""Predictions for published setups.

It owns which deployment and which steps a row describes; it must not know the file format of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.errors import ConfigError, LongspanError
from longspan.planner.deployment import Deployment
from longspan.planner.forecast import Interval, prompt_chunk, prompt_chunks, through_stages, time_per_token
from longspan.planner.hardware import Hardware, hardware
from longspan.planner.models import find_model
from longspan.planner.rows import Row
from longspan.planner.step import StepModel

_UNBOUNDED = 1 << 40  # tokens of a block of keys: other engines send all keys of a shard as one block
_LARGE_GB = 70  # memory of a device from which on engines have larger steps and more requests by default


@dataclass(frozen=True)
class Assumed:
    """What rows do not say about a setup."""

    dtype: str = "bf16"  # data type of activations and embedding
    weight_dtype: str | None = None  # data type of weights; None: the model's own
    kv_element_bytes: int = 2  # bytes of an element of the KV cache
    memory_fraction: float = 0.9  # fraction of each device's memory for weights, workspace and KV cache together
    gpus_per_node: int = 8  # devices of a machine
    # new tokens of the steps in flight, over all stages; None: 8,192, or 2,048 on devices of less than 70 GB
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True)
class Prediction:
    """The predicted value of a row, and the measured one."""

    id: str  # name of the row
    quantity: str  # a key of `QUANTITIES`
    unit: str  # of `predicted` and `value`: ms, s, us or tokens
    predicted: float
    value: float | None  # the measured value; None if the row has none
    error: float | None  # (predicted - value) / value; None without a value
    chunk_tokens: int | None  # tokens of a prompt's chunk, which rows do not say; None where prompts are not cut


def predict(row: Row, assumed: Assumed = Assumed(), machine: Hardware | None = None) -> Prediction:
    """The prediction for a row, on `machine` if given. Raises `ConfigError` or `ModelError`."""
    deployed = deployment(row, assumed, machine)
    if row.quantity == "kv_tokens":
        deployed.check_fits(deployed.page_size)
        found = float(deployed.capacity_tokens)
    else:
        found = row_time(row, deployed).seconds * row.scale
    error = None if not row.value else found / row.value - 1
    chunk = deployed.chunk_tokens if row.quantity == "ttft" and row.pp > 1 else None
    return Prediction(row.id, row.quantity, row.unit_shown, found, row.value, error, chunk)


def predict_all(rows: Sequence[Row], assumed: Assumed) -> list[Prediction]:
    """The predictions for all rows. An error names the row."""
    found = []
    for row in rows:
        try:
            found.append(predict(row, assumed))
        except LongspanError as error:
            raise ConfigError("row", row.id, str(error), "correct it in the file") from error
    return found


def deployment(row: Row, assumed: Assumed, machine: Hardware | None = None) -> Deployment:
    """The deployment that a row describes."""
    model, weights = find_model(row.model, assumed.dtype, assumed.weight_dtype)
    machine = machine or hardware(row.hardware)
    large = machine.memory_gb >= _LARGE_GB
    return Deployment(
        model, machine, row.parallel, weights, assumed.kv_element_bytes,
        memory_fraction=assumed.memory_fraction, gpus_per_node=assumed.gpus_per_node,
        max_num_batched_tokens=assumed.max_num_batched_tokens or (8192 if large else 2048),
        max_num_seqs=1024 if large else 256,
        travelling_tokens=_UNBOUNDED, state_element_bytes=assumed.kv_element_bytes,
    )  # fmt: skip


def row_time(row: Row, deployed: Deployment) -> Interval:
    """Time until the last request of the row has its token: its first one, or the next one if it decodes.

    Without pipeline stages all prompts are computed in one step. With stages they are cut into chunks, one behind the
    other.
    """
    model, context = StepModel(deployed), row.cached_tokens + row.new_tokens
    if row.quantity != "ttft":
        schedule = row.schedule or ("local" if deployed.grid.num_shards == 1 else "gather_q")
        return time_per_token(model, context, row.batch, schedule, row.new_tokens, padded=schedule == "ring_q")
    schedule = row.schedule or ("local" if deployed.grid.num_shards == 1 else "gather_kv")
    if deployed.grid.pp == 1:
        steps = [[prompt_chunk(deployed, row.cached_tokens, row.new_tokens)] * row.batch]
    else:
        steps = [[chunk] for chunk in prompt_chunks(deployed, context, row.new_tokens)] * row.batch
    return through_stages(model, steps, schedule)
