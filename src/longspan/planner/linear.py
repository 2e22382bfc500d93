"""What a step takes outside attention, by the number of rows: products, mixtures, sums over the TP group, kernels.

It owns these formulas; it must not know requests, their contexts, nor how attention is computed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.engine.capacity import WeightPart
from longspan.models.config import ModelConfig
from longspan.planner.deployment import Deployment
from longspan.planner.hardware import Hardware

_LEAST_ROWS = 16  # of a tensor core's tile
_HIDDEN_PASSES, _INNER_PASSES = 8, 4  # how often norms, sums and activations read or write a row
_SMALL_KERNELS, _MIXTURE_KERNELS = 6, 5  # of a layer beside its products: norms, rope, cache; routing and sorting


@dataclass(frozen=True)
class Seconds:
    """Time by what bounds it; the sum is what it takes."""

    compute: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    latency: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.memory + self.link + self.latency

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.compute + other.compute, self.memory + other.memory,
            self.link + other.link, self.latency + other.latency,
        )  # fmt: skip

    def times(self, factor: float) -> Seconds:
        """So many of it."""
        return Seconds(self.compute * factor, self.memory * factor, self.link * factor, self.latency * factor)


@dataclass(frozen=True)
class Links:
    """A group of ranks that share `per_node` links between each two of `nodes` machines, on one kind of hardware."""

    hardware: Hardware
    members: int
    nodes: int
    per_node: int

    @staticmethod
    def of(hardware: Hardware, nodes: Sequence[Sequence[int]]) -> Links:
        """From the members by machine."""
        return Links(hardware, sum(map(len, nodes)), len(nodes), max(map(len, nodes)))

    @property
    def latency(self) -> float:
        """Seconds of a collective, whatever its size: within a machine, then a tree over machines."""
        if self.members == 1:
            return 0.0
        inside = self.hardware.message_s if self.per_node != 1 else 0.0
        return inside + math.ceil(math.log2(self.nodes)) * self.hardware.cross_message_s

    def all_reduce(self, size: float) -> Seconds:
        """Sum `size` bytes: a ring in each machine, while each of its links carries its share between machines."""
        inside = 2 * (self.per_node - 1) / self.per_node * size * self.hardware.byte_s
        between = 2 * (self.members - 1) / self.members * size / self.per_node * self.hardware.cross_byte_s
        return Seconds(link=max(inside, between if self.nodes != 1 else 0.0), latency=self.latency)

    def send(self, size: float) -> Seconds:
        """Each member hands `size` bytes to others alike."""
        if self.members == 1:
            return Seconds()
        outside = (self.members - self.per_node) / (self.members - 1)
        inside, between = (1 - outside) * self.hardware.byte_s, outside * self.hardware.cross_byte_s
        return Seconds(link=size * max(inside, between), latency=self.latency)


class LinearTime:
    """Everything but attention, for a number of rows on the busiest rank."""

    def __init__(self, deployment: Deployment) -> None:
        grid, self._at, self._hardware = deployment.grid, deployment, deployment.hardware
        self._tp = Links.of(self._hardware, grid.nodes(grid.tp_group(0)))
        self._experts = Links.of(self._hardware, grid.nodes(grid.expert_group(0)))
        self._stages = Links.of(self._hardware, grid.nodes(grid.pipeline_group(0)))

    def layers(self, rows: int, all_rows: int) -> Seconds:
        """All layers, where the busiest rank has `rows` and all pcp indices together `all_rows`."""
        at = self._at
        mixed = at.moe_layers
        each = self._product(at.attention, rows) + self._passes(rows)
        found = each.times(at.model.num_layers)
        if mixed != at.model.num_layers:
            found += self._product(at.ffn, rows).times(at.model.num_layers - mixed)
        if mixed:
            found += self._mixture(rows, all_rows).times(mixed)
        return found.times(self._crowding(rows, all_rows))

    def _passes(self, rows: int) -> Seconds:
        elements = rows * passed_elements(self._at.model, self._at.grid.tp)
        memory = elements * self._at.weights.embedding * self._hardware.read_s
        return Seconds(memory=memory, latency=_SMALL_KERNELS * self._hardware.kernel_s)

    def _mixture(self, rows: int, all_rows: int) -> Seconds:
        """The experts that the rows choose at random, on the rank that has drawn most."""
        at, moe, machine = self._at, self._at.model.moe, self._hardware
        if moe is None:
            return Seconds()
        exchanged = at.parallel.enable_expert_parallel
        arriving = all_rows if exchanged else rows
        holders, chosen = at.expert_holders, moe.experts_per_token
        touched = moe.num_experts * (1 - (1 - chosen / moe.num_experts) ** arriving)
        held = min(_most(touched, holders), at.experts_held)
        work = min(_most(arriving * chosen, holders), arriving * chosen)
        padded = held * self._rounded(work / held)
        found = self._timed(at.expert, at.expert.elements * padded, at.expert.bytes * held, work / held, held)
        copies = rows * 4 * chosen * at.model.hidden_size / max(1.0, holders) * at.weights.embedding
        found += Seconds(memory=copies * machine.read_s, latency=(_MIXTURE_KERNELS + 2) * machine.kernel_s)
        found += self._product(at.shared, rows) + self._product(at.router, rows)
        if exchanged:
            away = (1 - (1 - 1 / self._experts.members) ** chosen) * (self._experts.members - 1)
            found += self._experts.send(rows * away * at.model.hidden_size * at.weights.embedding).times(2)
        return found

    def sums(self, rows: int) -> Seconds:
        """All-reduces of the TP group, two a layer and the embedding's, and hand-overs between stages."""
        size = rows * self._at.model.hidden_size * self._at.weights.embedding
        found = self._tp.all_reduce(size).times(2 * self._at.model.num_layers + 1)
        return found + self._stages.send(size).times(self._stages.members - 1)

    def _crowding(self, rows: int, all_rows: int) -> float:
        """How much longer work on `rows` takes where ranks share a machine's cores, `all_rows` of it at once."""
        machine, grid = self._hardware, self._at.grid
        if not machine.parallelism:
            return 1.0
        at_once = grid.tp * min(grid.pcp, all_rows / max(rows, 1))
        if not machine.sharing:
            return max(1.0, at_once / machine.parallelism)
        beside = max(0.0, min(at_once, machine.cores) - 1) / max(machine.cores - 1, 1)
        full = 1 + (_between(machine.sharing, rows) - 1) * beside
        return full * max(1.0, at_once / machine.cores)

    def head(self, rows: int, all_rows: int) -> Seconds:
        """Logits of `rows` on the busiest rank, `all_rows` on all pcp indices, gathered."""
        size = rows * self._at.model.vocab_size * 4
        return self._product(self._at.head, rows).times(self._crowding(rows, all_rows)) + self._tp.send(size)

    def _product(self, part: WeightPart, rows: int) -> Seconds:
        if not part.products:
            return Seconds()
        flops = part.elements * self._rounded(rows)
        found = self._timed(part, flops, part.bytes, rows, 1)
        return found + Seconds(latency=part.products * self._hardware.kernel_s)

    def _timed(self, part: WeightPart, multiplied: float, size: float, rows: float, tables: float) -> Seconds:
        """The slower of `multiplied` multiply-adds and of reading `size` bytes; measured: `rows` on each table."""
        machine = self._hardware
        if machine.product_s:
            seconds = part.elements * tables * measured(machine.product_s, rows)
            reading = seconds < 2 * part.elements * tables * machine.product_s[0][1]
            return Seconds(memory=seconds) if reading else Seconds(compute=seconds)
        eight_bits = machine.fp8_tflops and part.element_bytes == 1
        rate = machine.fp8_tflops * machine.fp8_matmul if eight_bits else machine.tflops * machine.matmul
        compute, memory = 2 * multiplied / (rate * 1e12), size * machine.read_s
        return Seconds(compute=compute) if compute > memory else Seconds(memory=memory)

    def _rounded(self, rows: float) -> float:
        """Rows that are multiplied: whole tiles, smaller ones where there are few rows."""
        tile = self._hardware.tile_rows
        tile = tile if rows > tile else min(tile, _LEAST_ROWS)
        return math.ceil(rows / tile) * tile


def passed_elements(model: ModelConfig, ranks: int = 1) -> float:
    """How many elements norms, sums and activations of a dense layer read and write for a row, on one of so many."""
    inner = (model.num_q_heads * model.head_dim + model.intermediate_size) / ranks
    return _HIDDEN_PASSES * model.hidden_size + _INNER_PASSES * inner


def measured(table: Sequence[tuple[int, float]], rows: float) -> float:
    """Seconds for `rows` from a table in order of rows: between two entries in proportion, beyond the last too."""
    return _between(table, rows) * max(1.0, rows / table[-1][0])


def _between(table: Sequence[tuple[int, float]], rows: float) -> float:
    """What a table says for `rows`, its ends beyond them."""
    n = bisect_left(table, (rows, 0.0))
    if n in (0, len(table)):
        return table[n and -1][1]
    (below, least), (above, most) = table[n - 1], table[n]
    return least + (most - least) * (rows - below) / (above - below)


def _most(balls: float, bins: int) -> float:
    """How many of `balls` thrown into `bins` the fullest is expected to hold."""
    mean = balls / bins
    return mean + math.sqrt(2 * mean * math.log(bins))
