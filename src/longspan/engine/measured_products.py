"""In which form a CPU multiplies by the weights of one model: as asked for, or by what is fastest on this processor.

It owns the decision, what is timed for it, and the lines about it; it must not know how the forms compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from itertools import product
from math import ceil, log, prod
from time import monotonic
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from longspan.clock import seconds
from longspan.compiled.folder import NOTHING_KEPT, KeptFiles
from longspan.compiled.library import fingerprint
from longspan.config.products import COMPILED_FORMS, EXACT_FORMS, QUANTISED_FORMS, ProductChoice
from longspan.engine.free_memory import return_free_memory
from longspan.errors import WeightError
from longspan.models.context import Linear
from longspan.models.params import Param
from longspan.models.quantised import largest_error, linear_in_form, problem_of_form
from longspan.weights.checkpoint import BlockCheckpoint, Checkpoint

FEW_ROWS, MANY_ROWS = (1, 8, 32), 128
_SMALL_BYTES = 4 << 20  # of all weights in fp32, up to which exact forms are not compared
_READ_BYTES = 48 << 20  # of fp32 weights that are read in turn, more than most caches hold: a step reads all weights
_SLICE_BYTES = 8 << 20  # of one weight, at most; of a larger one its first rows are multiplied
_MOST_TURNS = 12  # over all weights, rows and forms, half of them for each of two measurements
_SECONDS = 1.0  # after which only what has never been timed is
_DISTURBED = 1.5  # times that a time differs by in both halves of a measurement that is worth nothing
_MARGIN = 1.15  # by which any time may be wrong without changing a clear choice
_PREFILL_LOSS = 1.1  # a form that takes this many times as long as the plain one with many rows is not chosen
_ERROR_ROWS = 256  # of a weight of the model, of which the error is computed

Times = dict[str, dict[int, float]]
"""Of each form, the seconds by number of rows."""


class _Weight(NamedTuple):
    """The size of a weight that is multiplied to compare forms."""

    # rows
    outputs: int
    # columns
    inputs: int
    # see `linear_in_form`
    is_whole: bool

    @property
    def size(self) -> int:
        """Bytes in fp32."""
        return 4 * self.outputs * self.inputs


@dataclass(frozen=True)
class Products:
    """The products of a model, as far as the choice depends on them."""

    # the weights of the products, of a model that is not sharded
    params: tuple[Param, ...]
    # of weights and activations
    dtype: torch.dtype
    # CPU threads of a rank
    threads: int
    # where the weights are
    checkpoint: Checkpoint

    @property
    def in_blocks(self) -> bool:
        """Whether the files have weights in blocks of 4- or 8-bit codes that are multiplied as they are."""
        files = self.checkpoint
        return isinstance(files, BlockCheckpoint) and any(files.block_width(param.name) for param in self.params)

    @property
    def is_small(self) -> bool:
        """Whether the weights are so few that a measurement costs more than it can gain."""
        return 4 * sum(prod(param.shape) for param in self.params) <= _SMALL_BYTES

    @property
    def measured(self) -> tuple[_Weight, ...]:
        """As many of the weights as are multiplied to compare forms, each cut to `_SLICE_BYTES`."""
        found: list[_Weight] = []
        for param in self.params:
            # of an entry of a stacked tensor, [in, out], too: only sizes count
            outputs, inputs = param.shape[-2:]
            found.append(_Weight(max(1, min(outputs, _SLICE_BYTES // (4 * inputs))), inputs, param.has_whole_inputs))
            if sum(weight.size for weight in found) >= _READ_BYTES:
                break
        return tuple(found)


def choose_products(
    quantization: str, device_type: str, products_of_model: Callable[[], Products], compiled: bool = False,
    kept: KeptFiles = NOTHING_KEPT,
) -> ProductChoice:  # fmt: skip
    """The form that `quantization` asks for, or the fastest exact one. `compiled`: whether there are compiled kernels.

    What is not to be had is left out, with a line that says so. `products_of_model` is called only if a form is chosen.
    `kept` has what was measured at earlier starts.
    """
    wanted = tuple(form for form in QUANTISED_FORMS if quantization in (form, "auto-fast"))
    if wanted and device_type != "cpu":
        return ProductChoice(notes=(f"quantization {quantization}: for CPUs only; weights stay as they are",))
    if not wanted and not compiled:
        return ProductChoice()
    # in a thread of its own: OpenMP keeps the threads of every thread that has computed, and with more of them than
    # cores it lets all of them sleep between two operations, for as long as the engine runs
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(_choose, wanted, quantization == "auto-fast", products_of_model, compiled, kept).result()


def _choose(
    wanted: Sequence[str], compares: bool, products_of_model: Callable[[], Products], compiled: bool, kept: KeptFiles
) -> ProductChoice:
    problems = {form: problem_of_form(form) for form in wanted}
    notes = [f"quantization {form}: not used ({problem})" for form, problem in problems.items() if problem]
    forms = [form for form, problem in problems.items() if not problem]
    exact = not forms or compares
    if exact:
        forms.insert(0, "plain")
    if forms == ["plain"] and not compiled:
        return ProductChoice(notes=tuple(notes))
    products = products_of_model()
    if exact and compiled:
        forms[1:1] = [form for form in COMPILED_FORMS if form != "blocks" or products.in_blocks]
    form = forms[-1]
    if len(forms) > 1 and not (form in EXACT_FORMS and products.is_small):
        form, line = _fastest_of(tuple(forms), products, kept)
        notes.append(line)
    if form in QUANTISED_FORMS:
        notes.append(_error_line(form, products))
    return ProductChoice(form, tuple(notes))


def fastest(times: Times) -> str:
    """The form with the least time for few rows, of those that lose little with many.

    The mean is of logarithms, so that each number of rows counts the same.
    """
    most = _PREFILL_LOSS * times["plain"][MANY_ROWS]
    possible = [form for form, taken in times.items() if taken[MANY_ROWS] <= most]
    return min(possible, key=lambda form: sum(log(times[form][rows]) for rows in FEW_ROWS))


def is_clear(times: Times) -> bool:
    """Whether the choice would be the same if any one form had been measured to be faster or slower by `_MARGIN`."""
    changed = (
        {**times, form: {rows: taken * factor for rows, taken in times[form].items()}}
        for form in times
        for factor in (1 / _MARGIN, _MARGIN)
    )
    return len({fastest(times), *map(fastest, changed)}) == 1


def _fastest_of(forms: Sequence[str], products: Products, kept: KeptFiles) -> tuple[str, str]:
    """The fastest of forms, and a line about it: by what an earlier start measured clearly, else by what is measured.

    If other programs disturb the measurement, it is the exact form that is usually faster. What is kept depends on the
    processor, PyTorch, the kernels, the weights' sizes and the number of threads.
    """
    of = repr((fingerprint(), forms, products.measured, products.dtype, products.threads))
    name = f"products-{sha256(of.encode()).hexdigest()[:24]}.json"
    with suppress(msgspec.MsgspecError):
        if (content := kept.read(name)) is not None:
            known = msgspec.json.decode(content, type=Times)
            return fastest(known), f"products: {fastest(known)} (measured at an earlier start, {_ratios(known)})"
    halves = _measure(forms, products.measured, products.dtype, products.threads)
    return_free_memory()
    times: Times = {
        form: {rows: min(each[form][rows] for each in halves) for rows in (*FEW_ROWS, MANY_ROWS)} for form in forms
    }
    if not _agree(halves):
        form = [form for form in forms if form in EXACT_FORMS][-1]
        return form, f"products: {form} (other programs disturb a measurement: {_ratios(times)})"
    if len({fastest(each) for each in halves}) == 1 and all(map(is_clear, halves)):
        kept.keep(name, msgspec.json.encode(times))
    return fastest(times), f"products: {fastest(times)} (measured, {_ratios(times)})"


def _agree(halves: tuple[Times, Times]) -> bool:
    """Whether both halves of a measurement have about the same times."""
    ratios = [halves[0][form][rows] / halves[1][form][rows] for form, taken in halves[0].items() for rows in taken]
    return max(*ratios, *(1 / ratio for ratio in ratios)) < _DISTURBED


def _ratios(times: Times) -> str:
    plain = times["plain"]
    parts = [
        f"{form} " + ", ".join(f"{taken[rows] / plain[rows]:.2f}" for rows in plain)
        for form, taken in times.items()
        if form != "plain"
    ]
    rows = ", ".join(map(str, plain))
    return f"times of the plain form at {rows} rows: {'; '.join(parts)}"


def _error_line(form: str, products: Products) -> str:
    """What the form costs in exactness, by a product with one of the model's own weights."""
    weight = _stored(products)
    split = " where inputs are whole on every rank, fp16 elsewhere and for the head" if form == "int8" else ""
    return (
        f"weights in {form}{split}: a product is off by at most {largest_error(weight, form):.2g} of its largest "
        "element; --quantization none is exact"
    )


