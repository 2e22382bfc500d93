"""`longspan bench attention|merge|kv-write|moe|linear`: single kernels, compared with the limits of the device.

It owns the options and the tables. Tables and progress go to stderr; with `--json` one object goes to stdout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from longspan.cli.options import Json
from longspan.cli.show import new_table
from longspan.config import parse_integers, require, require_choice
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.bench.kernels.attention import KernelHeads, Shared
    from longspan.bench.kernels.harness import Harness, KernelRow

_WIDTH = 150  # characters of the table
_SIZES = {  # default sizes by device
    "cpu": {
        "batch": "1,4", "cached": "1024,8192", "prefill": "256x2048", "whole": 8192,
        "tokens": "1,256", "rows": "1,1024", "mixture": "16x4x256x128", "routed": "1,64",
        "products": "960x576,576x576,3072x576,576x1536,49152x576",
    },
    "cuda": {
        "batch": "1,8,64", "cached": "8192,131072,1048576", "prefill": "16384x131072", "whole": 1 << 20,
        "tokens": "1,64,1024,4096", "rows": "1,64,2048,16384", "mixture": "64x6x2048x1408", "routed": "1,16,256,8192",
        "products": "6144x4096,4096x4096,28672x4096,4096x14336,128256x4096",
    },
}  # fmt: skip
_UNITS = {"cpu": ("GB/s", "GFLOP/s", 1e9), "cuda": ("TB/s", "TFLOP/s", 1e12)}
Device = Annotated[str, typer.Option("--device", help="cpu or cuda")]
Backends = Annotated[str, typer.Option("--backends", help="attention backends to compare with the first one, or all")]
HeadNames = Annotated[
    str, typer.Option("--heads", help="gqa (64/8 x 128), mla (128 over a latent of 576), mla16 (16 over it), mha")
]
Formats = Annotated[str, typer.Option("--kv-cache-dtype", help="data types of the cache: auto, fp8, int8")]
Batch = Annotated[
    str | None, typer.Option("--batch", help="decoding requests, a case for each number, as in 1,64; empty: no decode")
]
Cached = Annotated[str | None, typer.Option("--cached", help="cached tokens of each of them")]
Prefill = Annotated[
    str | None, typer.Option("--prefill", help="new x cached tokens of a prefill, as in 256x2048; empty: no prefill")
]
Whole = Annotated[
    int | None,
    typer.Option("--shared-context", help="tokens of a context that is divided over shards; 0: no such case"),
]
Shards = Annotated[int, typer.Option("--shards", help="virtual shards of --shared-context")]
Parts = Annotated[int, typer.Option("--parts", help="attention states to merge")]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="query tokens of the attention states to merge, a case for each number, as in 1,1024"
    ),
]
Rows = Annotated[str | None, typer.Option("--rows", help="rows to write, a case for each number, as in 1,1024")]
Shape = Annotated[
    str | None, typer.Option("--shape", help="experts x choices of a row x hidden size x width, as in 64x6x2048x1408")
]
StoredWeights = Annotated[
    str, typer.Option("--weights", help="how weights are stored: plain (the dtype of the device), fp8 or mxfp4")
]
Routed = Annotated[str | None, typer.Option("--rows", help="rows to route, a case for each number, as in 1,8192")]
Model = Annotated[
    str | None, typer.Option("--model", help="a model whose products are measured: folder, GGUF file, hub id or name")
]
Products = Annotated[
    str | None,
    typer.Option("--shapes", help="weights to multiply by, out x in, as in 3072x576,576x1536; default: --model's"),
]
Multiplied = Annotated[str, typer.Option("--rows", help="rows to multiply, a case for each number, as in 1,2048")]
Forms = Annotated[
    str,
    typer.Option(
        "--forms", help="forms of weights to compare with the first one, or all: plain, packed, panels, blocks, fp16, "
        "int8; on a GPU bf16, few-rows, fp16, fp8",
    ),
]  # fmt: skip
Seconds = Annotated[float, typer.Option("--seconds", help="seconds for the repetitions of one case")]


def attention_kernel(
    device: Device = "cpu",
    backends: Backends = "all",
    heads: HeadNames = "gqa,mla",
    formats: Formats = "auto",
    batch: Batch = None,
    cached: Cached = None,
    prefill: Prefill = None,
    shared_context: Whole = None,
    shards: Shards = 8,
    seconds: Seconds = 0.3,
    as_json: Json = False,
) -> None:
    """Measure attention kernels: decode, prefill off the diagonal, and one context divided over virtual shards."""
    sizes = _sizes(device)
    found = _heads(heads)
    stored = tuple(formats.split(","))
    for name in stored:
        require_choice("kv_cache_dtype", name, ("auto", "fp8", "int8"))
    batches, contexts = _integers("batch", batch, sizes["batch"]), _integers("cached", cached, sizes["cached"])
    pairs = _pairs(sizes["prefill"] if prefill is None else prefill)
    whole = sizes["whole"] if shared_context is None else shared_context
    require(shards >= 1, "shards", shards, "must be at least 1", "give 1 or more")
    require(
        whole == 0 or whole >= shards,
        "shared_context",
        whole,
        "is less than one token for each shard",
        "give more, or 0",
    )
    from longspan.bench.kernels.attention import AttentionCase, run_scenes, run_shards

    def measure(harness: Harness) -> tuple[list[KernelRow], dict[str, Any]]:
        rows: list[KernelRow] = []
        shared: dict[str, Any] = {}
        for of in found:
            for name in stored:
                rows += run_scenes(
                    harness, "decode", [AttentionCase(of, name, b, 1, c) for c in contexts for b in batches]
                )
                rows += run_scenes(harness, "prefill", [AttentionCase(of, name, 1, new, c) for new, c in pairs])
                if whole:
                    parts, shares = run_shards(harness, AttentionCase(of, name, 1, 1, whole), shards)
                    rows += parts
                    shared |= {f"{of.name} {name} {backend}": _plain(share) for backend, share in shares.items()}
        return rows, {"shards": shards, "shared": shared}

    _run(device, backends, seconds, as_json, "Attention kernels", measure)


def merge(
    device: Device = "cpu",
    backends: Backends = "all",
    heads: HeadNames = "gqa",
    tokens: Tokens = None,
    parts: Parts = 8,
    seconds: Seconds = 0.3,
    as_json: Json = False,
) -> None:
    """Measure the merge of attention states, as they arrive from other ranks and as kernels return them."""
    found, counts = _heads(heads), _integers("tokens", tokens, _sizes(device)["tokens"])
    require(parts >= 2, "parts", parts, "leaves nothing to merge", "give 2 or more")
    from longspan.bench.kernels.movement import run_merges

    def measure(harness: Harness) -> tuple[list[KernelRow], dict[str, Any]]:
        return [row for of in found for row in run_merges(harness, of, counts, parts)], {}

    _run(device, backends, seconds, as_json, f"Merge of {parts} attention states", measure)


def kv_write(
    device: Device = "cpu",
    backends: Backends = "all",
    heads: HeadNames = "gqa,mla",
    formats: Formats = "auto,fp8,int8",
    rows: Rows = None,
    seconds: Seconds = 0.3,
    as_json: Json = False,
) -> None:
    """Measure writing new keys and values into the cache, unquantised and quantised."""
    found, counts = _heads(heads), _integers("rows", rows, _sizes(device)["rows"])
    stored = tuple(formats.split(","))
    for name in stored:
        require_choice("kv_cache_dtype", name, ("auto", "fp8", "int8"))
    from longspan.bench.kernels.movement import run_writes

    def measure(harness: Harness) -> tuple[list[KernelRow], dict[str, Any]]:
        return [row for of in found for row in run_writes(harness, of, stored, counts)], {}

    _run(device, backends, seconds, as_json, "Writing the cache", measure)


def moe(
    device: Device = "cpu",
    shape: Shape = None,
    rows: Routed = None,
    weights: StoredWeights = "plain",
    seconds: Seconds = 0.3,
    as_json: Json = False,
) -> None:
    """Measure the weighted sum of a mixture's experts, in every form that the device has, and its error."""
    sizes = _sizes(device)
    counts, mixture = _integers("rows", rows, sizes["routed"]), _mixture(shape or sizes["mixture"])
    from longspan.bench.kernels.mixture import BLOCKS, STORED, MixtureShape, run_mixtures

    require_choice("weights", weights, tuple(STORED))
    block, whole = BLOCKS.get(weights, 1), mixture[2:]
    problem = f"has widths that are no multiple of {block}, as {weights} needs"
    require(not any(size % block for size in whole), "shape", shape or sizes["mixture"], problem, "give other widths")

    def measure(harness: Harness) -> tuple[list[KernelRow], dict[str, Any]]:
        found, errors = run_mixtures(harness, MixtureShape(*mixture, stored=weights), counts)
        return found, {"shape": mixture, "weights": weights, "errors": errors}

    _run(device, "all", seconds, as_json, "Mixture of {} experts, {} a row, {} x {}".format(*mixture), measure)


