"""Which query head reads which KV head on one rank.

It owns the division of grouped-query heads into uniform blocks; it must not know which rank it is on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadBlock:
    """Query heads [q_start, q_stop) read KV heads [kv_start, kv_stop): the same number of query heads for each."""

    # first query head, counted on this rank
    q_start: int
    # query head after the last
    q_stop: int
    # first KV head, counted on this rank
    kv_start: int
    # KV head after the last
    kv_stop: int

    @property
    def kv_heads(self) -> int:
        """Number of KV heads in the block."""
        return self.kv_stop - self.kv_start

    @property
    def group(self) -> int:
        """Number of query heads for each KV head."""
        return (self.q_stop - self.q_start) // self.kv_heads


def kv_range(q_range: tuple[int, int], group: int) -> tuple[int, int]:
    """(start, stop) of the KV heads that the query heads `q_range` read, with `group` query heads for each KV head."""
    start, stop = q_range
    return start // group, -(-stop // group)


def head_blocks(q_range: tuple[int, int], kv_start: int, group: int) -> tuple[HeadBlock, ...]:
    """Cut the model's query heads `q_range` into blocks, in each of which every KV head has equally many query heads.

    `group` is the model's number of query heads for each KV head, `kv_start` the first KV head that the rank stores.
    In the result query heads count from `q_range[0]` and KV heads from `kv_start`. There is one block if the heads
    divide evenly, and up to three if a rank's query heads begin or end inside the group of a KV head.
    """
    q_first, q_stop = q_range
    blocks: list[HeadBlock] = []
    q = q_first
    while q < q_stop:
        kv = q // group
        end = min(q_stop, (kv + 1) * group)
        piece = HeadBlock(q - q_first, end - q_first, kv - kv_start, kv + 1 - kv_start)
        if blocks and blocks[-1].group == piece.group:  # the next KV head of the same block
            last = blocks.pop()
            piece = HeadBlock(last.q_start, piece.q_stop, last.kv_start, piece.kv_stop)
        blocks.append(piece)
        q = end
    return tuple(blocks)
