"""The reports of kernel benchmarks in a folder as one page: targets met or missed, then every row.

    python scripts/summarise_kernels.py FOLDER

Writes FOLDER/kernels.md and prints the targets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.bench.kernels.attention import HEADS

_LARGE_BYTES = 1e9  # decode is held to its target from here on
_DECODE, _MERGE, _PREFILL = 0.85, 0.80, 0.60
_SHARD_EXCESS, _SHARD_MERGE = 1.1, 0.02
_BACKEND = "triton"
_COLUMNS = ("kernel", "heads", "layout", "format", "batch", "new", "cached", "shard", "parts", "tokens", "rows")


@dataclass(frozen=True)
class Target:
    """What was asked, the worst that was measured (None: nothing was), and whether more is better."""

    name: str
    asked: float
    measured: float | None
    higher: bool = True

    @property
    def met(self) -> str:
        """yes, no, or - where nothing was measured."""
        if self.measured is None:
            return "-"
        return "yes" if (self.measured >= self.asked) == self.higher or self.measured == self.asked else "no"


def summary(reports: dict[str, dict[str, Any]]) -> str:
    """The page, in Markdown, of reports by name."""
    lines = ["# Kernels", "", f"Measured for the targets: {_BACKEND}; the worst case of each.", ""]
    lines += _table(
        ("target", "asked", "measured", "met"),
        (
            (t.name, f"{t.asked:.3f}", "-" if t.measured is None else f"{t.measured:.3f}", t.met)
            for t in targets(reports)
        ),
    )
    for name, report in reports.items():
        ceilings = report["ceilings"]
        lines += [
            "", f"## {name}", "",
            f"{report['device']}: copy {ceilings['copy'] / 1e12:.2f} TB/s, "
            f"matrix product {ceilings['matmul'] / 1e12:.1f} TFLOP/s.", "",
        ]  # fmt: skip
        lines += _table(
            ("case", "backend", "µs", "TB/s", "of copy", "TFLOP/s", "of matmul"), map(_cells, report["rows"])
        )
    return "\n".join([*lines, ""])


def targets(reports: dict[str, dict[str, Any]]) -> list[Target]:
    """Each target with the worst that the reports say of it; a case that failed has reached nothing."""
    rows = [row for report in reports.values() for row in report["rows"] if row["backend"] == _BACKEND]
    rows = [{"share_of_copy": 0.0, "share_of_matmul": 0.0, **row} for row in rows]
    merges = [row for row in rows if row["kernel"] == "merge" and "layout" in row]
    most = max((row["tokens"] for row in merges), default=0)
    large = [row["share_of_copy"] for row in merges if row["tokens"] == most]
    found = [Target("merge at the largest batch: share of copy", _MERGE, min(large, default=None))]
    prefill = [row["share_of_matmul"] for row in rows if row["kernel"] == "prefill"]
    found.append(Target("prefill off the diagonal: share of matmul", _PREFILL, min(prefill, default=None)))
    for heads in HEADS:
        shares = [_ceiling(row) for row in rows if _is_large_decode(row) and row["heads"] == heads]
        if shares:
            found.append(Target(f"{heads} decode over 1 GB: share of its ceiling", _DECODE, min(shares)))
    for report in reports.values():
        for name, share in report.get("shared", {}).items():
            if name.endswith(_BACKEND):
                shards = report["shards"]
                slowest = f"{name}: slowest of {shards} shards, of the whole"
                found.append(Target(slowest, _SHARD_EXCESS / shards, share["slowest_share"], higher=False))
                found.append(Target(f"{name}: merge, of the whole", _SHARD_MERGE, share["merge_share"], higher=False))
    return found


def _is_large_decode(row: dict[str, Any]) -> bool:
    return (row["kernel"], row.get("format")) == ("decode", "auto") and float(row["bytes"]) > _LARGE_BYTES


def _ceiling(row: dict[str, Any]) -> float:
    """Of the ceiling that binds: many heads over one latent compute more than they read."""
    return max(float(row["share_of_copy"]), float(row["share_of_matmul"]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    case = " ".join(
        f"{name} {row[name]}" if isinstance(row[name], int) else row[name] for name in _COLUMNS if name in row
    )
    if "problem" in row:
        return case, row["backend"], row["problem"].replace("\n", " ").replace("|", "/"), "", "", "", ""
    return (
        case, row["backend"], f"{row['median'] * 1e6:.1f}", f"{row['bytes_per_s'] / 1e12:.3f}",
        f"{row['share_of_copy']:.0%}", f"{row['flops_per_s'] / 1e12:.1f}", f"{row['share_of_matmul']:.0%}",
    )  # fmt: skip


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ("---",) * len(columns), *rows)]


def main(folder: Path) -> None:
    """Read the folder's reports and write the page; files that are no report are left out."""
    reports: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
        except ValueError:  # a part that failed leaves an empty file
            continue
        if isinstance(report, dict) and {"rows", "ceilings"} <= report.keys():
            reports[path.stem] = report
    page = summary(reports)
    (folder / "kernels.md").write_text(page)
    print(page.split("\n## ")[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
