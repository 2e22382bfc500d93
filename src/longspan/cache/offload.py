"""Pages that were evicted from the device: which of them are in host memory and on disk, and what a step copies.

It owns keys, slots, the order of eviction, and the measured cost of loads; it must not copy anything, nor know which
request needs a page.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from longspan.cache.pages import PageRef
from longspan.cache.prefix import Key

_TOKENS_TO_TRUST = 2048  # a step with this many tokens weighs as much as all measurements before it
_PAGES_TO_TRUST = 64  # the same for a step that loads pages
_FADES = 0.1  # largest fraction by which a step that computes tokens lowers the measured time of loads
_REST_SECONDS = 60.0
_LOG = logging.getLogger("longspan.cache")


class Tier(StrEnum):
    """A storage tier for evicted pages, the fastest first."""

    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True)
class Spill:
    """The page in a host memory slot is copied to disk before a save overwrites the slot."""

    # slot on disk
    slot: int
    # key of the page that is moved
    key: Key


@dataclass(frozen=True)
class PageSave:
    """A page is copied from the device to a slot of another tier, before the step writes to the page."""

    # the page on the device
    page: PageRef
    # where it goes
    tier: Tier
    # slot of this tier
    slot: int
    # key of the page's content
    key: Key
    # what becomes of the slot's old content; None if it is not kept
    spill: Spill | None = None


@dataclass(frozen=True)
class PageLoad:
    """A page is copied from a slot of another tier to the device, before the step reads the page."""

    # the page on the device
    page: PageRef
    # where its content is
    tier: Tier
    # slot of this tier
    slot: int
    # key of the content
    key: Key


@dataclass(frozen=True)
class OffloadCounters:
    """Numbers of pages copied so far."""

    # from the device to the first tier
    saved: int = 0
    # from host memory to disk
    spilled_to_disk: int = 0
    # from host memory to the device
    loaded_from_memory: int = 0
    # from disk to the device
    loaded_from_disk: int = 0
    # loads that found the page missing or damaged; such pages are computed again
    lost: int = 0


@dataclass(frozen=True)
class LoadRates:
    """What computing and loading took in recent steps. A rate that is not known yet counts as zero."""

    # seconds to compute a token
    token: float | None = None
    # seconds to load a page, by tier
    page: Mapping[Tier, float] = field(default_factory=dict)

    def pays(self, tier: Tier, page_size: int) -> bool:
        """Whether loading a page takes less time than computing its tokens."""
        return self.token is None or self.page.get(tier, 0.0) < self.token * page_size

    def computed(self, tokens: int, seconds: float) -> LoadRates:
        """The rates after a step that only computed `tokens` tokens.

        The time of loads is lowered a little, so that one slow load does not prevent all later ones.
        """
        weight = tokens / (tokens + _TOKENS_TO_TRUST)
        faded = {tier: page * (1 - _FADES * weight) for tier, page in self.page.items()}
        return LoadRates(_blend(self.token, seconds / tokens, weight), faded)

    def loaded(self, tier: Tier, pages: int, seconds: float) -> LoadRates:
        """The rates after a step that only loaded `pages` pages from `tier`."""
        latest = _blend(self.page.get(tier), seconds / pages, pages / (pages + _PAGES_TO_TRUST))
        return replace(self, page={**self.page, tier: latest})


def _blend(known: float | None, latest: float, weight: float) -> float:
    return latest if known is None else known + weight * (latest - known)


class _Slots:
    """The slots of one tier and the keys in them, least recently used first.

    A key is busy while a step in flight reads or writes its slot. A busy slot is not reused, because ranks do not wait
    for each other between steps: a fast rank would overwrite what a slow one still has to read.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.busy: set[Key] = set()
        self._free: list[int] = []  # slots that were used and freed
        self._untouched = iter(range(count))  # slots that were never used
        self._slot_of: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def use(self, key: Key) -> int:
        """The slot of a key, which becomes the most recently used."""
        self._slot_of.move_to_end(key)
        return self._slot_of[key]

    def put(self, key: Key) -> tuple[int, Key | None] | None:
        """(slot, evicted key or None) for a new key, which is busy from now on; None if all slots are busy."""
        slot, victim = self._free.pop() if self._free else next(self._untouched, None), None
        if slot is None:
            victim = next((old for old in self._slot_of if old not in self.busy), None)
            if victim is None:
                return None
            slot = self._slot_of.pop(victim)
        self._slot_of[key] = slot
        self.busy.add(key)
        return slot, victim

    def drop(self, key: Key) -> None:
        """Forget a key that is not busy."""
        self._free.append(self._slot_of.pop(key))


