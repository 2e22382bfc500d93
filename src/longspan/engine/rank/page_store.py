"""Offloaded pages: files for host memory and disk, which the driver opens and to which ranks copy pages.

It owns bytes, slots and checksums; the plan decides which page goes where.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from zlib import crc32

import torch
from torch import Tensor

from longspan.attention.pool import KVPool
from longspan.cache.offload import PageLoad, PageSave, Tier
from longspan.cache.prefix import Key
from longspan.config import require
from longspan.engine.rank.page_staging import CudaStreams, PageStaging, Streams
from longspan.engine.setup import EngineSetup
from longspan.errors import ConfigError, EngineError
from longspan.parallel.sharding import Sharding

_KEY_BYTES = 16
_HEADER_BYTES = 32  # key, checksum and padding, so that the data after it is aligned
_MEMORY_INFO = Path("/proc/meminfo")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class PagePart:
    """The part of a slot that holds a rank's record of a page.

    Ranks of the same stage and head shard have the same part, so each can read what another of them wrote.
    """

    # the record's offset in the slot, in bytes
    start: int
    # size of the record
    record_bytes: int
    # size of the slot: the records of all parts
    slot_bytes: int


def parts_of_a_slot(setup: EngineSetup) -> list[PagePart]:
    """The part of each rank, in rank order."""
    model, grid = setup.model, setup.grid
    sizes: dict[tuple[int, int], int] = {}
    for place in grid.ranks:
        sharding = Sharding(grid, place.rank, model.num_q_heads, model.num_kv_heads)
        layers, heads = model.cached_layers(*sharding.extent("layers", model.num_layers)), sharding.kv_extent
        last = setup.drafts if place.pp == grid.pp - 1 else None
        drafts = last.layout_of(grid, place.rank).bytes_per_token if last else 0
        held, stored = layers[1] - layers[0], heads[1] - heads[0]
        own = replace(setup.layout, num_layers=held, kv_heads=stored, draft_bytes=drafts)
        sizes[place.pp, place.head_shard] = _HEADER_BYTES + own.bytes_per_token * setup.config.cache.page_size
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    keys = [(place.pp, place.head_shard) for place in grid.ranks]
    return [PagePart(ends[key] - sizes[key], sizes[key], sum(sizes.values())) for key in keys]


class OffloadFiles:
    """The driver's side: opens a file for each tier and counts the pages that it can hold. Raises `ConfigError`.

    The files have no name in any folder. Ranks open them through the driver's file descriptors, whose paths are in
    `setup`. The kernel frees the files when the driver's process ends, for whatever reason.
    """

    def __init__(self, setup: EngineSetup) -> None:
        offload = setup.config.cache.offload
        self._files: list[IO[bytes]] = []
        self._slot_bytes = parts_of_a_slot(setup)[0].slot_bytes
        several = len(setup.grid.nodes(tuple(range(setup.grid.world_size)))) > 1
        require(
            not several, "kv_offload", "on", "ranks on several machines cannot share its files",
            "leave it out, or leave out --ranks-per-node",
        )  # fmt: skip
        try:
            memory_file, self.memory_slots = self._memory(offload.memory_bytes)
            disk_file, self.disk_slots = self._disk(offload.disk, offload.disk_bytes)
        except BaseException:
            self.close()
            raise
        opened = replace(offload, memory_file=memory_file, disk_file=disk_file)
        self.setup = replace(setup, config=replace(setup.config, cache=replace(setup.config.cache, offload=opened)))

    def close(self) -> None:
        """Close the files. May be called more than once."""
        for file in self._files:
            file.close()

    def _memory(self, size: int | None) -> tuple[str | None, int]:
        if size is None:
            return None, 0
        slots = self._slots("kv_offload_memory", size, _free_memory())
        file = os.fdopen(os.memfd_create("longspan-kv"), "r+b", buffering=0)
        file.truncate(slots * self._slot_bytes)
        return self._keep(file), slots

    def _disk(self, folder: str | None, size: int | None) -> tuple[str | None, int]:
        if folder is None:
            return None, 0
        try:
            path = self._keep(TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115
            found = os.statvfs(folder)
        except OSError as error:
            raise ConfigError(
                "kv_offload_disk", folder, f"cannot be written ({error.strerror})", "name a folder that can be"
            ) from error
        free = found.f_bavail * found.f_frsize
        return path, self._slots("kv_offload_disk", free // 2 if size is None else size, free)

    def _slots(self, field: str, size: int, free: int) -> int:
        least = self._slot_bytes
        require(size >= least, field, size, f"one page takes {least} bytes on all ranks", f"give at least {least}")
        require(size <= free, field, size, f"only {free} bytes are free", "give less")
        return size // least

    def _keep(self, file: IO[bytes]) -> str:
        self._files.append(file)
        return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _free_memory() -> int:
    """Bytes of memory that the host has left, but no more than the limit of the container."""
    lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):  # no container, or one without a limit
        free = min(free, int(_MEMORY_LIMIT.read_text()))
    return free


class PageStore:
    """Copies pages between a rank's pool and its part of the slots.

    A record is a header (the page's key, and on disk a checksum) and the rank's layers and heads of the page; those of
    a checkpoint of its own that drafts are in the pool `drafts`. With `streams`, and on a GPU, copies go through
    `PageStaging`.
    """

    def __init__(
        self, setup: EngineSetup, rank: int, pool: KVPool, streams: Streams | None = None, drafts: KVPool | None = None
    ) -> None:
        offload, page_size = setup.config.cache.offload, setup.config.cache.page_size
        self._part = parts_of_a_slot(setup)[rank]
        self._shard = setup.grid.ranks[rank].shard
        # of each pool the values of all layers, and the scales of all layers if the cache is quantised
        kinds = [kind for one in (pool, drafts) if one is not None for kind in _kinds(one)]
        self._pages = [[_by_page(rows, page_size) for rows in kind] for kind in kinds]
        self._sizes = [sum(page[:, :, 0].numel() for page in pages) for pages in self._pages]
        self._scratch = torch.empty(self._part.record_bytes, dtype=torch.uint8)
        # another one for loads: one step may still save when the next one loads
        self._arrived = torch.empty(self._part.record_bytes, dtype=torch.uint8)
        self._streams = streams or (CudaStreams(pool.device) if pool.device.type == "cuda" else None)
        every = [page for pages in self._pages for page in pages]
        self._staging = None if self._streams is None else PageStaging(every, self._streams)
        self._memory = self._scratch if offload.memory_file is None else _mapped(offload.memory_file)
        self._disk = None if offload.disk_file is None else _unbuffered(offload.disk_file)

    def start(self, saves: Sequence[PageSave], loads: Sequence[PageLoad]) -> Callable[[], tuple[list[int], list[int]]]:
        """Start the copies of a step, before its kernels are launched.

        The returned function must be called before the step is committed. It waits for the copies, and returns the
        indices in `saves` of which a write to disk failed, and those in `loads` of pages that are damaged.
        """
        if self._staging is None or self._streams is None:
            found = self.save(saves), self.load(loads)
            return lambda: found
        own = [(number, save) for number, save in enumerate(saves) if save.page.shard == self._shard]
        rows, saved = self._staging.save([save.page.index for _, save in own]) if own else (None, _nothing)
        lost, loaded = self._start_loads(loads, self._staging, self._streams)

        def finish() -> tuple[list[int], list[int]]:
            saved()
            failed = [n for row, (n, save) in enumerate(own) if rows is not None and not self._save(save, rows[row])]
            loaded()
            return failed, lost

        return finish

    def save(self, saves: Sequence[PageSave]) -> list[int]:
        """Save the pages that are on this rank's shard. Returns the indices in `saves` of which a write to disk
        failed."""
        own = [(number, save) for number, save in enumerate(saves) if save.page.shard == self._shard]
        return [number for number, save in own if not self._save(save)]

    def load(self, loads: Sequence[PageLoad]) -> list[int]:
        """Load the pages that are for this rank's shard. Returns the indices in `loads` of pages that are damaged."""
        lost: list[int] = []
        for number, load in enumerate(loads):
            if load.page.shard != self._shard:
                continue
            data = self._load(load)
            if data is None:
                lost.append(number)
            else:
                self._scatter(load.page.index, data)
        return lost

    def _start_loads(
        self, loads: Sequence[PageLoad], staging: PageStaging, streams: Streams
    ) -> tuple[list[int], Callable[[], None]]:
        """The indices of pages that are damaged, and a function that waits until the others are in the pool."""
        own = [(number, load) for number, load in enumerate(loads) if load.page.shard == self._shard]
        if not own:
            return [], _nothing
        rows = streams.host(len(own), self._part.record_bytes - _HEADER_BYTES)
        lost: list[int] = []
        intact: list[int] = []
        for number, load in own:
            data = self._load(load)
            if data is None:
                lost.append(number)
            else:
                rows[len(intact)].copy_(data)
                intact.append(load.page.index)
        return lost, staging.load(intact, rows[: len(intact)]) if intact else _nothing

    def _save(self, save: PageSave, row: Tensor | None = None) -> bool:
        """Save a page, from the pool or from its bytes `row`. False if a write to disk failed."""
        record = self._in_memory(save.slot) if save.tier is Tier.MEMORY else self._scratch
        # the slot's page moves to disk before it is overwritten
        written = not save.spill or self._write(save.spill.slot, save.spill.key, record)
        if row is None:
            self._gather(save.page.index, record[_HEADER_BYTES:])
        else:
            record[_HEADER_BYTES:].copy_(row)
        if save.tier is Tier.MEMORY:
            _buffer(record)[:_KEY_BYTES] = save.key
            return written
        return self._write(save.slot, save.key, record)

    def _load(self, load: PageLoad) -> Tensor | None:
        """The bytes of a page; None if it is damaged. The next load overwrites those that come from disk."""
        if load.tier is Tier.MEMORY:
            record = self._in_memory(load.slot)
            intact = _buffer(record)[:_KEY_BYTES] == load.key
        else:
            record = self._arrived
            intact = self._read(load.slot, load.key, record)
        return record[_HEADER_BYTES:] if intact else None

    def _in_memory(self, slot: int) -> Tensor:
        at = self._offset(slot)
        return self._memory[at : at + self._part.record_bytes]

    def _offset(self, slot: int) -> int:
        return slot * self._part.slot_bytes + self._part.start

    def _write(self, slot: int, key: Key, record: Tensor) -> bool:
        """Whether the disk has all of it. What it has in part is no page: its checksum is wrong."""
        data = _buffer(record)[_HEADER_BYTES:]
        try:
            written = os.pwritev(self._on_disk, [_header(key, data), data], self._offset(slot))
        except OSError:
            return False
        return written == _HEADER_BYTES + len(data)

    def _read(self, slot: int, key: Key, record: Tensor) -> bool:
        """Read a record from disk into `record`, uint8 [record_bytes]; False if it is not the one that was written."""
        whole = _buffer(record)
        try:
            read = os.preadv(self._on_disk, [whole], self._offset(slot))
        except OSError:
            return False
        return read == len(whole) and whole[:_HEADER_BYTES] == _header(key, whole[_HEADER_BYTES:])

    @property
    def _on_disk(self) -> int:
        if self._disk is None:
            raise EngineError("a plan names the disk, and no --kv-offload-disk was given")
        return self._disk.fileno()

    def _gather(self, index: int, data: Tensor) -> None:
        """Copy page `index` of every layer into `data`, uint8 [bytes]: all values, then all scales."""
        for pages, part in zip(self._pages, torch.split(data, self._sizes), strict=True):
            part.copy_(torch.stack([page[:, :, index] for page in pages]).flatten())

    def _scatter(self, index: int, data: Tensor) -> None:
        """The inverse of `_gather`: copy `data`, uint8 [bytes], to page `index` of every layer."""
        for pages, part in zip(self._pages, torch.split(data, self._sizes), strict=True):
            layers = part.to(pages[0].device).view(len(pages), *pages[0][:, :, index].shape)
            for page, layer in zip(pages, layers, strict=True):
                page[:, :, index] = layer


def _nothing() -> None:
    """Nothing to wait for."""


def _kinds(pool: KVPool) -> list[list[Tensor]]:
    """The tensors of a pool, in lists of one shape."""
    caches = list(pool.layers.values())
    values, scales = [cache.values for cache in caches], [c.scales for c in caches if c.scales is not None]
    return [kind for kind in (values, scales) if kind]


def _by_page(rows: Tensor, page_size: int) -> Tensor:
    """Rows [kv_factor, Hkv, S, D] as uint8 [kv_factor, Hkv, pages, bytes of a page], sharing memory."""
    kv_factor, heads, slots, _ = rows.shape
    return rows.view(torch.uint8).view(kv_factor, heads, slots // page_size, -1)


def _mapped(path: str) -> Tensor:
    with _unbuffered(path) as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


def _unbuffered(path: str) -> IO[bytes]:
    return Path(path).open("r+b", buffering=0)


def _buffer(data: Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]


def _header(key: Key, data: memoryview) -> bytes:
    return (key + crc32(data).to_bytes(4, "little")).ljust(_HEADER_BYTES, b"\0")
