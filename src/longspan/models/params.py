"""A parameter as the hub has it, and which of its dimensions are logical axes that may be sharded.

It owns `Param` and the check of a checkpoint against a model's list; it must not know who shards what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from longspan.errors import WeightError

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


@dataclass(frozen=True)
class Param:
    """Hub name, whole shape, and for each dimension its logical axis (`q_heads`, `kv_heads`, `ffn`, `vocab`) or None.

    `unit` is the rows that belong together on a sharded dimension: head_dim for the head axes. An
    `exact` parameter is kept in fp32 whatever the dtype of the model. A `stacked` one is entry number `stacked` of a
    tensor [entries, in, out], and is loaded as [out, in].
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    unit: int = 1
    exact: bool = False
    stacked: int | None = None


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
