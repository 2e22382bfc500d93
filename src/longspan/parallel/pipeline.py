"""Pipeline parallelism: hidden states go from stage to stage.

It owns who is before and behind a rank; it must not know which layers a stage holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import EngineError
from longspan.parallel.collectives import Collectives

_LABEL = "pipeline"


class Pipeline:
    """The ranks of all stages that compute the same tokens and heads, in stage order."""

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self._before = None if group.rank == 0 else group.rank - 1
        self._behind = None if group.rank == group.size - 1 else group.rank + 1

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the stage before hands on."""
        if self._before is None:
            raise EngineError("the first stage has no stage before it")
        return self._group.receive(shape, dtype, self._before)

    def send(self, x: Tensor) -> None:
        """Hand x to the stage behind, which may still be busy with an earlier step."""
        if self._behind is None:
            raise EngineError("the last stage has no stage behind it")
        self._group.send(x, self._behind, _LABEL)

    def agrees(self, mine: Tensor) -> bool:
        """Debug: whether every stage before this one has handed on the same `mine`."""
        received = mine if self._before is None else self.receive(tuple(mine.shape), mine.dtype)
        if self._behind is not None:
            self._group.send(mine, self._behind, "debug")
        return torch.equal(received, mine)