class OffloadIndex:
    """Which key is in which slot of host memory and of disk. A key may be in both, and on the device too.

    A page that is evicted from the device is saved to host memory, and a page that is evicted from there is copied to
    disk. If no slot can be had, the page is dropped. Copies are collected until `take` returns them for a step, and
    `settle` is called when this step is committed.
    """

    def __init__(self, memory_slots: int, disk_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rates = LoadRates()
        self._clock = clock
        self._disk_rests_until = float("-inf")
        self._disk_refuses = False  # and has been warned of
        self._tiers = {Tier.MEMORY: _Slots(memory_slots), Tier.DISK: _Slots(disk_slots)}
        self._first = Tier.MEMORY if memory_slots else Tier.DISK  # where evicted pages are saved
        self._key_of: dict[PageRef, Key] = {}  # of published pages on the device
        self._saves: list[PageSave] = []  # of the next step, as are the loads
        self._loads: list[PageLoad] = []
        self._counts: Counter[str] = Counter()

    @property
    def counters(self) -> OffloadCounters:
        """Numbers of pages copied so far."""
        return OffloadCounters(**self._counts)

    @property
    def loads_waiting(self) -> int:
        """Number of pages that the next step loads."""
        return len(self._loads)

    @property
    def copies_waiting(self) -> bool:
        """Whether the next step has pages to save or to load."""
        return bool(self._saves or self._loads)

    def find(self, key: Key) -> Tier | None:
        """The fastest tier that has a key; None if no tier has it."""
        return next((tier for tier, slots in self._tiers.items() if key in slots), None)

    def is_busy(self, key: Key) -> bool:
        """Whether a step in flight, or the next one, copies this key's page."""
        return any(key in slots.busy for slots in self._tiers.values())

    def published(self, key: Key, page: PageRef) -> None:
        """Note the key of a page on the device that has joined the prefix cache."""
        self._key_of[page] = key

    def evicted(self, page: PageRef) -> None:
        """A published page is evicted from the device: save it, unless the first tier has it already."""
        key = self._key_of.pop(page)
        slots = self._tiers[self._first]
        if key in slots:
            slots.use(key)
            return
        placed = self._put(self._first, key)
        if placed is None:  # all slots are busy: the page is dropped
            return
        slot, victim = placed
        spill = self._spill(victim) if victim is not None and self._first is Tier.MEMORY else None
        self._saves.append(PageSave(page, self._first, slot, key, spill))

    def hold(self, key: Key) -> tuple[Tier, int]:
        """(tier, slot) of a key that some tier has. The slot stays busy until the step that loads it is settled."""
        tier = Tier.MEMORY if key in self._tiers[Tier.MEMORY] else Tier.DISK
        self._tiers[tier].busy.add(key)
        return tier, self._tiers[tier].use(key)

    def load(self, load: PageLoad) -> None:
        """Add a load to the next step; its slot must have been held."""
        self._loads.append(load)

    def take(self) -> tuple[tuple[PageSave, ...], tuple[PageLoad, ...]]:
        """(saves, loads) of the next step, which makes all saves before the loads. They are returned once."""
        saves, self._saves = tuple(self._saves), []
        loads, self._loads = tuple(self._loads), []
        return saves, loads

    def settle(
        self, saves: Sequence[PageSave], loads: Sequence[PageLoad], lost: Collection[int], unsaved: Collection[int] = ()
    ) -> None:
        """A step has copied these; `lost` are the numbers of loads whose page was not as it had been saved, `unsaved`
        those of saves of which the disk did not take the page."""
        for number, save in enumerate(saves):
            self._tiers[save.tier].busy.discard(save.key)
            if save.spill:
                self._tiers[Tier.DISK].busy.discard(save.spill.key)
            written = save.spill.key if save.spill else save.key if save.tier is Tier.DISK else None
            taken = number not in unsaved
            self._counts["saved"] += taken or save.tier is Tier.MEMORY
            self._counts["spilled_to_disk"] += taken and save.spill is not None
            if written is not None:
                self._wrote(written, taken)
        for number, load in enumerate(loads):
            self._tiers[load.tier].busy.discard(load.key)
            self._counts["lost" if number in lost else f"loaded_from_{load.tier}"] += 1
            if number in lost:
                self._tiers[load.tier].drop(load.key)

    def took(self, loads: Sequence[PageLoad], prefilled: int, decoded: int, seconds: float) -> None:
        """Update the rates from a step that ran alone, if it mostly prefilled without loads, or only loaded.

        `prefilled` and `decoded` are the numbers of tokens that it computed; loads count if they are of one tier.
        """
        if prefilled > decoded and not loads:
            self.rates = self.rates.computed(prefilled, seconds)
        elif not prefilled + decoded and len({load.tier for load in loads}) == 1:
            self.rates = self.rates.loaded(loads[0].tier, len(loads), seconds)

    def _spill(self, key: Key) -> Spill | None:
        """How a page that leaves host memory gets to disk; None if disk has it already, or has no slot."""
        disk = self._tiers[Tier.DISK]
        if key in disk:
            return None
        placed = self._put(Tier.DISK, key)
        if placed is None:
            return None
        return Spill(placed[0], key)

    def _put(self, tier: Tier, key: Key) -> tuple[int, Key | None] | None:
        """See `_Slots.put`; nothing goes to a disk that rests."""
        if tier is Tier.DISK and self._clock() < self._disk_rests_until:
            return None
        return self._tiers[tier].put(key)

    def _wrote(self, key: Key, taken: bool) -> None:
        """The disk took a page, or did not: then no other is tried for a while, and that is said once."""
        if not taken:
            self._tiers[Tier.DISK].drop(key)
            self._disk_rests_until = self._clock() + _REST_SECONDS
            if not self._disk_refuses:
                _LOG.warning(
                    "the disk of --kv-offload-disk took no page: it is full or broken; the engine goes on without "
                    "saving there, and tries again every %g s",
                    _REST_SECONDS,
                )
        self._disk_refuses = not taken
