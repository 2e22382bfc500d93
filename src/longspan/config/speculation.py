"""How draft tokens are found: the value of `--speculative`.

It owns the methods and their limits; it must not know how a method finds its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from longspan.config.checks import require

PROMPT_LOOKUP, MTP, DRAFT, EAGLE3 = "prompt-lookup", "mtp", "draft", "eagle3"
MOST_DRAFTS = MappingProxyType({PROMPT_LOOKUP: 64, MTP: 8, DRAFT: 8, EAGLE3: 8})
"""The most draft tokens of a request in a step, by method."""
_WITH_CHECKPOINT = MappingProxyType({DRAFT: "MODEL", EAGLE3: "PATH"})


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding: how many tokens are drafted, and by what."""

    # `prompt-lookup`: from the request's own text; `mtp`: by the model's module for multi-token prediction; `draft`: by
    # a small model; `eagle3`: by an EAGLE-3 module
    method: str
    # most draft tokens of a request in a step
    tokens: int
    # the model or module that drafts, if it is a checkpoint of its own: a folder, a .gguf file or a hub id
    checkpoint: str = ""

    def __post_init__(self) -> None:
        known = 1 <= self.tokens <= MOST_DRAFTS.get(self.method, 0)
        complete = bool(self.checkpoint) == (self.method in _WITH_CHECKPOINT)
        require(known and complete, "speculative", self.text, "unknown", _REMEDY)

    @staticmethod
    def parse(field: str, text: str) -> Speculation:
        """The value of a text METHOD:K or METHOD:K:MODEL. Raises `ConfigError`, which names `field`."""
        method, _, rest = text.partition(":")
        count, _, checkpoint = rest.partition(":")
        require(count.isdecimal(), field, text, "unknown", _REMEDY)
        return Speculation(method, int(count), checkpoint)

    @property
    def text(self) -> str:
        """The value as `parse` reads it."""
        return f"{self.method}:{self.tokens}" + (f":{self.checkpoint}" if self.checkpoint else "")

    @property
    def by_model(self) -> bool:
        """Whether the ranks draft, with layers of a model, and not the scheduler."""
        return self.method != PROMPT_LOOKUP


def _form(method: str) -> str:
    checkpoint = _WITH_CHECKPOINT.get(method)
    return f"{method}:K" + (f":{checkpoint}" if checkpoint else "") + f" with K in 1..{MOST_DRAFTS[method]}"


_REMEDY = "use " + ", ".join(map(_form, list(MOST_DRAFTS)[:-1])) + " or " + _form(EAGLE3)
