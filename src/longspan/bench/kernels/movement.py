"""Benchmarks of kernels that are bound by memory: merging attention states, and writing rows into the cache.

It owns the cases and the bytes that they have to move; it must not know how a backend works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from longspan.attention.backends.base import Writer
from longspan.attention.rows import CacheRows
from longspan.attention.state import AttentionState
from longspan.bench.kernels.attention import FORMATS, AttentionCase, KernelHeads
from longspan.bench.kernels.harness import Harness, KernelRow
from longspan.plan.view import WriteRun

_SPREAD = 4  # slots of the pool for each slot that is written


def run_merges(harness: Harness, heads: KernelHeads, tokens: Iterable[int], parts: int) -> list[KernelRow]:
    """Time merging `parts` states, for each number of tokens.

    Layout `packed` is as states arrive from other ranks (out and lse in one tensor [T, Hq, Dv + 1]), `whole` as kernels
    return them.
    """
    found: list[KernelRow] = []
    for count in tokens:
        width = heads.value_dim + 1
        moved = 4 * count * heads.q_heads * width * (parts + 1)
        for layout in ("packed", "whole"):
            case: dict[str, str | int] = {
                "kernel": "merge", "layout": layout, "heads": heads.name, "parts": parts, "tokens": count,
            }  # fmt: skip
            lacking = harness.lacks(2 * moved)
            if lacking:
                found.append(KernelRow(case, "-", moved, 0, None, lacking))
                continue
            packed = torch.randn(parts, count, heads.q_heads, width, device=harness.device)
            given = [AttentionState(part[..., :-1], part[..., -1]) for part in packed]
            if layout == "whole":
                given = [AttentionState(part.out.contiguous(), part.lse.contiguous()) for part in given]
            for name, backend in harness.contestants(heads.shape(harness, quantised=False)).items():
                found.append(harness.measure(case, name, (moved, 0), _merge(backend.merge, given)))
            del packed, given
    return found


def _merge(
    merge: Callable[[list[AttentionState]], AttentionState], given: list[AttentionState]
) -> Callable[[], object]:
    return lambda: merge(given)


def run_writes(harness: Harness, heads: KernelHeads, formats: Iterable[str], rows: Iterable[int]) -> list[KernelRow]:
    """Time writing rows k, v [T, Hkv, D] into the cache, for each number of rows and format.

    The bytes counted are the rows read once, and values and scales written once.
    """
    found: list[KernelRow] = []
    for count in rows:
        k, v = torch.randn(2, count, heads.kv_heads, heads.head_dim, device=harness.device, dtype=harness.dtype)
        runs = _scattered(count)
        for name in formats:
            scene = AttentionCase(heads, name, 1, 1, count * _SPREAD)
            read = count * heads.kv_factor * heads.kv_heads * heads.head_dim * harness.dtype.itemsize
            moved = read + count * scene.row_bytes(harness)
            case: dict[str, str | int] = {"kernel": "kv-write", "heads": heads.name, "format": name, "rows": count}
            lacking = harness.lacks(2 * moved)
            if lacking:
                found.append(KernelRow(case, "-", moved, 0, None, lacking))
                continue
            _, cache = scene.tensors(harness)
            for backend_name, backend in harness.contestants(heads.shape(harness, FORMATS[name] is not None)).items():
                work = _write(backend.writer(runs, count), cache, k, v)
                found.append(harness.measure(case, backend_name, (moved, 0), work))
    return found


def _write(writer: Writer, cache: CacheRows, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    return lambda: writer.write(cache, k, v)


def _scattered(rows: int) -> tuple[WriteRun, ...]:
    """Runs of 16 rows, one page each, at equal distances over a pool of `rows * _SPREAD` slots."""
    return tuple(WriteRun(at, at * _SPREAD, min(16, rows - at)) for at in range(0, rows, 16))
