"""The time of one step of the engine.

It owns the workload of a step's attention and the sum of all parts of a step. The time of attention comes from the
engine's own cost model. It must not know how steps are scheduled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from longspan.attention.cost import CostModel, LayerTime, Priced, ScheduleChooser, StepTotals
from longspan.attention.schedules import SCHEDULES
from longspan.attention.workload import ComputeLoad, GroupShape, WorkloadTotals
from longspan.planner.deployment import Deployment
from longspan.planner.linear import LinearTime, Seconds

_CACHE_SIZE = 4096  # entries of the cache of times outside attention
Bounds = tuple[float, float, float, float]  # seconds of compute, memory, link and latency


@dataclass(frozen=True)
class Chunk:
    """The new tokens of one request in a step."""

    new_tokens: int  # 1 for a decoding request
    cached_tokens: int  # tokens before the chunk, on all shards
    rows_by_pcp: tuple[int, ...]  # new tokens on each pcp index
    tokens_by_shard: tuple[int, ...]  # tokens it attends to on each shard of the context group, its own included
    prefill: bool  # whether its phase is prefill


@dataclass(frozen=True)
class StepTime:
    """The time of a step and its parts.

    With pipeline stages it is the time from the first stage to the last. Each stage is busy for an equal part of it.
    """

    seconds: float
    parts: Mapping[str, float]  # seconds of each part, by name
    bound: str  # what takes most of the time: compute, memory, link or latency


class StepModel:
    """Computes the times of steps of one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        grid, cost = deployment.grid, deployment.hardware.cost
        group = GroupShape(grid.shards_of_pcp, grid.nodes(grid.context_group(0)))
        together = replace(cost, parallelism=cost.parallelism / grid.head_shards)
        self.model = CostModel(deployment.attention_shape, group, SCHEDULES, together, deployment.travelling_tokens)
        self.chooser = ScheduleChooser(self.model)
        self._linear = LinearTime(deployment)
        self._times_outside: dict[tuple[int, int, int], tuple[Mapping[str, float], Bounds]] = {}
        self._prompt_token_s = deployment.hardware.prompt_token_s
        self._per_segment = deployment.hardware.calls_per_segment
        model = deployment.model
        self._layer_groups = [  # (window, number of layers)
            (window, sum(model.window(layer) == window for layer in range(model.num_layers)))
            for window in model.layer_groups
        ]

    def time(self, chunks: Sequence[Chunk], decode_schedule: str, prefill_schedule: str) -> StepTime:
        """Time of the step that computes `chunks`, until its tokens are sampled. A schedule `auto` is the cheapest."""
        prefills = [chunk for chunk in chunks if chunk.prefill]
        decodes = chunks if not prefills else [chunk for chunk in chunks if not chunk.prefill]
        rows = _sums("rows_by_pcp", chunks)
        busiest = max(rows)
        parts, (compute, memory, link, latency) = self._outside_attention(busiest, sum(rows), min(busiest, len(chunks)))
        attention = exchange = 0.0
        for phase, schedule in ((decodes, decode_schedule), (prefills, prefill_schedule)):
            for window, layers in self._layer_groups if phase else ():
                taken, local, reading = self._attention(phase, window, schedule)
                computed, copied = layers * taken.compute, layers * taken.copies
                moved, fixed = layers * (taken.transfer - taken.hidden), layers * taken.fixed
                compute, memory = (compute, memory + computed) if reading else (compute + computed, memory)
                memory, link, latency = memory + copied, link + moved, latency + fixed
                attention += computed + copied + local * fixed
                exchange += moved + (not local) * fixed
        prompt = self._prompt_token_s and self._prompt_token_s * sum(c.cached_tokens + c.new_tokens for c in prefills)
        found = {**parts, "host": parts["host"] + prompt, "attention": attention, "exchange": exchange}
        latency += prompt
        bounds = {"compute": compute, "memory": memory, "link": link, "latency": latency}
        return StepTime(compute + memory + link + latency, found, max(bounds, key=bounds.__getitem__))

    def _outside_attention(self, rows: int, all_rows: int, sampled: int) -> tuple[Mapping[str, float], Bounds]:
        """Everything outside attention. Results are cached, because decode steps have the same rows again and again."""
        key = (rows, all_rows, sampled)
        if key not in self._times_outside:
            if len(self._times_outside) >= _CACHE_SIZE:
                self._times_outside.clear()
            linear, sums = self._linear.layers(rows, all_rows), self._linear.sums(rows)
            head, host = self._linear.head(sampled, sampled * all_rows // max(rows, 1)), self.deployment.hardware.step_s
            parts = {"linear": linear.total, "tp": sums.total, "head": head.total, "host": host}
            total = linear + sums + head + Seconds(latency=host)
            self._times_outside[key] = parts, (total.compute, total.memory, total.link, total.latency)
        return self._times_outside[key]

    def _attention(self, chunks: Sequence[Chunk], window: int | None, schedule: str) -> tuple[LayerTime, bool, bool]:
        """(time of one layer of a group, whether nothing travels, whether reading keys takes most of its compute)."""
        totals = self._totals(chunks, window)
        step = StepTotals(self.model, totals)
        found: Priced
        if schedule == "auto":
            found = step.cheapest() if len(totals.needed) != 1 else SCHEDULES["local"]
        else:
            found = SCHEDULES[schedule]
        taken = found.seconds(step)
        loads = totals.by_shard if found.moves == "queries" else totals.by_pcp
        reading = max([load.reads for load in loads]) * self.model.shape.kv_bytes * self.model.constants.read_s
        return taken, found.moves is None, 2 * reading > taken.compute

    def _totals(self, chunks: Sequence[Chunk], window: int | None) -> WorkloadTotals:
        """The workload of `chunks` in one layer.

        It is assumed that the causal mask removes the same fraction of the query-key pairs on every shard.
        """
        members = self.model.group.members
        rows = _sums("rows_by_pcp", chunks)
        busy = len(rows) - rows.count(0)
        if window is None and not chunks[0].prefill and sum(rows) == len(chunks):
            needed = _sums("tokens_by_shard", chunks)
            calls = len(chunks) if self._per_segment else busy
            by_shard = [ComputeLoad(calls, reads, reads) for reads in needed]
            each = [len(chunks), sum(needed), sum(needed)]
            by_pcp = [each] if len(rows) == 1 else _by_pcp(chunks, len(rows))
        else:
            needed, by_shard, by_pcp = self._general(chunks, window, len(rows))
        at_pcp = [
            ComputeLoad((count if self._per_segment else min(count, 1)) * members, int(reads), int(pairs))
            for count, reads, pairs in by_pcp
        ]
        return WorkloadTotals(rows, needed, tuple(by_shard), tuple(at_pcp))

    def _general(
        self, chunks: Sequence[Chunk], window: int | None, indices: int
    ) -> tuple[tuple[int, ...], list[ComputeLoad], list[list[int]]]:
        """(tokens needed of each shard, loads by shard, [segments, reads, pairs] by pcp index) of any chunks."""
        reads, pairs = [0.0] * self.model.group.members, [0.0] * self.model.group.members
        by_pcp = [[0, 0, 0] for _ in range(indices)]
        for chunk in chunks:
            new, total = chunk.new_tokens, chunk.cached_tokens + chunk.new_tokens
            visible, of_chunk = 1.0, new * (chunk.cached_tokens + (new + 1) / 2)  # fraction of the tokens; pairs
            if window is not None:
                visible, of_chunk = min(1.0, (window + new - 1) / total), min(of_chunk, float(new * window))
            for shard, tokens in enumerate(chunk.tokens_by_shard):
                reads[shard] += tokens * visible
                pairs[shard] += of_chunk * tokens / total
            for counts, own in zip(by_pcp, chunk.rows_by_pcp, strict=True):
                if own:
                    counts[0] += 1
                    counts[1] += round(total * visible)
                    counts[2] += round(of_chunk * own / new)
        calls = len(chunks) if self._per_segment else sum(counts[0] != 0 for counts in by_pcp)
        loads = [ComputeLoad(calls, round(read), round(pair)) for read, pair in zip(reads, pairs, strict=True)]
        return tuple(map(round, reads)), loads, by_pcp


def _sums(field: str, chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """The elementwise sum of a field of all chunks."""
    return tuple(map(sum, zip(*map(attrgetter(field), chunks), strict=True)))


def _by_pcp(chunks: Sequence[Chunk], indices: int) -> list[list[int]]:
    """[segments, reads, pairs] by pcp index, of chunks that have one row each."""
    found = [[0, 0, 0] for _ in range(indices)]
    for chunk in chunks:
        counts = found[chunk.rows_by_pcp.index(1)]
        counts[0] += 1
        counts[1] += chunk.cached_tokens + 1
        counts[2] += chunk.cached_tokens + 1
    return found
