"""Measurement of the cost model's constants at start, with the kernels and the context group in use.

It owns what is run and timed. All ranks measure at the same time, because they share cores and links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

import torch
from torch import Tensor

from longspan.attention.prepared import Preparer
from longspan.attention.rows import CacheRows
from longspan.attention.schedules import ContextGroup, Join, Schedule
from longspan.attention.state import AttentionState
from longspan.attention.variants import AttentionOps, GroupedQueryVariant
from longspan.attention.workload import AttentionShape, ExpansionCost
from longspan.cache.pages import Span
from longspan.clock import Run, repeated
from longspan.config import CostConstants, Fixed
from longspan.parallel.collectives import Collectives
from longspan.plan.reach import KeyRun, KeyShare, Place, QueryBlock, QueryRun, Reach

_TOKENS = 4096  # cached tokens of the attention that is timed
_ROWS = 64  # rows of the attention and the merge that are timed
_REPEATS = 5  # of which the median counts
_SCHEDULE_REPEATS = 9  # whole schedules vary more
_LARGE = 1 << 20  # bytes of a transfer whose time depends on its size
_LABEL = "calibration"
_TINY = 1e-12  # seconds: smallest rate, where a difference of measurements is not positive


def combine(measured: Sequence[CostConstants]) -> CostConstants:
    """One set of constants for all ranks: the median of each, and for schedules the largest."""
    names = [entry.name for entry in fields(CostConstants) if entry.name != "fixed"]
    return CostConstants(
        **{name: median(getattr(one, name) for one in measured) for name in names},
        fixed={
            schedule: Fixed(
                max(one.fixed[schedule].one for one in measured), max(one.fixed[schedule].all for one in measured)
            )
            for schedule in measured[0].fixed
        },
    )


@dataclass(frozen=True)
class Calibration:
    """One rank's part of the measurement. All members of the context group must measure at the same time."""

    # the backend that is measured
    ops: AttentionOps
    # the group whose collectives are measured
    context: ContextGroup
    # position of this rank in the group
    place: Place
    # sizes of queries, rows and states
    shape: AttentionShape
    # by name; those under which something travels are timed
    schedules: Mapping[str, Schedule]
    # dtype of queries and rows
    dtype: torch.dtype
    # device of this rank
    device: torch.device = torch.device("cpu")

    @property
    def group(self) -> Collectives:
        """The context group's collectives."""
        return self.context.collectives

    def measure(self) -> CostConstants:
        """Measure all constants. Takes some tens of milliseconds on a CPU.

        Rates follow from differences. Reading is the attention of one row to many tokens, less that to one token.
        Computing is the attention of many rows to many tokens, less the call and the reading.
        """
        call = self._together(self._attention(1, 1))
        read = max(self._together(self._attention(1, _TOKENS)) - call, _TINY) / (_TOKENS * self.shape.kv_bytes)
        work = self._attention(_ROWS, _TOKENS)
        alone, together = self._alone(work), self._together(work)
        flops = 2 * _ROWS * _TOKENS * self.shape.q_heads * (self.shape.head_dim + self.shape.out_dim)
        flop = max(alone - call - read * _TOKENS * self.shape.kv_bytes, _TINY) / flops
        message, byte = self._exchange()
        return CostConstants(
            call_s=call,
            flop_s=flop,
            read_s=read,
            copy_s=self._copy(),
            message_s=message,
            byte_s=byte,
            cross_message_s=message,
            cross_byte_s=byte,
            hidden=self._hidden(),
            parallelism=min(float(self.group.size), max(1.0, self.group.size * alone / together)),
            fixed={
                name: Fixed(self._schedule(schedule, 1), self._schedule(schedule, 1 << 30))
                for name, schedule in self.schedules.items()
                if schedule.moves is not None
            },
        )

    def _schedule(self, schedule: Schedule, busy: int) -> float:
        """Seconds of a whole schedule, with one row on each of the first `busy` pcp indices.

        Each row attends to one token of each shard.
        """
        shards = range(self.group.size)
        one = Span(0, 1)
        busy_here = self.place.pcp < busy
        reach = Reach(
            schedule=schedule.name,
            travel=0,
            own=(),
            blocks=tuple(
                QueryBlock(int(pcp < busy), (QueryRun(0, 1, (one,)),) if pcp < busy else ())
                for pcp in range(len(self.place.shards_of_pcp))
            ),
            shares=tuple(KeyShare((one,), 1) for _ in shards),
            key_runs=tuple(KeyRun(shard, 0, 1, one) for shard in shards) if busy_here else (),
        )
        kv = self._rows(1)
        if schedule.moves == "signals":
            seen = QueryRun(0, 1, tuple(Span(shard, 1) for shard in shards))
            reach = replace(reach, own=(seen,) if busy_here else (), in_place=True)
            kv = replace(kv, peers=tuple(self._rows(1) for _ in shards[1:]))
        q = self._random(int(busy_here), self.shape.q_heads, self.shape.head_dim)
        prepared = Preparer(self.ops.backend, ExpansionCost(), (None,)).reach(reach, len(q))
        join = Join(q, kv, prepared, GroupedQueryVariant(self.ops), self.context)
        return self._together(lambda: schedule.run(join), _SCHEDULE_REPEATS)

    def _random(self, *shape: int) -> Tensor:
        """A random tensor of the measured dtype."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _rows(self, tokens: int) -> CacheRows:
        """Random cached rows [kv_factor, Hkv, tokens, D]."""
        return CacheRows(self._random(self.shape.kv_factor, self.shape.kv_heads, tokens, self.shape.head_dim))

    def _attention(self, rows: int, tokens: int) -> Run:
        """A function that attends with `rows` rows to `tokens` cached tokens."""
        kv, q = self._rows(tokens), self._random(rows, self.shape.q_heads, self.shape.head_dim)
        ops = self.ops
        run = ops.backend.prepare([QueryRun(0, rows, (Span(0, tokens),))], rows)
        return lambda: run.attend(q, kv, ops.heads.own, ops.scale)

    def _copy(self) -> float:
        """Seconds to merge states, for each byte of them."""
        part = AttentionState.empty(
            _ROWS, self.shape.q_heads, self.shape.out_dim, torch.zeros(1, dtype=self.dtype, device=self.device)
        )
        parts = [AttentionState(torch.randn_like(part.out), torch.randn_like(part.lse)) for _ in range(2)]
        return self._together(lambda: self.ops.backend.merge(parts)) / (2 * _ROWS * self.shape.state_bytes)

    def _exchange(self) -> tuple[float, float]:
        """(seconds of a small all-gather, seconds for each byte received in a large one)."""
        small, large = torch.zeros(1, device=self.device), torch.zeros(_LARGE // 4, device=self.device)
        latency = self._together(lambda: self._all_gather(small))
        received = max(self.group.size - 1, 1) * _LARGE
        return latency, max(self._together(lambda: self._all_gather(large)) - latency, 0.0) / received

    def _hidden(self) -> float:
        """How far a transfer to the next member overlaps with computing, as a part of the shorter of the two.

        The result is between 0 (one after the other) and 1 (at the same time).
        """
        large, work = torch.zeros(_LARGE // 4, device=self.device), torch.randn(256, 256, device=self.device)
        ring = [*range(self.group.rank, self.group.size), *range(self.group.rank)]
        peers = ring[1:]

        def compute() -> None:
            for _ in range(20):
                torch.mm(work, work)

        def transfer(meanwhile: Run) -> None:
            arriving = [
                self.group.start_shift(large, peers[0], tuple(large.shape), peers[-1], _LABEL) for _ in peers[:1]
            ]
            meanwhile()
            for arrived in arriving:
                arrived()

        moving, computing = self._together(lambda: transfer(lambda: None)), self._together(compute)
        both = self._together(lambda: transfer(compute))
        return min(1.0, max(0.0, (moving + computing - both) / min(moving, computing)))

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        """All-gather x [R] of equal size on all members."""
        return self.group.all_gather(x, [len(x)] * self.group.size, _LABEL)

    def _alone(self, run: Run) -> float:
        """Median seconds on the first member, while all others wait."""
        own = torch.zeros(1, dtype=torch.float64, device=self.device)
        if self.group.rank == 0:
            own += median(repeated(run, _REPEATS, self.device))
        return float(self._all_gather(own)[0])

    def _together(self, run: Run, repeats: int = _REPEATS) -> float:
        """Median seconds on this rank, when all members run at the same time."""
        start = torch.zeros(1, device=self.device)
        return median(repeated(run, repeats, self.device, before=lambda: self._all_gather(start)))
