"""What a step's attention amounts to, in numbers that are the same on every rank.

It owns counting: tokens seen, pairs of query and key, rows and their sizes in bytes; pure Python, it must not know
how fast anything is, nor which rank asks.
"""

from __future__ import annotations

from dataclasses import dataclass

_LSE_BYTES = 4


@dataclass(frozen=True)
class ExpansionCost:
    """When latent attention needs fewer products in the expanded form, per head.

    For a pair of query and key the absorbed form multiplies over latent + rope and latent, the expanded one over
    query + rope and value; expanding costs latent · (query + value) a cached token.
    """

    saved_per_pair: int = 0
    per_token: int = 0

    @staticmethod
    def of(latent: int, rope: int, query: int, value: int) -> ExpansionCost:
        """From the widths of MLA."""
        if value > query + rope:  # kernels want values no wider than keys: never expanded
            return ExpansionCost()
        return ExpansionCost((2 * latent + rope) - (query + rope + value), latent * (query + value))

    def pays(self, pairs: float, tokens: int) -> bool:
        """Whether `pairs` of queries and keys are better attended with their `tokens` expanded."""
        return pairs * self.saved_per_pair > tokens * self.per_token

    def saved(self, pairs: float, tokens: int) -> float:
        """Products saved by the better of both forms."""
        return max(0.0, pairs * self.saved_per_pair - tokens * self.per_token)


@dataclass(frozen=True)
class AttentionShape:
    """What one rank holds of one layer: its query heads, the KV heads of its shard, sizes in elements and bytes."""

    q_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int  # of queries
    kv_factor: int = 2  # rows of a token in the cache: keys and values, or one latent
    value_dim: int | None = None  # of a result over cache rows; None: `head_dim`
    expansion: ExpansionCost = ExpansionCost()
    row_bytes: int | None = None  # of a cached row with its scales; None: as many as a query's of one head
    state_element_bytes: int = 4  # of a result on its way; its lse is always fp32

    @property
    def out_dim(self) -> int:
        """Width of a result over cache rows."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.q_heads * self.head_dim * self.element_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's partial result: out and lse of every head."""
        return self.q_heads * self.out_dim * self.state_element_bytes + self.lse_bytes

    @property
    def lse_bytes(self) -> int:
        """Bytes of one token's lse of every head."""
        return self.q_heads * _LSE_BYTES

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        row = self.head_dim * self.element_bytes if self.row_bytes is None else self.row_bytes
        return self.kv_factor * self.kv_heads * row


@dataclass(frozen=True)
class GroupShape:
    """The context group: the shards of every pcp index, and its members by machine."""

    shards_of_pcp: tuple[tuple[int, ...], ...]
    nodes: tuple[tuple[int, ...], ...]

    @property
    def members(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.shards_of_pcp))

    @property
    def members_per_pcp(self) -> int:
        """Ranks that hold the same tokens and different heads."""
        return len(self.shards_of_pcp[0])


@dataclass(frozen=True)
class ComputeLoad:
    """Attention to be computed in one place: kernel calls, tokens read, pairs of query row and token."""

    calls: int = 0
    reads: int = 0
    pairs: int = 0


@dataclass(frozen=True)
class WorkloadTotals:
    """All travelling segments of a phase: query rows of every pcp index, tokens of each shard that some segment sees,
    what each shard computes if queries come to it, and what the ranks of each pcp index compute if keys come to them.
    """

    rows: tuple[int, ...]
    needed: tuple[int, ...]
    by_shard: tuple[ComputeLoad, ...]
    by_pcp: tuple[ComputeLoad, ...]


class PhaseWorkload:
    """A step's travelling segments of one phase in layers of one group."""

    def __init__(self, pcp: int) -> None:
        self.rows = [0] * pcp
        self._segments: list[tuple[object, int, int, dict[int, int]]] = []

    def add(self, keys: object, pcp: int, rows: int, visible: dict[int, int]) -> None:
        """One travelling segment: `visible` counts the tokens it sees on each shard.

        Segments with equal `keys` see prefixes of the same tokens.
        """
        self.rows[pcp] += rows
        self._segments.append((keys, pcp, rows, visible))

    def totals(self, shards: int) -> WorkloadTotals:
        """Summed up."""
        most: dict[tuple[object, int], int] = {}
        by_shard = [[0, 0, 0] for _ in range(shards)]
        by_pcp = [[0, 0, 0] for _ in self.rows]
        for keys, pcp, rows, visible in self._segments:
            here = by_pcp[pcp]
            for shard, tokens in visible.items():
                most[keys, shard] = max(tokens, most.get((keys, shard), 0))
                for load in (by_shard[shard], here):
                    load[0] += 1
                    load[1] += tokens
                    load[2] += rows * tokens
        needed = [0] * shards
        for (_, shard), tokens in most.items():
            needed[shard] += tokens
        return WorkloadTotals(
            tuple(self.rows),
            tuple(needed),
            tuple(ComputeLoad(*x) for x in by_shard),
            tuple(ComputeLoad(*x) for x in by_pcp),
        )
