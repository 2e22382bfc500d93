"""In which form a CPU multiplies by a model's weights: decided by the driver, and the same on all ranks.

It owns the record; the forms themselves are the models'.
"""

from __future__ import annotations

from dataclasses import dataclass

PRODUCT_FORMS = ("plain", "fp16", "int8")
"""`plain`: as the weights are; `fp16`, `int8`: see `models/quantised.py`."""


@dataclass(frozen=True)
class ProductChoice:
    """How products are computed."""

    # one of `PRODUCT_FORMS`
    form: str = "plain"
    # lines printed at start
    notes: tuple[str, ...] = ()
