"""What is asked of a model and what it answered, whichever way it is reached.

It owns these records only; it must not know what an answer is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OnAnswer = Callable[[], None]


@dataclass(frozen=True)
class Batch:
    """Prompts to complete greedily, each with up to `max_tokens` tokens or until one of the `stop` strings."""

    prompts: tuple[str, ...]
    max_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A completion without its stop string; `tokens` is None where the server does not count them."""

    text: str
    tokens: int | None
