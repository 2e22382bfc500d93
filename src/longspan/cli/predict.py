"""`longspan predict`: predictions for published setups, next to the measured values.

It owns the options, which are named like the columns of the CSV file, and the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from longspan.cli.options import Json
from longspan.cli.show import new_table
from longspan.config import require
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.planner.predict import Prediction
    from longspan.planner.rows import Row

_MIN_WIDTH = 110  # characters of the table

Rows = Annotated[str | None, typer.Option("--rows", help="CSV file of setups, instead of the options for one setup")]
RowId = Annotated[str, typer.Option("--id", help="name of the setup")]
Model = Annotated[str | None, typer.Option("--model", help="built-in name, folder, config.json or hub id")]
HardwareName = Annotated[
    str | None, typer.Option("--hardware", help="name of the hardware, as in h200, or a .yaml file")
]
Gpus = Annotated[int | None, typer.Option("--gpus", help="number of devices; default: tp x pcp x pp")]
Tensor = Annotated[int, typer.Option("--tp", "-tp", help="ranks over which heads and weights are split")]
Prefill = Annotated[int, typer.Option("--pcp", "-pcp", help="ranks over which the tokens of a prompt are split")]
Decode = Annotated[int, typer.Option("--dcp", "-dcp", help="ranks of a TP group over which the context is split")]
Pipeline = Annotated[int, typer.Option("--pp", "-pp", help="stages over which the layers are split")]
Schedule = Annotated[
    str,
    typer.Option("--schedule", help="schedule of attention; default: keys are gathered in prefill, queries in decode"),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", "--new_tokens", help="new tokens of a request")]
CachedTokens = Annotated[
    int, typer.Option("--cached-tokens", "--cached_tokens", help="tokens of a request that are in the KV cache")
]
Batch = Annotated[int, typer.Option("--batch", help="number of equal requests")]
Quantity = Annotated[
    str,
    typer.Option("--quantity", help="ttft (time to first token), ttit (time between tokens) or kv_tokens (capacity)"),
]
Value = Annotated[float | None, typer.Option("--value", help="measured value")]
Unit = Annotated[
    str, typer.Option("--unit", help="unit of the values: ms, s, us or tokens; default: ms, or tokens for kv_tokens")
]
Dtype = Annotated[str, typer.Option("--dtype", help="data type of activations and embedding: bf16, fp16 or fp32")]
WeightDtype = Annotated[
    str | None, typer.Option("--weight-dtype", help="data type of weights; default: the model's own")
]
CacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="data type of the KV cache: auto (that of --dtype), bf16, fp8 or fp32")
]
MemoryFraction = Annotated[
    float,
    typer.Option(
        "--memory-fraction", help="fraction of each device's memory for weights, workspace and KV cache together"
    ),
]
BatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        help="new tokens in flight over all stages; default: 8192, or 2048 on devices of less than 70 GB",
    ),
]
PerNode = Annotated[int, typer.Option("--gpus-per-node", help="devices per machine")]


def predict(
    rows: Rows = None,
    id: RowId = "",  # named like the column
    model: Model = None,
    hardware: HardwareName = None,
    gpus: Gpus = None,
    tp: Tensor = 1,
    pcp: Prefill = 1,
    dcp: Decode = 1,
    pp: Pipeline = 1,
    schedule: Schedule = "",
    new_tokens: NewTokens = 0,
    cached_tokens: CachedTokens = 0,
    batch: Batch = 1,
    quantity: Quantity = "ttft",
    value: Value = None,
    unit: Unit = "",
    dtype: Dtype = "bf16",
    weight_dtype: WeightDtype = None,
    kv_cache_dtype: CacheDtype = "auto",
    memory_fraction: MemoryFraction = 0.9,
    gpus_per_node: PerNode = 8,
    max_num_batched_tokens: BatchedTokens = None,
    as_json: Json = False,
) -> None:
    """Predict time or capacity of published setups, and compare with the measured values."""
    from longspan.planner.predict import Assumed, predict_all
    from longspan.planner.predict import predict as predict_row
    from longspan.planner.rows import Row, read_rows
    from longspan.weights.formats import element_bytes

    stored = element_bytes("kv_cache_dtype", dtype if kv_cache_dtype == "auto" else kv_cache_dtype)
    require((max_num_batched_tokens or 1) >= 1, "max_num_batched_tokens", max_num_batched_tokens, "must be at least 1",
            "give a number of tokens")  # fmt: skip
    assumed = Assumed(dtype, weight_dtype, int(stored), memory_fraction, gpus_per_node, max_num_batched_tokens)
    title = f"rows of {rows}"
    if rows is not None:
        found = predict_all(read_rows(rows), assumed)
    elif model is None or hardware is None:
        raise ConfigError("model" if model is None else "hardware", "", "is missing",
                          "give --model and --hardware, or --rows FILE.csv")  # fmt: skip
    else:
        world = tp * pcp * pp if gpus is None else gpus
        row = Row(id, model, hardware, world, tp, pcp, dcp, pp, quantity, schedule, new_tokens, cached_tokens,
                  batch, value, unit)  # fmt: skip
        found, title = [predict_row(row, assumed)], _described(row)
    if as_json:
        print(json.dumps({"rows": [asdict(prediction) for prediction in found]}))
        return
    console = Console(stderr=True)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(title, soft_wrap=True, highlight=False)
    console.print(_table(found))
    for one in found:
        if one.chunk_tokens is not None:
            row_id = f"{one.id}: " if one.id else ""
            line = f"{row_id}assumed: chunks of {one.chunk_tokens:,} tokens (--max-num-batched-tokens / pp)"
            console.print(line, soft_wrap=True, highlight=False)


def _described(row: Row) -> str:
    """The setup in one line."""
    setup = f"{row.model} on {row.gpus} x {row.hardware}, {row.parallel.name}"
    if row.quantity == "kv_tokens":
        return setup
    cached = f", {row.cached_tokens:,} cached" if row.cached_tokens else ""
    return f"{setup}: {row.batch} x {row.new_tokens:,} new tokens{cached}"


def _table(found: Sequence[Prediction]) -> Table:
    from longspan.planner.rows import QUANTITIES

    shown = {"quantity", "predicted", "unit"}  # columns without any content are left out
    shown |= {"id"} if any(one.id for one in found) else set()
    shown |= {"measured", "error"} if any(one.value is not None for one in found) else set()
    columns = [name for name in ("id", "quantity", "predicted", "measured", "unit", "error") if name in shown]
    table = new_table(None, columns, left=("id", "quantity", "unit"), no_wrap=True, box=SIMPLE_HEAD)
    for one in found:
        cells = {
            "id": one.id,
            "quantity": QUANTITIES[one.quantity],
            "predicted": f"{one.predicted:,.2f}",
            "measured": "" if one.value is None else f"{one.value:,.2f}",
            "unit": one.unit,
            "error": "" if one.error is None else f"{one.error:+.1%}",
        }
        table.add_row(*(cells[name] for name in columns))
    return table
