"""Which ranks of a prefill instance have the KV that a decode rank stores: layers × KV heads × positions.

It owns this mapping, as pure functions of what the ranks of both instances store. Tokens are named by their positions,
so it must not know about page sizes or sizes of groups, nor how bytes are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from longspan.cache.pages import PageTable
from longspan.config.addresses import is_address
from longspan.plan.source import Extent, Part, Source

_MAX_RANKS = 1 << 12  # of another instance


@dataclass(frozen=True)
class Cell:
    """Layers × KV heads that one decode rank stores, and that lie whole on one rank of every prefill shard."""

    # layers of the model
    layers: Extent
    # KV heads of the model
    heads: Extent
    # for each shard of the prefill instance, in order, the rank from which to fetch
    ranks: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Layers × KV heads, so cache rows of one token divided by `kv_factor`."""
        return (self.layers[1] - self.layers[0]) * (self.heads[1] - self.heads[0])


def cells(mine: Part, theirs: Sequence[Part]) -> list[Cell]:
    """Cut the layers and KV heads of decode rank `mine` into cells.

    If several ranks of a shard hold the same heads, decode ranks use different ones of them. Raises `ValueError` if no
    rank holds some layer or head.
    """
    found: list[Cell] = []
    shards = sorted({part.shard for part in theirs})
    for layers in _overlaps(mine.layers, [part.layers for part in theirs]):
        # the ranks of the pipeline stage that has these layers
        stage = [part for part in theirs if part.layers[0] <= layers[0] and layers[1] <= part.layers[1]]
        if not stage:
            raise ValueError(f"no rank holds layers {layers[0]}..{layers[1] - 1}")
        # each cell takes as many heads as one rank of every shard holds together, from the first remaining head on
        head = mine.heads[0]
        while head < mine.heads[1]:
            chosen = [_furthest([p for p in stage if p.shard == shard], head, mine.rank) for shard in shards]
            stop = min(mine.heads[1], *(part.heads[1] for part in chosen))
            found.append(Cell(layers, (head, stop), tuple(part.rank for part in chosen)))
            head = stop
    return found


def problem_of(source: Source, ours: Sequence[Part]) -> str | None:
    """Why ranks that store `ours`, all parts of a model, cannot fetch from a source; None if they can.

    A source comes from another instance and may be invalid. The problem is worded to follow that instance's address.
    """
    parts, num_shards = source.parts, len({part.shard for part in source.parts})
    if not 0 < len(parts) <= _MAX_RANKS or len(source.addresses) != len(parts):
        return f"reports {len(parts)} ranks and {len(source.addresses)} addresses"
    for address in source.addresses:
        if not is_address(address):
            return f"has a rank at {address!r}, which is not of the form tcp://HOST:PORT"
    num_layers, num_heads = max(part.layers[1] for part in ours), max(part.heads[1] for part in ours)
    for rank, part in enumerate(parts):
        if part.rank != rank or not 0 <= part.shard < num_shards:
            return f"reports rank {part.rank} with shard {part.shard} in place of rank {rank} of {num_shards} shards"
        for name, (start, stop), size in (("layers", part.layers, num_layers), ("KV heads", part.heads, num_heads)):
            if not 0 <= start < stop <= size:
                return f"has another model: rank {rank} has {name} {start}..{stop - 1} of {size}"
    try:
        for part in ours:
            cells(part, parts)
    except ValueError as error:
        return f"has another model: {error}"
    return None


def are_in_order(runs: Sequence[Extent]) -> bool:
    """Whether runs of positions are not empty, do not overlap and are in ascending order."""
    return all(before <= start < stop for before, (start, stop) in zip((0, *(r[1] for r in runs)), runs, strict=False))


def runs_on(table: PageTable, shard: int, start: int, stop: int) -> list[Extent]:
    """The positions in [start, stop) of a request that are on `shard`, as runs whose slots are adjacent."""
    return [(start + offset, start + offset + span.length) for offset, span in table.slots(shard, start, stop)]


def _overlaps(mine: Extent, theirs: Sequence[Extent]) -> list[Extent]:
    """`mine`, cut wherever an extent of `theirs` starts or stops."""
    cuts = sorted({*mine, *(cut for extent in theirs for cut in extent if mine[0] < cut < mine[1])})
    return list(pairwise(cuts))


def _furthest(parts: Sequence[Part], head: int, rank: int) -> Part:
    """The part that holds `head` and the most heads after it. Among equal ones the decode rank's number chooses."""
    having = [part for part in parts if part.heads[0] <= head < part.heads[1]]
    if not having:
        raise ValueError(f"no rank of the shard holds KV head {head}")
    stop = max(part.heads[1] for part in having)
    best = [part for part in having if part.heads[1] == stop]
    return best[rank % len(best)]