def _stored(products: Products) -> Tensor:
    """Rows of the first weight of the model; random ones if it has none that can be read."""
    param = products.params[0]
    *stack, rows, columns = param.shape
    weight = torch.randn(min(rows, _ERROR_ROWS), columns, generator=torch.Generator().manual_seed(2))
    out = weight[(None,) * len(stack)]
    with suppress(WeightError):
        bounds = [*(slice(0, 1) for _ in stack), slice(0, len(weight)), slice(0, columns)]
        products.checkpoint.read(param.name, tuple(bounds), out)
    return weight


@cache
@torch.inference_mode()
def _measure(forms: Sequence[str], weights: Sequence[_Weight], dtype: torch.dtype, threads: int) -> tuple[Times, Times]:
    """The times of each form, measured twice in turn; the same for all engines of this process.

    Of each size of weight the shortest time counts. A single product is short enough that another program seldom
    interrupts it, and weights are read in turn, so that they come from memory.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    repeated = tuple(weights) * ceil(_READ_BYTES / sum(weight.size for weight in weights))
    layers: dict[str, list[Linear]] = {form: [] for form in forms}
    for one in repeated:
        values = torch.randn(one.outputs, one.inputs, generator=generator).to(dtype)
        for form in forms:
            layers[form].append(linear_in_form(values, form, is_whole=one.is_whole))
    inputs = {
        (rows, one.inputs): torch.randn(rows, one.inputs, generator=generator).to(dtype)
        for one in weights
        for rows in (*FEW_ROWS, MANY_ROWS)
    }
    best: tuple[dict[_Sample, float], dict[_Sample, float]] = ({}, {})
    until = monotonic() + _SECONDS
    for turn in range(_MOST_TURNS):
        into = best[turn % 2]
        for rows, form in product((*FEW_ROWS, MANY_ROWS), forms):
            for one, call in zip(repeated, layers[form], strict=True):
                sample = _Sample(form, rows, one)
                if sample not in into or monotonic() < until:
                    taken = seconds(partial(call, inputs[rows, one.inputs]))
                    into[sample] = min(taken, into.get(sample, taken))
    return _summed(forms, weights, best[0]), _summed(forms, weights, best[1])


class _Sample(NamedTuple):
    """What is timed."""

    # of the weight
    form: str
    # of the activations
    rows: int
    # its size
    weight: _Weight


def _summed(forms: Sequence[str], weights: Sequence[_Weight], best: Mapping[_Sample, float]) -> Times:
    """The times of all weights together."""
    return {
        form: {rows: sum(best[_Sample(form, rows, one)] for one in weights) for rows in (*FEW_ROWS, MANY_ROWS)}
        for form in forms
    }