def linear(
    device: Device = "cpu",
    model: Model = None,
    shapes: Products = None,
    rows: Multiplied = "1,8,32,256,2048",
    forms: Forms = "all",
    seconds: Seconds = 0.3,
    as_json: Json = False,
) -> None:
    """Measure matrix products, in every form of weights that the device has, and their error."""
    default, counts = _sizes(device)["products"], _integers("rows", rows, rows)
    problem, remedy = "gives the weights, and so does --shapes", "give one of both"
    require(model is None or shapes is None, "model", model, problem, remedy)
    from longspan.bench.kernels.linear import FORMS, run_products, shapes_of_model

    weights = [_weight(part) for part in (shapes or default).split(",")] if model is None else shapes_of_model(model)
    names = tuple(FORMS[device]) if forms == "all" else tuple(forms.split(","))
    for name in names:
        require_choice("forms", name, tuple(FORMS[device]))

    def measure(harness: Harness) -> tuple[list[KernelRow], dict[str, Any]]:
        found, errors = run_products(harness, weights, counts, names)
        return found, {"shapes": weights, "errors": errors}

    _run(device, "all", seconds, as_json, "Matrix products", measure)
    if not as_json:
        shown = f"longspan bench linear --device {device} --shapes OUTxIN --rows ROWS --forms FORM"
        Console(stderr=True, width=_WIDTH).print(f"a row again: {shown}", highlight=False)


