"""A parameter as it is stored in a checkpoint, and which of its dimensions are logical axes that may be sharded.

It owns `Param` and the comparison of a checkpoint with a model's parameters; it must not know how axes are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from longspan.errors import WeightError

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


Bounds = tuple[tuple[int, int], ...]  # [start, stop) of each dimension
Extent = Callable[[str, int], tuple[int, int]]  # (name, size) of a logical axis → (start, stop) of the part held


class Param(NamedTuple):
    """A tensor of a checkpoint, or one entry of a stacked tensor."""

    # name in the checkpoint
    name: str
    # shape of the whole tensor
    shape: tuple[int, ...]
    # logical axis of each dimension (`q_heads`, `kv_heads`, `ffn`, `vocab`), or None if the dimension is not sharded
    axes: tuple[str | None, ...]
    # elements of a sharded dimension for each item of the axis: head_dim where the items are heads
    unit: int = 1
    # whether it stays in fp32, whatever the model's dtype
    exact: bool = False
    # which entry of a tensor [entries, in, out] is loaded, as [out, in]; None for a tensor that is not stacked
    stacked: int | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions once it is loaded."""
        return len(self.shape) > (1 if self.stacked is None else 2)

    @property
    def has_whole_inputs(self) -> bool:
        """Whether each row of the loaded matrix [out, in] is whole under every layout."""
        return self.axes[-1 if self.stacked is None else -2] is None

    def bounds(self, extent: Extent) -> Bounds:
        """The part of the whole tensor that is loaded. `extent` gives the part of each logical axis that is held."""
        found: list[tuple[int, int]] = []
        for size, axis in zip(self.shape, self.axes, strict=True):
            start, stop = (0, size) if axis is None else extent(axis, size // self.unit)
            found.append((start, stop) if axis is None else (start * self.unit, stop * self.unit))
        if self.stacked is not None:
            found[0] = (self.stacked, self.stacked + 1)
        return tuple(found)


def loaded_shape(bounds: Bounds, stacked: bool) -> tuple[int, ...]:
    """The shape of a part once it is loaded; an entry of a stacked tensor is transposed."""
    sizes = tuple(stop - start for start, stop in bounds)
    return sizes[:0:-1] if stacked else sizes


class Shapes(Protocol):
    """What `validate_checkpoint` needs of a checkpoint."""

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...


def validate_checkpoint(params: Iterable[Param], checkpoint: Shapes, tied: bool, unread: tuple[str, ...] = ()) -> None:
    """Raise `WeightError` unless the checkpoint has exactly the tensors of `params`, in their shapes.

    It may also have tensors that other implementations save and that are not needed: rotary frequencies, masks, an
    output head if it is `tied` to the embedding, and tensors whose name begins with one of `unread`.
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
