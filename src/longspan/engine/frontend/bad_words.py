"""Bad words as token sequences.

It owns which sequences of tokens stand for a word; the sampler keeps them from being completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.errors import RequestError


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, with and without a space before it, as in vLLM. Raises `RequestError`.

    The form with a space counts only where the space changes the first token and adds none: otherwise the form without
    it already ends in the same tokens.
    """
    if words and tokenizer is None:
        problem = "are text and this model has no tokenizer"
        raise RequestError("bad_words", list(words), problem, "give bad_word_ids")
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " ")
        )
        found.append(plain)
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:
            found.append(spaced)
    return tuple(word for word in found if word)
