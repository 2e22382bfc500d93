"""Which query head reads which KV head, on one rank.

It owns the grouping of GQA heads into uniform blocks; it must not know which rank it is on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadBlock:
    """Query heads [q_start, q_stop) read KV heads [kv_start, kv_stop), the same number each."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def kv_heads(self) -> int:
        """KV heads in the block."""
        return self.kv_stop - self.kv_start

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return (self.q_stop - self.q_start) // self.kv_heads


def kv_range(q_range: tuple[int, int], group: int) -> tuple[int, int]:
    """KV heads that query heads [start, stop) read, `group` query heads to a KV head."""
    start, stop = q_range
    return start // group, -(-stop // group)


def head_blocks(q_range: tuple[int, int], kv_start: int, group: int) -> tuple[HeadBlock, ...]:
    """Cut global query heads `q_range` into blocks of uniform grouping.

    Indices in the result are local: query heads count from `q_range[0]`, KV heads from `kv_start`
    (the first KV head stored here). One block where the heads divide evenly, up to three where a
    rank's heads begin or end inside a KV head's group.
    """
    q_first, q_stop = q_range
    blocks: list[HeadBlock] = []
    q = q_first
    while q < q_stop:
        kv = q // group
        end = min(q_stop, (kv + 1) * group)
        piece = HeadBlock(q - q_first, end - q_first, kv - kv_start, kv + 1 - kv_start)
        if blocks and blocks[-1].group == piece.group:
            last = blocks.pop()
            piece = HeadBlock(last.q_start, piece.q_stop, last.kv_start, piece.kv_stop)
        blocks.append(piece)
        q = end
    return tuple(blocks)
