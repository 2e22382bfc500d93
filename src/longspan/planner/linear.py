"""The time of a step outside attention, by its number of rows.

It owns the formulas of matrix products, mixtures of experts, all-reduces of the TP group and kernel launches; it must
not know requests, their contexts, or how attention is computed.
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

_MIN_ROWS = 16  # rows of a tensor core's smallest tile
_HIDDEN_PASSES, _INNER_PASSES = 8, 4  # how often norms, sums and activations read or write a row
# kernels of a layer besides its products: norms, rotary embedding and cache; routing and sorting of a mixture
_SMALL_KERNELS, _MIXTURE_KERNELS = 6, 5


@dataclass(frozen=True)
class Seconds:
    """A time in seconds, divided by what bounds it."""

    compute: float = 0.0  # arithmetic
    memory: float = 0.0  # reading and writing memory
    link: float = 0.0  # transfers between ranks
    latency: float = 0.0  # starts of kernels and collectives, and the host

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.compute + self.memory + self.link + self.latency

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.compute + other.compute, self.memory + other.memory,
            self.link + other.link, self.latency + other.latency,
        )  # fmt: skip

    def times(self, factor: float) -> Seconds:
        """The time multiplied by `factor`."""
        return Seconds(self.compute * factor, self.memory * factor, self.link * factor, self.latency * factor)


@dataclass(frozen=True)
class Links:
    """The links of a group of ranks. Each rank of a machine has its own link to other machines."""

    hardware: Hardware
    members: int  # ranks of the group
    nodes: int  # machines that they are on
    per_node: int  # the most ranks of the group on one machine

    @staticmethod
    def of(hardware: Hardware, nodes: Sequence[Sequence[int]]) -> Links:
        """The links of a group of ranks; `nodes` lists the ranks on each machine."""
        return Links(hardware, sum(map(len, nodes)), len(nodes), max(map(len, nodes)))

    @property
    def latency(self) -> float:
        """Seconds of a collective of size 0: once inside a machine, then a tree over the machines."""
        if self.members == 1:
            return 0.0
        inside = self.hardware.message_s if self.per_node != 1 else 0.0
        return inside + math.ceil(math.log2(self.nodes)) * self.hardware.cross_message_s

    def all_reduce(self, size: float) -> Seconds:
        """Time of an all-reduce of `size` bytes.

        A ring inside each machine runs at the same time as rings between machines, whose bytes are divided over the
        links of a machine.
        """
        inside = 2 * (self.per_node - 1) / self.per_node * size * self.hardware.byte_s
        between = 2 * (self.members - 1) / self.members * size / self.per_node * self.hardware.cross_byte_s
        return Seconds(link=max(inside, between if self.nodes != 1 else 0.0), latency=self.latency)

    def send(self, size: float) -> Seconds:
        """Time in which each member sends `size` bytes, divided evenly over the other members."""
        if self.members == 1:
            return Seconds()
        outside = (self.members - self.per_node) / (self.members - 1)
        inside, between = (1 - outside) * self.hardware.byte_s, outside * self.hardware.cross_byte_s
        return Seconds(link=size * max(inside, between), latency=self.latency)


class LinearTime:
    """The time of everything outside attention, for a number of rows on the busiest rank."""

    def __init__(self, deployment: Deployment) -> None:
        grid, self._at, self._hardware = deployment.grid, deployment, deployment.hardware
        self._tp = Links.of(self._hardware, grid.nodes(grid.tp_group(0)))
        self._experts = Links.of(self._hardware, grid.nodes(grid.expert_group(0)))
        self._stages = Links.of(self._hardware, grid.nodes(grid.pipeline_group(0)))

    def layers(self, rows: int, all_rows: int) -> Seconds:
        """All layers. The busiest rank has `rows` rows, and all pcp indices together have `all_rows`."""
        at = self._at
        mixed = at.moe_layers
        each = self._product(at.attention, rows) + self._passes(rows)
        found = each.times(at.model.num_layers)
        if mixed != at.model.num_layers:
            found += self._product(at.ffn, rows).times(at.model.num_layers - mixed)
        if mixed:
            found += self._mixture(rows, all_rows).times(mixed)
        return found.times(self._slowdown(rows, all_rows))

    def _passes(self, rows: int) -> Seconds:
        """Norms, rotary embedding, activations and sums of one layer: they pass over its rows."""
        elements = rows * passed_elements(self._at.model, self._at.grid.tp)
        memory = elements * self._at.weights.embedding * self._hardware.read_s
        return Seconds(memory=memory, latency=_SMALL_KERNELS * self._hardware.kernel_s)

    def _mixture(self, rows: int, all_rows: int) -> Seconds:
        """One mixture of experts, on the rank that is expected to compute most when rows choose experts at random."""
        at, moe, machine = self._at, self._at.model.moe, self._hardware
        if moe is None:
            return Seconds()
        exchanged = at.parallel.enable_expert_parallel
        arriving = all_rows if exchanged else rows
        holders, chosen = at.expert_holders, moe.experts_per_token
        used = moe.num_experts * (1 - (1 - chosen / moe.num_experts) ** arriving)  # experts chosen by at least one row
        held = min(_fullest(used, holders), at.experts_held)
        work = min(_fullest(arriving * chosen, holders), arriving * chosen)
        padded = held * self._rounded(work / held)
        found = self._timed(at.expert, at.expert.elements * padded, at.expert.bytes * held, work / held, held)
        copies = rows * 4 * chosen * at.model.hidden_size / max(1.0, holders) * at.weights.embedding
        found += Seconds(memory=copies * machine.read_s, latency=(_MIXTURE_KERNELS + 2) * machine.kernel_s)
        found += self._product(at.shared, rows) + self._product(at.router, rows)
        if exchanged:
            # expected number of other ranks that hold an expert of a row
            others = (1 - (1 - 1 / self._experts.members) ** chosen) * (self._experts.members - 1)
            found += self._experts.send(rows * others * at.model.hidden_size * at.weights.embedding).times(2)
        return found

    def sums(self, rows: int) -> Seconds:
        """All-reduces of the TP group (two a layer and one for the embedding), and sends between pipeline stages."""
        size = rows * self._at.model.hidden_size * self._at.weights.embedding
        found = self._tp.all_reduce(size).times(2 * self._at.model.num_layers + 1)
        return found + self._stages.send(size).times(self._stages.members - 1)

    def _slowdown(self, rows: int, all_rows: int) -> float:
        """How many times longer a rank's work on `rows` takes because other ranks share the machine's cores.

        All ranks together compute `all_rows` rows at once.
        """
        machine, grid = self._hardware, self._at.grid
        if not machine.parallelism:
            return 1.0
        at_once = grid.tp * min(grid.pcp, all_rows / max(rows, 1))
        if not machine.sharing:
            return max(1.0, at_once / machine.parallelism)
        occupied = max(0.0, min(at_once, machine.cores) - 1) / max(machine.cores - 1, 1)  # part of the other cores
        factor = 1 + (_interpolate(machine.sharing, rows) - 1) * occupied
        return factor * max(1.0, at_once / machine.cores)

    def head(self, rows: int, all_rows: int) -> Seconds:
        """Logits of `rows` rows on the busiest rank, gathered over the TP group; `all_rows` on all pcp indices."""
        size = rows * self._at.model.vocab_size * 4
        return self._product(self._at.head, rows).times(self._slowdown(rows, all_rows)) + self._tp.send(size)

    def _product(self, part: WeightPart, rows: int) -> Seconds:
        """The products of one part of a layer."""
        if not part.products:
            return Seconds()
        flops = part.elements * self._rounded(rows)
        found = self._timed(part, flops, part.bytes, rows, 1)
        return found + Seconds(latency=part.products * self._hardware.kernel_s)

    def _timed(self, part: WeightPart, multiplied: float, size: float, rows: float, tables: float) -> Seconds:
        """The longer of `multiplied` multiply-adds and of reading `size` bytes of weights.

        On measured hardware, the measured time of `rows` rows on each of `tables` weights instead.
        """
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
        """`rows` rounded up to whole tiles; few rows use smaller tiles."""
        tile = self._hardware.tile_rows
        tile = tile if rows > tile else min(tile, _MIN_ROWS)
        return math.ceil(rows / tile) * tile


def passed_elements(model: ModelConfig, ranks: int = 1) -> float:
    """Elements that norms, sums and activations of a dense layer read and write for a row, on one of `ranks` ranks."""
    inner = (model.num_q_heads * model.head_dim + model.intermediate_size) / ranks
    return _HIDDEN_PASSES * model.hidden_size + _INNER_PASSES * inner


def measured(table: Sequence[tuple[int, float]], rows: float) -> float:
    """Seconds for `rows` rows: interpolated in a table in order of rows, and in proportion beyond its last entry."""
    return _interpolate(table, rows) * max(1.0, rows / table[-1][0])


def _interpolate(table: Sequence[tuple[int, float]], rows: float) -> float:
    """Linear interpolation in a table in order of rows; outside the table the value of its nearest end."""
    n = bisect_left(table, (rows, 0.0))
    if n in (0, len(table)):
        return table[n and -1][1]
    (below, least), (above, most) = table[n - 1], table[n]
    return least + (most - least) * (rows - below) / (above - below)


def _fullest(items: float, bins: int) -> float:
    """Expected number of items in the fullest bin when `items` items are put into random bins."""
    mean = items / bins
    return mean + math.sqrt(2 * mean * math.log(bins))
