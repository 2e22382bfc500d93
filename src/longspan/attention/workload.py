"""The workload of a step's attention, in numbers that are the same on every rank.

It owns the counts of query rows, cached tokens, and pairs of both, and the sizes of these in bytes. Pure Python: it
must not know how fast a machine is, nor which rank asks.
"""

from __future__ import annotations

from dataclasses import dataclass

_LSE_BYTES = 4


@dataclass(frozen=True)
class ExpansionCost:
    """When latent attention needs fewer products in the expanded form, counted for one head.

    For each pair of query and key the absorbed form needs (latent + rope) + latent products, and the expanded form
    (query + rope) + value. Expanding needs latent · (query + value) products for each cached token.
    """

    # products that the expanded form saves for each pair; 0 if latents are never expanded
    saved_per_pair: int = 0
    # products to expand one cached token
    per_token: int = 0

    @staticmethod
    def of(latent: int, rope: int, query: int, value: int) -> ExpansionCost:
        """From the widths of a latent, and of a head's rotary part, query without position, and value."""
        if value > query + rope:  # never expanded, as kernels need values that are no wider than keys
            return ExpansionCost()
        return ExpansionCost((2 * latent + rope) - (query + rope + value), latent * (query + value))

    def pays(self, pairs: float, tokens: int) -> bool:
        """Whether expanding `tokens` tokens saves products, if queries form `pairs` pairs with them."""
        return pairs * self.saved_per_pair > tokens * self.per_token

    def saved(self, pairs: float, tokens: int) -> float:
        """Products that the better form saves, compared with the absorbed form."""
        return max(0.0, pairs * self.saved_per_pair - tokens * self.per_token)


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one layer on one rank."""

    # query heads of the rank
    q_heads: int
    # KV heads of the rank
    kv_heads: int
    # elements of a head's query as it travels, and of a cached row
    head_dim: int
    # bytes of an element of a query
    element_bytes: int
    # rows of a cached token in each KV head: 2 for keys and values, 1 for latents
    kv_factor: int = 2
    # elements of a result over cached rows; None for `head_dim`
    value_dim: int | None = None
    # when latents are expanded
    expansion: ExpansionCost = ExpansionCost()
    # bytes of a cached row, its scales included; None for those of one head's query
    row_bytes: int | None = None
    # bytes of an element of a state's out while it is sent; its lse is always fp32
    state_element_bytes: int = 4

    @property
    def out_dim(self) -> int:
        """Elements of a result over cached rows."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries, of all heads of the rank."""
        return self.q_heads * self.head_dim * self.element_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's attention state: out and lse of all heads of the rank."""
        return self.q_heads * self.out_dim * self.state_element_bytes + self.lse_bytes

    @property
    def lse_bytes(self) -> int:
        """Bytes of one token's lse, of all heads of the rank."""
        return self.q_heads * _LSE_BYTES

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's cached rows, of all KV heads of the rank."""
        row = self.head_dim * self.element_bytes if self.row_bytes is None else self.row_bytes
        return self.kv_factor * self.kv_heads * row


@dataclass(frozen=True)
class GroupShape:
    """The context group, as the cost model knows it."""

    # for every pcp index, the shards that its ranks store
    shards_of_pcp: tuple[tuple[int, ...], ...]
    # the members on each machine
    nodes: tuple[tuple[int, ...], ...]
    # whether tensors are passed by reference: members are threads
    shares_memory: bool = False
    # whether members that compute in a step have the cores of those that do not
    shares_cores: bool = False
    # whether members can read each other's pools in place
    maps_pools: bool = False

    @property
    def members(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.shards_of_pcp))

    @property
    def members_per_pcp(self) -> int:
        """Number of members of one pcp index: they compute the same tokens, with different heads."""
        return len(self.shards_of_pcp[0])


@dataclass(frozen=True)
class ComputeLoad:
    """The attention that is computed in one place: on a shard, or on a pcp index."""

    # kernel calls
    calls: int = 0
    # cached tokens that are read, counted once for each segment
    reads: int = 0
    # pairs of query row and cached token
    pairs: int = 0


@dataclass(frozen=True)
class WorkloadTotals:
    """The sums over all travelling segments of a phase, in one layer group."""

    # query rows of each pcp index
    rows: tuple[int, ...]
    # tokens of each shard that some segment sees, each counted once
    needed: tuple[int, ...]
    # what each shard computes if queries travel
    by_shard: tuple[ComputeLoad, ...]
    # what the ranks of each pcp index compute if keys travel
    by_pcp: tuple[ComputeLoad, ...]


class PhaseWorkload:
    """The travelling segments of one phase of a step, in the layers of one group."""

    def __init__(self, pcp: int) -> None:
        self.rows = [0] * pcp  # of each pcp index
        self._segments: list[tuple[object, int, int, dict[int, int]]] = []  # the arguments of `add`

    def add(self, keys: object, pcp: int, rows: int, visible: dict[int, int]) -> None:
        """Add a travelling segment of `rows` rows, computed by `pcp`. It sees `visible[shard]` tokens of each shard.

        Segments with equal `keys` see prefixes of the same tokens, so these are needed only once.
        """
        self.rows[pcp] += rows
        self._segments.append((keys, pcp, rows, visible))

    def totals(self, shards: int) -> WorkloadTotals:
        """The sums over all segments, for a context group of `shards` shards."""
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
