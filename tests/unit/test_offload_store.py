"""What a rank copies to memory and disk comes back byte for byte, or is noticed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longspan import ConfigError
from longspan.attention.pool import KVPool
from longspan.cache.offload import PageLoad, PageSave, Spill, Tier
from longspan.cache.pages import PageRef
from longspan.config import CacheConfig, EngineConfig, OffloadConfig, ParallelConfig
from longspan.engine.rank.page_staging import PageStaging
from longspan.engine.rank.page_store import OffloadFiles, PageStore, parts_of_a_slot
from longspan.engine.setup import resolve
from longspan.parallel.sharding import Sharding
from tests.oracle import tiny_folder

KEY, OTHER = b"k" * 16, b"o" * 16
PAGE = 4


class Bench:
    """Files of both tiers, and stores with pools of random pages for every rank of a layout."""

    def __init__(self, folder, model="llama", dtype="auto", offload=None, **layout):
        offload = offload or OffloadConfig(memory_bytes=1 << 18, disk=str(folder), disk_bytes=1 << 18)
        cache = CacheConfig(page_size=PAGE, dtype=dtype, offload=offload)
        names = {"tp": "tensor", "pcp": "prefill_context", "dcp": "decode_context", "pp": "pipeline"}
        sizes = {f"{names[name]}_parallel_size": size for name, size in layout.items()}
        self.files = OffloadFiles(
            resolve(EngineConfig(tiny_folder(model), parallel=ParallelConfig(**sizes), cache=cache, dtype="float32"))
        )
        self.setup = self.files.setup
        self.pools = [self._pool(rank) for rank in range(self.setup.grid.world_size)]
        self.stores = [PageStore(self.setup, rank, pool) for rank, pool in enumerate(self.pools)]

    def _pool(self, rank):
        setup, model = self.setup, self.setup.model
        sharding = Sharding(setup.grid, rank, model.num_q_heads, model.num_kv_heads)
        start, stop = sharding.kv_extent
        layers = range(*sharding.extent("layers", model.num_layers))
        pool = KVPool(setup.layout.with_kv_heads(stop - start), layers, 8, PAGE, setup.cache_dtype)
        for rows in pool.layers.values():
            rows.values.view(torch.uint8).random_(0, 256)
            if rows.scales is not None:
                rows.scales.view(torch.uint8).random_(0, 256)
        return pool

    def page(self, rank, index):
        """The bytes of a page, layer by layer."""
        found = []
        for rows in self.pools[rank].layers.values():
            for part in (rows.values, rows.scales):
                if part is not None:
                    found.append(part[:, :, index * PAGE : (index + 1) * PAGE].contiguous().view(torch.uint8))
        return found

    def path(self, tier):
        opened = self.setup.config.cache.offload
        return Path(opened.memory_file if tier is Tier.MEMORY else opened.disk_file)


@pytest.fixture
def bench(tmp_path):
    """`bench("llama", tp=2, ...)`; files are freed after the test."""
    made = []

    def make(*arguments, **options):
        made.append(Bench(tmp_path, *arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.files.close()


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("dtype", ["auto", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("model", ["llama", "deepseek-v3"])
def test_a_page_comes_back_as_it_was_and_touches_no_other(bench, model, dtype, tier):
    here = bench(model, dtype)
    store, saved = here.stores[0], here.page(0, 2)
    before = [here.page(0, index) for index in range(8)]
    store.save([PageSave(PageRef(0, 2), tier, 3, KEY)])
    assert store.load([PageLoad(PageRef(0, 5), tier, 3, KEY)]) == []
    assert equal(here.page(0, 5), saved)
    assert all(equal(here.page(0, index), before[index]) for index in range(8) if index != 5)


@pytest.mark.parametrize("tier", Tier)
def test_any_rank_with_the_same_part_reads_what_another_wrote(bench, tier):
    here = bench(tp=2, pcp=2, pp=2)
    ranks = here.setup.grid.ranks
    saved = {(place.pp, place.head_shard): here.page(place.rank, 1) for place in ranks if place.shard == 1}
    for store in here.stores:
        store.save([PageSave(PageRef(1, 1), tier, 0, KEY)])
    for place in ranks:
        lost = here.stores[place.rank].load([PageLoad(PageRef(0, 6), tier, 0, KEY)])
        assert lost == []
        if place.shard == 0:
            assert equal(here.page(place.rank, 6), saved[place.pp, place.head_shard])


def test_what_memory_gives_up_is_on_disk_afterwards(bench):
    here = bench()
    first, second = here.page(0, 0), here.page(0, 1)
    here.stores[0].save([
        PageSave(PageRef(0, 0), Tier.MEMORY, 0, KEY),
        PageSave(PageRef(0, 1), Tier.MEMORY, 0, OTHER, Spill(4, KEY)),
    ])  # fmt: skip
    loads = [PageLoad(PageRef(0, 6), Tier.DISK, 4, KEY), PageLoad(PageRef(0, 7), Tier.MEMORY, 0, OTHER)]
    assert here.stores[0].load(loads) == []
    assert equal(here.page(0, 6), first)
    assert equal(here.page(0, 7), second)


@pytest.mark.parametrize("where", ["first", "last", "key", "checksum"])
def test_a_flipped_bit_on_disk_is_noticed_and_the_page_left_alone(bench, where):
    here = bench()
    before = here.page(0, 5)
    here.stores[0].save([PageSave(PageRef(0, 2), Tier.DISK, 1, KEY), PageSave(PageRef(0, 3), Tier.DISK, 2, OTHER)])
    part = parts_of_a_slot(here.setup)[0]
    inside = {"first": 32, "last": part.record_bytes - 1, "key": 0, "checksum": 16}[where]
    with here.path(Tier.DISK).open("r+b") as file:
        file.seek(part.slot_bytes + inside)
        byte = file.read(1)[0]
        file.seek(part.slot_bytes + inside)
        file.write(bytes([byte ^ 4]))
    loads = [PageLoad(PageRef(0, 5), Tier.DISK, 1, KEY), PageLoad(PageRef(0, 6), Tier.DISK, 2, OTHER)]
    assert here.stores[0].load(loads) == [0]
    assert equal(here.page(0, 5), before)


@pytest.mark.parametrize("tier", Tier)
def test_an_intact_page_of_another_key_is_noticed(bench, tier):
    store = bench().stores[0]
    store.save([PageSave(PageRef(0, 2), tier, 1, OTHER)])
    assert store.load([PageLoad(PageRef(0, 5), tier, 1, KEY)]) == [0]


def no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("write", [no_space, lambda *_: 40], ids=["nothing", "a part"])
def test_a_page_that_could_not_be_written_is_noticed_at_once_and_when_it_is_loaded(bench, monkeypatch, write):
    store = bench().stores[0]
    first, second = (PageSave(PageRef(0, page), Tier.DISK, page, KEY) for page in (1, 2))
    assert store.save([first]) == []
    monkeypatch.setattr(os, "pwritev", write)
    assert store.save([first, second]) == [0, 1]
    assert store.save([PageSave(PageRef(0, 3), Tier.MEMORY, 0, KEY, Spill(3, OTHER))]) == [0]
    assert store.load([PageLoad(PageRef(0, 5), Tier.DISK, 2, KEY)]) == [0]


def test_parts_of_ranks_with_other_heads_or_layers_do_not_overlap(bench):
    parts = set(parts_of_a_slot(bench(tp=2, pp=2, pcp=2).setup))
    assert len(parts) == 4
    ends = sorted((part.start, part.start + part.record_bytes) for part in parts)
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert {part.slot_bytes for part in parts} == {ends[-1][1]}


def test_nothing_is_left_in_the_folder(bench, tmp_path):
    here = bench()
    here.stores[0].save([PageSave(PageRef(0, 2), Tier.DISK, 1, KEY)])
    assert list(tmp_path.iterdir()) == []
    here.files.close()
    assert not here.path(Tier.DISK).exists()


MISTAKES = {
    "no such folder": (OffloadConfig(disk="/nowhere"), r"kv_offload_disk=/nowhere: cannot be written \(No such"),
    "a file": (OffloadConfig(disk="/etc/hostname"), r"kv_offload_disk=/etc/hostname: cannot be written \(Not a dir"),
    "too little disk": (OffloadConfig(disk="/tmp", disk_bytes=9), r"kv_offload_disk=9: one page takes \d+ bytes"),
    "too much disk": (OffloadConfig(disk="/tmp", disk_bytes=1 << 60), r"kv_offload_disk=\d+: only \d+ bytes are free"),
    "too little memory": (
        OffloadConfig(memory_bytes=9), r"kv_offload_memory=9: one page takes \d+ bytes on all ranks; give at"
    ),
    "too much memory": (
        OffloadConfig(memory_bytes=1 << 60), r"kv_offload_memory=\d+: only \d+ bytes are free; give less"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_is_refused_at_the_start(tmp_path, mistake):
    offload, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        Bench(tmp_path, offload=offload)


def test_ranks_on_several_machines_are_refused(tmp_path):
    setup = resolve(EngineConfig(
        tiny_folder("llama"), parallel=ParallelConfig(prefill_context_parallel_size=2, ranks_per_node=1),
        cache=CacheConfig(offload=OffloadConfig(memory_bytes=1 << 20)),
    ))  # fmt: skip
    with pytest.raises(ConfigError, match=r"kv_offload=on: ranks on several machines cannot share"):
        OffloadFiles(setup)


def test_without_a_size_the_disk_tier_takes_half_of_what_is_free(tmp_path):
    files = Bench(tmp_path, offload=OffloadConfig(disk=str(tmp_path))).files
    slot = parts_of_a_slot(files.setup)[0].slot_bytes
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert files.disk_slots * slot == pytest.approx(free / 2, rel=0.2)
    files.close()


class Noted:
    """Streams that only note what waits for what; on a CPU everything is done at once."""

    def __init__(self):
        self.notes = []
        self.marks = 0

    def copying(self):
        self.notes.append("copy")
        return nullcontext()

    def copies_wait(self):
        self.notes.append("copies wait")

    def mark(self):
        self.marks += 1
        return SimpleNamespace(number=self.marks, synchronize=lambda: self.notes.append("host waits"))

    def steps_wait(self, mark):
        self.notes.append(f"steps wait for {mark.number}")

    def host(self, rows, size):
        return torch.empty(rows, size, dtype=torch.uint8)


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize(("model", "dtype"), [("llama", "auto"), ("llama", "int8"), ("deepseek-v3", "fp8_e4m3")])
def test_pages_that_are_staged_come_back_as_they_were_and_touch_no_other(bench, model, dtype, tier):
    here = bench(model, dtype)
    store = PageStore(here.setup, 0, here.pools[0], Noted())
    before = [[part.clone() for part in here.page(0, index)] for index in range(8)]
    saves = [PageSave(PageRef(0, page), tier, slot, KEY) for page, slot in ((2, 1), (0, 0), (7, 2))]
    finish = store.start(saves, [])
    for rows in here.pools[0].layers.values():  # the step overwrites what is saved, before the copy is waited for
        rows.values.view(torch.uint8)[:, :, 2 * PAGE : 3 * PAGE] = 5
    assert finish() == ([], [])
    assert store.start([], [PageLoad(PageRef(0, 4 + n), tier, n, KEY) for n in range(3)])() == ([], [])
    assert equal(here.page(0, 4), before[0]) and equal(here.page(0, 5), before[2]) and equal(here.page(0, 6), before[7])
    for other in (0, 1, 3, 7):
        assert equal(here.page(0, other), before[other])


def test_staged_copies_report_what_was_not_written_and_what_is_damaged(bench, monkeypatch):
    here = bench()
    store = PageStore(here.setup, 0, here.pools[0], Noted())
    saved = here.page(0, 1)
    first, second = (PageSave(PageRef(0, page), Tier.DISK, page, KEY) for page in (1, 2))
    assert store.start([first], [])() == ([], [])
    monkeypatch.setattr(os, "pwritev", no_space)
    loads = [PageLoad(PageRef(0, 5), Tier.DISK, 2, KEY), PageLoad(PageRef(0, 6), Tier.DISK, 1, KEY)]
    assert store.start([second], loads)() == ([0], [0])
    assert equal(here.page(0, 6), saved)


def test_steps_wait_for_the_copy_of_a_block_only_when_the_block_is_used_again(bench):
    """Blocks of one page, two of them: the third page waits until the first has been copied."""
    noted, pages = Noted(), [torch.arange(2 * 3 * 8 * 4, dtype=torch.uint8).view(2, 3, 8, 4) for _ in range(2)]
    staging = PageStaging(pages, noted, block_bytes=1)
    host, wait = staging.save([3, 1, 6])
    assert noted.notes == [*["copies wait", "copy"] * 2, "steps wait for 1", "copies wait", "copy"]
    wait()
    assert noted.notes[-1] == "host waits"
    assert torch.equal(host[1, :24].view(2, 3, 4), pages[0][:, :, 1])
    noted.notes.clear()
    staging.load([0], host[:1])()
    assert noted.notes == ["copies wait", "copy", "host waits"]
    assert torch.equal(pages[1][:, :, 0], pages[1][:, :, 3])
