"""How draft tokens are found: the value of `--speculative`.

It owns the methods and their limits; it must not know how a method finds its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from longspan.config.checks import require

PROMPT_LOOKUP, MTP = "prompt-lookup", "mtp"
MOST_DRAFTS = MappingProxyType({PROMPT_LOOKUP: 64, MTP: 8})
"""The most draft tokens of a request in a step, by method."""


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding: how many tokens are drafted, and by what."""

    # `prompt-lookup`: from the request's own text; `mtp`: by the model's module for multi-token prediction
    method: str
    # most draft tokens of a request in a step
    tokens: int

    def __post_init__(self) -> None:
        known = 1 <= self.tokens <= MOST_DRAFTS.get(self.method, 0)
        require(known, "speculative", f"{self.method}:{self.tokens}", "unknown", _REMEDY)

    @staticmethod
    def parse(field: str, text: str) -> Speculation:
        """The value of a text METHOD:K. Raises `ConfigError`, which names `field`."""
        method, _, count = text.partition(":")
        require(count.isdecimal(), field, text, "unknown", _REMEDY)
        return Speculation(method, int(count))

    @property
    def by_model(self) -> bool:
        """Whether the ranks draft, with layers of the model, and not the scheduler."""
        return self.method == MTP


_REMEDY = "use " + " or ".join(f"{method}:K with K in 1..{most}" for method, most in MOST_DRAFTS.items())
