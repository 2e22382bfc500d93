"""Pipeline parallelism: hidden states are sent from stage to stage.

It owns the order of the stages; it must not know which layers a stage holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import EngineError
from longspan.parallel.collectives import Collectives

_LABEL = "pipeline"


class Pipeline:
    """One rank's connection to the previous and the next stage. `group` has the ranks of all stages, in order."""

    def __init__(self, group: Collectives) -> None:
        self._group = group
        self._before = None if group.rank == 0 else group.rank - 1
        self._behind = None if group.rank == group.size - 1 else group.rank + 1

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The hidden states that the previous stage sends. Raises `EngineError` on the first stage."""
        if self._before is None:
            raise EngineError("the first stage has no stage before it")
        return self._group.receive(shape, dtype, self._before)

    def send(self, x: Tensor) -> None:
        """Send hidden states to the next stage, without waiting. Raises `EngineError` on the last stage."""
        if self._behind is None:
            raise EngineError("the last stage has no stage behind it")
        self._group.send(x, self._behind, _LABEL)

    def agrees(self, mine: Tensor) -> bool:
        """Whether the previous stage sent the same `mine`, which is sent on to the next stage. For debug mode."""
        received = mine if self._before is None else self.receive(tuple(mine.shape), mine.dtype)
        if self._behind is not None:
            self._group.send(mine, self._behind, "debug")
        return torch.equal(received, mine)
