"""What travels, chosen from facts every rank could check: bytes of each schedule, fewest wins.

It owns the formulas; pure Python, it must not import torch nor know which rank asks. Measured
constants (seconds, not only bytes) will join the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

_LSE_BYTES = 4
_PARTIAL_BYTES = 4


@dataclass(frozen=True)
class AttentionShape:
    """What one rank holds of one layer: its query heads, the KV heads of its shard, sizes in elements and bytes."""

    q_heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    planes: int = 2
    value_dim: int | None = None

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.q_heads * self.head_dim * self.element_bytes

    @property
    def partial_bytes(self) -> int:
        """Bytes of one token's partial result: fp32 out and lse of every head."""
        width = self.head_dim if self.value_dim is None else self.value_dim
        return self.q_heads * (width * _PARTIAL_BYTES + _LSE_BYTES)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.planes * self.kv_heads * self.head_dim * self.element_bytes


class ClassFacts:
    """What a step's travelling segments of one class need: query rows by pcp index, tokens seen by shard."""

    def __init__(self, pcp: int) -> None:
        self.rows = [0] * pcp
        self._seen: dict[tuple[object, int], int] = {}

    def add(self, keys: object, pcp: int, rows: int, visible: dict[int, int]) -> None:
        """One travelling segment: `visible` counts the tokens it sees on each shard.

        Segments with equal `keys` see prefixes of the same tokens.
        """
        self.rows[pcp] += rows
        for shard, tokens in visible.items():
            key = (keys, shard)
            self._seen[key] = max(tokens, self._seen.get(key, 0))

    @property
    def needed_tokens(self) -> int:
        """Cached tokens that some travelling segment sees, over all shards."""
        return sum(self._seen.values())


def gather_q_bytes(shape: AttentionShape, rows: list[int], members_per_pcp: int) -> int:
    """Bytes all members of a context group send for one layer: queries out, partials back.

    Every member sends its queries to the n − 1 others, and each of those returns a partial for them.
    """
    others = len(rows) * members_per_pcp - 1
    return others * members_per_pcp * sum(rows) * (shape.query_bytes + shape.partial_bytes)


def gather_kv_bytes(shape: AttentionShape, needed_tokens: int, members: int) -> int:
    """Bytes all members of a context group send for one layer: each needed token's KV to the n − 1 others."""
    return (members - 1) * needed_tokens * shape.kv_bytes


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
        return ExpansionCost((2 * latent + rope) - (query + rope + value), latent * (query + value))

    def pays(self, pairs: float, tokens: int) -> bool:
        """Whether `pairs` of queries and keys are better attended with their `tokens` expanded."""
        return pairs * self.saved_per_pair > tokens * self.per_token


@dataclass(frozen=True)
class ScheduleChooser:
    """Chooses a schedule by class: what the user forced, or the fewest bytes."""

    shape: AttentionShape
    members_per_pcp: int
    forced: str = "auto"

    def choose(self, facts: ClassFacts) -> str:
        """`local` if nothing travels; else the forced schedule, or the cheaper of queries and keys."""
        if not sum(facts.rows):
            return "local"
        if self.forced != "auto":
            return self.forced
        members = len(facts.rows) * self.members_per_pcp
        queries = gather_q_bytes(self.shape, facts.rows, self.members_per_pcp)
        keys = gather_kv_bytes(self.shape, facts.needed_tokens, members)
        return "gather_q" if queries <= keys else "gather_kv"
