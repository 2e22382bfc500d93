"""In which form a CPU multiplies by a model's weights: decided by the driver, and the same on all ranks.

It owns the record; the forms themselves are the models'.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPILED_FORMS = ("panels", "blocks")
EXACT_FORMS = ("plain", *COMPILED_FORMS)
QUANTISED_FORMS = ("fp16", "int8")
PRODUCT_FORMS = (*EXACT_FORMS, *QUANTISED_FORMS)
"""`plain`: PyTorch's; `panels`: by the compiled kernel, for fp32; `blocks`: likewise, with weights in 4 or 8 bits where
their file has them so; `fp16`, `int8`: see `models/quantised.py`."""


@dataclass(frozen=True)
class ProductChoice:
    """How products are computed."""

    # one of `PRODUCT_FORMS`
    form: str = "plain"
    # lines printed at start
    notes: tuple[str, ...] = ()
