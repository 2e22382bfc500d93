"""Pages the device has no room for: which are in host memory and on disk, and what a step copies.

It owns keys, slots, their order of eviction, and what loading costs; it must not copy anything, nor know who
wants a page.
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

_TOKENS_TO_TRUST = 2048  # so many tokens, or pages, weigh as much as all that was measured before
_PAGES_TO_TRUST = 64
_FADES = 0.1
_REST_SECONDS = 60.0
_LOG = logging.getLogger("longspan.cache")


class Tier(StrEnum):
    """A place for pages beyond the device, the faster one first."""

    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True)
class Spill:
    """What was in a memory slot goes to this slot on disk before it is overwritten."""

    slot: int
    key: Key


@dataclass(frozen=True)
class PageSave:
    """A page is copied to a slot of `tier` before anything of the step overwrites it."""

    page: PageRef
    tier: Tier
    slot: int
    key: Key
    spill: Spill | None = None


@dataclass(frozen=True)
class PageLoad:
    """A page is filled from a slot of `tier` before anything of the step reads it."""

    page: PageRef
    tier: Tier
    slot: int
    key: Key


@dataclass(frozen=True)
class OffloadCounters:
    """Pages copied so far. `lost` were to be loaded, but were not as they had been saved: they are computed again."""

    saved: int = 0
    spilled_to_disk: int = 0
    loaded_from_memory: int = 0
    loaded_from_disk: int = 0
    lost: int = 0


@dataclass(frozen=True)
class LoadRates:
    """Seconds to compute a token and to load a page, as recent steps took them; what is not known counts as free."""

    token: float | None = None
    page: Mapping[Tier, float] = field(default_factory=dict)

    def pays(self, tier: Tier, page_size: int) -> bool:
        """Whether loading a page takes less time than computing its tokens."""
        return self.token is None or self.page.get(tier, 0.0) < self.token * page_size

    def computed(self, tokens: int, seconds: float) -> LoadRates:
        """With a step that computed `tokens`. What is known of loads fades: one slow one must not forbid all others."""
        weight = tokens / (tokens + _TOKENS_TO_TRUST)
        faded = {tier: page * (1 - _FADES * weight) for tier, page in self.page.items()}
        return LoadRates(_blend(self.token, seconds / tokens, weight), faded)

    def loaded(self, tier: Tier, pages: int, seconds: float) -> LoadRates:
        """With a step that did nothing but load `pages`."""
        latest = _blend(self.page.get(tier), seconds / pages, pages / (pages + _PAGES_TO_TRUST))
        return replace(self, page={**self.page, tier: latest})


def _blend(known: float | None, latest: float, weight: float) -> float:
    return latest if known is None else known + weight * (latest - known)


class _Slots:
    """The slots of one tier and their keys, the one used longest ago first.

    A key is `busy` while a step in flight reads or writes its slot: nobody else may then, because ranks do not wait
    for each other between steps.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.busy: set[Key] = set()
        self._free: list[int] = []  # given back
        self._untouched = iter(range(count))
        self._slot_of: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def use(self, key: Key) -> int:
        """The slot of a key, which becomes the last to be evicted."""
        self._slot_of.move_to_end(key)
        return self._slot_of[key]

    def put(self, key: Key) -> tuple[int, Key | None] | None:
        """A slot for a new key, busy from now on, and the key that leaves it. None if no slot can be had."""
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
    """Which key is in which slot of memory and disk; a key may be in both, and on the device too.

    Pages evicted from the device go to memory, what memory has no room for to disk, what that has no room for is lost.
    What must be copied is collected until `take`, and settled when the step that does it is committed.
    """

    def __init__(self, memory_slots: int, disk_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rates = LoadRates()
        self._clock = clock
        self._disk_rests_until = float("-inf")
        self._disk_refuses = False  # and has been warned of
        self._tiers = {Tier.MEMORY: _Slots(memory_slots), Tier.DISK: _Slots(disk_slots)}
        self._first = Tier.MEMORY if memory_slots else Tier.DISK
        self._key_of: dict[PageRef, Key] = {}
        self._saves: list[PageSave] = []
        self._loads: list[PageLoad] = []
        self._counts: Counter[str] = Counter()

    @property
    def counters(self) -> OffloadCounters:
        """What was copied."""
        return OffloadCounters(**self._counts)

    @property
    def loads_waiting(self) -> int:
        """Loads that the next step will carry out."""
        return len(self._loads)

    @property
    def copies_waiting(self) -> bool:
        """Whether the next step has something to copy."""
        return bool(self._saves or self._loads)

    def find(self, key: Key) -> Tier | None:
        """The fastest tier that has a key."""
        return next((tier for tier, slots in self._tiers.items() if key in slots), None)

    def is_busy(self, key: Key) -> bool:
        """Whether a step in flight, or the next one, copies this key's page."""
        return any(key in slots.busy for slots in self._tiers.values())

    def published(self, key: Key, page: PageRef) -> None:
        """A page of the device can be found by this key."""
        self._key_of[page] = key

    def evicted(self, page: PageRef) -> None:
        """A published page leaves the device: it is saved unless the fastest tier has it already."""
        key = self._key_of.pop(page)
        slots = self._tiers[self._first]
        if key in slots:
            slots.use(key)
            return
        placed = self._put(self._first, key)
        if placed is None:
            return
        slot, victim = placed
        spill = self._spill(victim) if victim is not None and self._first is Tier.MEMORY else None
        self._saves.append(PageSave(page, self._first, slot, key, spill))
        self._counts["saved"] += 1

    def hold(self, key: Key) -> tuple[Tier, int]:
        """Where a key is that `find` has found; it stays there until a step with its `load` is settled."""
        tier = Tier.MEMORY if key in self._tiers[Tier.MEMORY] else Tier.DISK
        self._tiers[tier].busy.add(key)
        return tier, self._tiers[tier].use(key)

    def load(self, load: PageLoad) -> None:
        """Have the next step fill a page of the device with what is held."""
        self._loads.append(load)

    def take(self) -> tuple[tuple[PageSave, ...], tuple[PageLoad, ...]]:
        """What the next step must copy: all saves first, then all loads."""
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
            if written is not None:
                self._wrote(written, number not in unsaved)
        for number, load in enumerate(loads):
            self._tiers[load.tier].busy.discard(load.key)
            self._counts["lost" if number in lost else f"loaded_from_{load.tier}"] += 1
            if number in lost:
                self._tiers[load.tier].drop(load.key)

    def took(self, loads: Sequence[PageLoad], prefilled: int, decoded: int, seconds: float) -> None:
        """A step with nothing beside it made these loads and computed these tokens: learn if it did one thing."""
        if prefilled > decoded and not loads:
            self.rates = self.rates.computed(prefilled, seconds)
        elif not prefilled + decoded and len({load.tier for load in loads}) == 1:
            self.rates = self.rates.loaded(loads[0].tier, len(loads), seconds)

    def _spill(self, key: Key) -> Spill | None:
        disk = self._tiers[Tier.DISK]
        if key in disk:
            return None
        placed = self._put(Tier.DISK, key)
        if placed is None:
            return None
        self._counts["spilled_to_disk"] += 1
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
