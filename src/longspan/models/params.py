"""A parameter as the hub has it, and which of its dimensions are logical axes that may be sharded.

It owns `Param` and the check of a checkpoint against a model's list; it must not know who shards what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from longspan.errors import WeightError

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


Bounds = tuple[tuple[int, int], ...]  # [start, stop) of each dimension
Extent = Callable[[str, int], tuple[int, int]]  # (start, stop) of the part of a logical axis of so many


class Param(NamedTuple):
    """A tensor of a checkpoint, or an entry of one."""

    name: str  # on the hub
    shape: tuple[int, ...]  # of the whole tensor
    axes: tuple[str | None, ...]  # of each dimension: `q_heads`, `kv_heads`, `ffn`, `vocab`, or None if it stays whole
    unit: int = 1  # rows that belong together on a sharded dimension: head_dim for the head axes
    exact: bool = False  # kept in fp32 whatever the dtype of the model
    stacked: int | None = None  # the entry of a tensor [entries, in, out] that is loaded, as [out, in]

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns as it is loaded."""
        return len(self.shape) > (1 if self.stacked is None else 2)

    def bounds(self, extent: Extent) -> Bounds:
        """The part of the tensor that is loaded where such parts of the logical axes are held."""
        found: list[tuple[int, int]] = []
        for size, axis in zip(self.shape, self.axes, strict=True):
            start, stop = (0, size) if axis is None else extent(axis, size // self.unit)
            found.append((start, stop) if axis is None else (start * self.unit, stop * self.unit))
        if self.stacked is not None:
            found[0] = (self.stacked, self.stacked + 1)
        return tuple(found)


def loaded_shape(bounds: Bounds, stacked: bool) -> tuple[int, ...]:
    """What such a part is once it is loaded: an entry of a stack is transposed."""
    sizes = tuple(stop - start for start, stop in bounds)
    return sizes[:0:-1] if stacked else sizes


class Shapes(Protocol):
    """What validation needs of a checkpoint."""

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


def validate_checkpoint(params: Iterable[Param], checkpoint: Shapes, tied: bool, unread: tuple[str, ...] = ()) -> None:
    """Raise `WeightError` unless the checkpoint has exactly these tensors in these shapes.

    Names that begin with one of `unread` may be there.
    """
    names = checkpoint.names()
    expected = {param.name: param.shape for param in params}
    for name, shape in expected.items():
        if name not in names:
            raise WeightError(f"{name}: missing from the checkpoint (shape {shape} expected); download it again")
        found = checkpoint.shape(name)
        if tuple(found) != shape:
            raise WeightError(
                f"{name}: shape {tuple(found)} in the checkpoint, {shape} expected from config.json; "
                "the two belong to different models"
            )
    spare = {"lm_head.weight"} if tied else set()
    extra = sorted(
        n for n in names - set(expected) - spare if not (n.endswith(_IGNORED_SUFFIXES) or n.startswith(unread))
    )
    if extra:
        raise WeightError(
            f"{extra[0]}: not a tensor of this architecture (shape {tuple(checkpoint.shape(extra[0]))}, "
            f"{len(extra)} such tensors); the config.json's architecture is not the checkpoint's"
        )
