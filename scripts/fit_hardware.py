"""Achieved constants of a machine from what was measured on it, and how well rows left out are foretold.

    python scripts/fit_hardware.py ROWS.csv

Prints the constants and the leave-one-out table as Markdown. Needs SciPy, which the extra `dev` brings.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from scipy.optimize import least_squares

from longspan.errors import LongspanError
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import Hardware, hardware
from longspan.planner.predict import Assumed, deployment, row_time
from longspan.planner.rows import Row, read_rows

_EXPECTED_ERROR, _EXPECTED_SPREAD = 0.05, 0.5  # of a row; of a constant about its default, as a logarithm
_FITTED: Mapping[str, tuple[float, float, float]] = {
    "fp8_matmul": (0.65, 0.3, 0.9),
    "attention": (1.0, 0.5, 1.0),
    "memory": (0.8, 0.5, 0.95),
    "intra_link": (0.8, 0.3, 0.95),
    "inter_link": (0.5, 0.2, 0.95),
    "message_s": (1e-5, 3e-6, 1e-4),
    "cross_message_s": (4e-5, 5e-6, 2e-4),
    "prompt_token_s": (1e-6, 1e-8, 1e-5),
}  # default, least and most
CONSTANTS: Mapping[str, Sequence[str]] = {
    "h100-meta": ("fp8_matmul", "memory", "inter_link", "message_s", "cross_message_s", "prompt_token_s"),
    "h20-96": ("fp8_matmul",),
    "rtx-pro-5000": ("fp8_matmul", "attention", "intra_link"),
}


@dataclass(frozen=True)
class Sample:
    """A measured time, and what it was measured of."""

    row: Row
    deployed: Deployment
    seconds: float

    @staticmethod
    def of(row: Row) -> Sample:
        """Of a row that has a time."""
        return Sample(row, deployment(row, Assumed(), None), (row.value or 0.0) / row.scale)

    def error(self, machine: Hardware) -> float:
        """Relative."""
        return row_time(self.row, self.deployed.on(machine)).seconds / self.seconds - 1


def fit(machine: Hardware, names: Sequence[str], samples: Sequence[Sample]) -> Hardware:
    """The machine with those constants that make squared errors least, held near their defaults and within bounds."""
    at = [math.log(_FITTED[name][0]) for name in names]

    def residuals(point: Sequence[float]) -> list[float]:
        tried = _machine(machine, names, point)
        strayed = [
            (value - math.log(_FITTED[name][0])) / _EXPECTED_SPREAD
            for name, value in zip(names, point, strict=True) if name != "prompt_token_s"
        ]  # fmt: skip
        return [sample.error(tried) / _EXPECTED_ERROR for sample in samples] + strayed

    bounds = [[math.log(_FITTED[name][edge]) for name in names] for edge in (1, 2)]
    found = least_squares(residuals, at, bounds=bounds)
    return _machine(machine, names, found.x)


def _machine(machine: Hardware, names: Sequence[str], point: Sequence[float]) -> Hardware:
    return replace(machine, **{name: math.exp(value) for name, value in zip(names, point, strict=True)})  # type: ignore[arg-type]


def markdown(rows: Sequence[Row]) -> str:
    """Each machine's constants and, for each of its rows, the error with the row and of a fit without it."""
    lines: list[str] = []
    left_out: list[float] = []
    for name, constants in CONSTANTS.items():
        samples = [Sample.of(row) for row in rows if row.hardware == name and row.value and row.quantity != "kv_tokens"]
        start = hardware(name)
        fitted = fit(start, constants, samples)
        values = ", ".join(f"{constant} = {getattr(fitted, constant):.3g}" for constant in constants)
        lines += [f"`{name}`, {len(samples)} rows: {values}", "", "| row | fitted | left out |", "|---|---|---|"]
        for sample in samples:
            others = [other for other in samples if other is not sample]
            left_out.append(sample.error(fit(start, constants, others)))
            lines.append(f"| {sample.row.id} | {sample.error(fitted):+.1%} | {left_out[-1]:+.1%} |")
        lines.append("")
    sizes = [abs(error) for error in left_out]
    lines.append(
        f"Left out: median {median(sizes):.1%}, worst {max(sizes):.1%}." if sizes else "No row is of a machine."
    )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", help="a CSV file as `longspan predict` reads it")
    print(markdown(read_rows(parser.parse_args().rows)))


if __name__ == "__main__":
    try:
        main()
    except LongspanError as error:
        sys.exit(f"longspan: error: {error}")
