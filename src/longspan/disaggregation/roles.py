"""Builds the role that an engine's configuration names.

It owns what a role gets from the engine; it must not know what a role does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from longspan.cache.manager import CacheManager
from longspan.cache.prefix import Key, page_key
from longspan.config import require
from longspan.disaggregation.decode import DecodeRole
from longspan.disaggregation.driver import Role
from longspan.disaggregation.handshake import format_of, parts_of
from longspan.disaggregation.instance import InstanceSetup
from longspan.disaggregation.prefill import PREFILL_ONLY, PrefillRole
from longspan.errors import RequestError
from longspan.request import CoreRequest

if TYPE_CHECKING:
    from longspan.scheduler.limits import Limits


def open_role(
    setup: InstanceSetup, cache: Callable[[], CacheManager], root: Key, limits: Callable[[], Limits]
) -> Role | None:
    """The configured role; None without one. `root` is the parent key of every request's first page.

    `cache` and `limits` are not asked before the role is started, because ranks that are told of the role decide the
    number of pages. Raises `ConfigError`.
    """
    config = setup.config.transfer
    if config is None:
        return None
    require(
        setup.config.executor != "dry", "executor", "dry", f"has no pages, so it cannot be a {config.role} instance",
        "use threads or processes",
    )  # fmt: skip
    page_format, parts = format_of(setup), parts_of(setup)
    if config.role == "prefill":
        return PrefillRole(config, page_format, parts, lambda tokens: _problem(setup, limits(), tokens))
    return DecodeRole(
        config, page_format, parts, lambda request: _cached(cache(), root, request), setup.config.cache.page_size
    )


def _problem(setup: InstanceSetup, limits: Limits, tokens: list[int]) -> str | None:
    """Why this instance cannot compute a prompt; None if it can."""
    try:
        limits.check(len(tokens), PREFILL_ONLY)
    except RequestError as error:
        return str(error)
    if not all(0 <= token < setup.model.vocab_size for token in tokens):
        return f"a token is not in 0..{setup.model.vocab_size - 1}"
    return None


def _cached(cache: CacheManager, root: Key, request: CoreRequest) -> int:
    """Number of a request's first tokens that the prefix cache has, in whole pages."""
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