def _run(
    device: str, backends: str, seconds: float, as_json: bool, title: str,
    measure: Callable[[Harness], tuple[list[KernelRow], dict[str, Any]]],
) -> None:  # fmt: skip
    require(seconds > 0, "seconds", seconds, "must be positive", "0.3 is the default")
    from longspan.bench.kernels.harness import as_json as plain
    from longspan.bench.kernels.harness import make_harness

    console = Console(stderr=True, width=_WIDTH)
    with console.status("starting") as status:
        harness = make_harness(device, () if backends == "all" else backends.split(","), seconds, status.update)
        rows, more = measure(harness)
    found = [plain(row, harness.ceilings) for row in rows]
    top = harness.ceilings
    bytes_unit, flops_unit, unit = _UNITS[device]
    console.print(f"copy {top.copy / unit:.3f} {bytes_unit}, matrix product {top.matmul / unit:.2f} {flops_unit}")
    _show(console, title, found, _UNITS[device])
    for name, share in more.get("shared", {}).items():
        console.print(
            f"{name}: slowest of {more['shards']} shards {share['slowest_share']:.3f} of the whole, "
            f"merge {share['merge_share']:.3f}"
        )
    for name, error in more.get("errors", {}).items():
        console.print(f"{name}: largest error against fp64 {error:.1e} of the largest element")
    if as_json:
        print(json.dumps({"device": _name(device), "ceilings": asdict(harness.ceilings), "rows": found, **more}))


def _show(console: Console, title: str, rows: Sequence[dict[str, Any]], units: tuple[str, str, float]) -> None:
    """Print the table. `to first` is the first backend's time divided by this one's. Shards are only in the JSON."""
    bytes_unit, flops_unit, unit = units
    columns = ("case", "backend", "µs", "best", bytes_unit, "of copy", flops_unit, "of matmul", "to first")
    table = new_table(title, columns, left=columns[:2])
    first: dict[str, float] = {}
    for row in rows:
        if row["kernel"] == "shard":
            continue
        case = _case(row)
        if "problem" in row:
            table.add_row(case, row["backend"], row["problem"])
            continue
        ratio = first.setdefault(case, row["median"]) / row["median"]
        table.add_row(
            case, row["backend"], f"{row['median'] * 1e6:,.1f}", f"{row['best'] * 1e6:,.1f}",
            f"{row['bytes_per_s'] / unit:.3f}", f"{row['share_of_copy']:.0%}",
            f"{row['flops_per_s'] / unit:.2f}", f"{row['share_of_matmul']:.0%}", f"{ratio:.2f}x",
        )  # fmt: skip
    console.print(table)


def _case(row: dict[str, Any]) -> str:
    numbers = ("batch", "new", "cached", "parts", "tokens", "rows")
    words = [str(row[name]) for name in ("kernel", "heads", "layout", "format", "shape") if name in row]
    return " ".join([*words, *(f"{name} {row[name]:,}" for name in numbers if name in row)])


def _plain(share: Shared) -> dict[str, Any]:
    return {**asdict(share), "slowest_share": share.slowest_share, "merge_share": share.merge_share}


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def _sizes(device: str) -> dict[str, Any]:
    require_choice("device", device, tuple(_SIZES))
    return _SIZES[device]


def _heads(names: str) -> list[KernelHeads]:
    from longspan.bench.kernels.attention import HEADS

    for name in names.split(","):
        require_choice("heads", name, tuple(HEADS))
    return [HEADS[name] for name in names.split(",")]


def _integers(field: str, given: str | None, default: str) -> tuple[int, ...]:
    text = default if given is None else given
    found = parse_integers(field, text) if text else ()
    require(all(number >= 1 for number in found), field, text, "must be at least 1", "give positive numbers")
    return found


def _mixture(text: str) -> tuple[int, int, int, int]:
    numbers = [int(part) for part in text.split("x") if part.isdigit() and int(part)]
    if len(numbers) != 4 or text.count("x") != 3:
        raise ConfigError("shape", text, "is not experts x choices x hidden x width", "write it as 64x6x2048x1408")
    experts, chosen, hidden, width = numbers
    require(chosen <= experts, "shape", text, f"lets a row choose {chosen} of {experts} experts", "choose fewer")
    return experts, chosen, hidden, width


def _weight(text: str) -> tuple[int, int]:
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError("shapes", text, "is not outputs x inputs", "write it as 3072x576")
    return int(numbers[0]), int(numbers[1])


def _pairs(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for part in text.split(",") if text else ():
        numbers = part.split("x")
        if len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
            raise ConfigError("prefill", text, "is not new x cached tokens", "write it as 256x2048")
        found.append((int(numbers[0]), int(numbers[1])))
    return found
