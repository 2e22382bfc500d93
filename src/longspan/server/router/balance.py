"""Which instance a request goes to: the one that will have it done first, by load and by what it has seen before.

It owns load and memory of prefixes, counted in bytes of prompts; pure, it must not know how requests travel.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import blake2b
from itertools import takewhile

_BLOCK_BYTES = 256
_MAX_BLOCKS = 1 << 12  # of one prompt: what lies behind is taken as new
_REMEMBERED = 1 << 16  # blocks an instance

Block = bytes


def blocks_of(prompt: bytes) -> list[Block]:
    """Keys of a prompt's beginnings: two prompts share as many as they begin alike."""
    found: list[Block] = []
    key = b""
    for start in range(0, min(len(prompt), _MAX_BLOCKS * _BLOCK_BYTES) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        key = blake2b(key + prompt[start : start + _BLOCK_BYTES], digest_size=8).digest()
        found.append(key)
    return found


class Balance:
    """Load and memory of the instances of one role, by name. `weight` is what a request costs beside its new bytes."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._load: dict[str, float] = {}
        self._seen: dict[str, OrderedDict[Block, None]] = {}

    def ranked(self, names: Collection[str], prompt: bytes, blocks: Sequence[Block]) -> list[str]:
        """All `names`, best first: by what they have to do, and would have to do for this prompt."""
        return sorted(names, key=lambda name: (self._load.get(name, 0.0) + self.cost(name, prompt, blocks), name))

    def cost(self, name: str, prompt: bytes, blocks: Sequence[Block]) -> float:
        """What a prompt adds to an instance's work."""
        seen = self._seen.get(name, OrderedDict())
        known = sum(1 for _ in takewhile(seen.__contains__, blocks))
        return self._weight + len(prompt) - known * _BLOCK_BYTES

    def begin(self, name: str, prompt: bytes, blocks: Sequence[Block]) -> float:
        """A request goes to an instance; returns the load it adds, for `end`."""
        added = self.cost(name, prompt, blocks)
        self._load[name] = self._load.get(name, 0.0) + added
        seen = self._seen.setdefault(name, OrderedDict())
        for block in reversed(blocks):  # the last ones are forgotten first
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > _REMEMBERED:
            seen.popitem(last=False)
        return added

    def end(self, name: str, added: float) -> None:
        """A request's work there is done."""
        self._load[name] = self._load.get(name, 0.0) - added
