"""From a configuration to the role beside a core.

It owns what a role needs to know of the engine; it must not know what a role does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longspan.cache.manager import CacheManager
from longspan.cache.prefix import Key, page_key
from longspan.config import require
from longspan.disaggregation.decode import DecodeRole
from longspan.disaggregation.driver import Role
from longspan.disaggregation.handshake import format_of, parts_of
from longspan.disaggregation.prefill import PrefillRole
from longspan.engine.setup import EngineSetup
from longspan.errors import RequestError
from longspan.request import SamplingParams

if TYPE_CHECKING:
    from longspan.engine.driver.core import CoreRequest

PREFILL_ONLY = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


def open_role(setup: EngineSetup, cache: CacheManager, root: Key) -> tuple[Role | None, EngineSetup]:
    """The configured role, and the setup its ranks need. Raises `ConfigError`."""
    config = setup.config.transfer
    if config is None:
        return None, setup
    require(
        setup.config.executor != "dry", "executor", "dry", f"has no pages, so it cannot be a {config.role} instance",
        "use threads or processes",
    )  # fmt: skip
    form, parts = format_of(setup), parts_of(setup)
    role: PrefillRole | DecodeRole
    if config.role == "prefill":
        role = PrefillRole(config, form, parts, lambda tokens: _problem(setup, tokens))
    else:
        role = DecodeRole(config, form, parts, lambda request: _cached(cache, root, request), cache.page_size)
    return role, replace(setup, config=replace(setup.config, transfer=role.config))


def _problem(setup: EngineSetup, tokens: list[int]) -> str | None:
    """Why a prompt cannot be computed here."""
    try:
        setup.limits.check(len(tokens), PREFILL_ONLY)
    except RequestError as error:
        return str(error)
    if not all(0 <= token < setup.model.vocab_size for token in tokens):
        return f"a token is not in 0..{setup.model.vocab_size - 1}"
    return None


def _cached(cache: CacheManager, root: Key, request: CoreRequest) -> int:
    """How many of a request's tokens, from the first on, the prefix cache has."""
    if not cache.enable_prefix_caching:
        return 0
    tokens, size = [*request.prompt_token_ids, *request.output_token_ids], cache.page_size
    key, known = root, 0
    while known + size <= len(tokens):
        key = page_key(key, tokens[known : known + size])
        if next(cache.prefix.lookup([key]), None) is None:
            break
        known += size
    return known
