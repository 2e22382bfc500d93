"""scripts/fit_hardware.py: fitting the constants of hardware to measurements."""

from dataclasses import replace

import pytest

pytest.importorskip("scipy", reason="the fit needs SciPy")

from scripts.fit_hardware import Sample, fit, markdown

from longspan.planner.hardware import hardware
from longspan.planner.predict import Assumed, deployment, row_time
from longspan.planner.rows import Row


def test_a_fit_finds_the_constants_that_the_times_were_computed_with():
    true = replace(hardware("h100"), fp8_matmul=0.5, memory=0.7)
    rows = [
        Row("", "qwq-32b-fp8", "h100", 1, 1, 1, 1, 1, quantity, "", new, cached)
        for quantity, new, cached in (("ttft", 8192, 0), ("ttft", 32768, 0), ("ttit", 1, 100), ("ttit", 1, 32768))
    ]
    samples = [
        Sample(row, deployment(row, Assumed(), true), row_time(row, deployment(row, Assumed(), true)).seconds)
        for row in rows
    ]
    found = fit(hardware("h100"), ("fp8_matmul", "memory"), samples)
    assert found.fp8_matmul == pytest.approx(0.5, rel=0.01)
    assert found.memory == pytest.approx(0.7, rel=0.01)


def test_the_table_of_a_fit_has_a_row_for_each_measurement():
    rows = [
        Row(f"X{n}", "qwq-32b-fp8", "rtx-pro-5000", 1, 1, 1, 1, 1, "ttft", "", n * 1024, value=n * 180.0, unit="ms")
        for n in (1, 2, 4)
    ]
    text = markdown(rows)
    assert all(f"| X{n} |" in text for n in (1, 2, 4))
    assert "Left out: median" in text
