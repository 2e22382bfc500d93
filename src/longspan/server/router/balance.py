"""Choose the instance for a request, by load and by the prompts that each instance has seen.

It owns two things for each instance: its estimated load, in bytes of prompts, and the prompt prefixes that it has seen.
It must not know how requests are sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import blake2b
from itertools import takewhile

_BLOCK_BYTES = 256
_MAX_BLOCKS = 1 << 12  # blocks of one prompt that are compared; the rest counts as new
_REMEMBERED = 1 << 16  # blocks remembered for each instance

Block = bytes


def blocks_of(prompt: bytes | memoryview) -> list[Block]:
    """A key for each block of a prompt. It covers the blocks before it too, so equal prefixes have equal keys."""
    found: list[Block] = []
    key = b""
    for start in range(0, min(len(prompt), _MAX_BLOCKS * _BLOCK_BYTES) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        key = blake2b(key + prompt[start : start + _BLOCK_BYTES], digest_size=8).digest()
        found.append(key)
    return found


class Balance:
    """Load and seen prefixes of the instances of one role, by name.

    The cost of a request is `weight` plus the bytes of its prompt that the instance has not seen. Prompts are given
    as their number of bytes, and blocks.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._load: dict[str, float] = {}
        self._seen: dict[str, OrderedDict[Block, None]] = {}

    def ranked(self, names: Collection[str], prompt: int, blocks: Sequence[Block]) -> list[str]:
        """All `names`, those with the least load including this prompt first."""
        return sorted(names, key=lambda name: (self._load.get(name, 0.0) + self.cost(name, prompt, blocks), name))

    def cost(self, name: str, prompt: int, blocks: Sequence[Block]) -> float:
        """The load that a prompt adds to an instance, in bytes."""
        seen = self._seen.get(name, OrderedDict())
        known = sum(1 for _ in takewhile(seen.__contains__, blocks))
        return self._weight + prompt - known * _BLOCK_BYTES

    def begin(self, name: str, prompt: int, blocks: Sequence[Block]) -> float:
        """Add a request to an instance's load. Returns what it adds, to be passed to `end`."""
        added = self.cost(name, prompt, blocks)
        self._load[name] = self._load.get(name, 0.0) + added
        seen = self._seen.setdefault(name, OrderedDict())
        for block in reversed(blocks):  # in reverse order, so that a prompt's last blocks are forgotten first
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > _REMEMBERED:
            seen.popitem(last=False)
        return added

    def end(self, name: str, added: float) -> None:
        """Take a request off an instance's load."""
        self._load[name] = self._load.get(name, 0.0) - added
