"""Models whose config.json is in the package, by name: what needs no weights needs no other file.

It owns the names, their prefixes and where the weights are on the hub; it must not interpret a configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def builtin_names() -> list[str]:
    """Models that need no file."""
    folder = files("longspan.weights").joinpath("configs")
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def builtin_config(name: str) -> dict[str, Any]:
    """The config.json of one of `builtin_names`."""
    values: dict[str, Any] = json.loads(files("longspan.weights").joinpath(f"configs/{name}.json").read_text())
    return values


def hub_id(values: Mapping[str, Any]) -> str | None:
    """Where the hub has a built-in model's weights; None where it has none in this format."""
    found: str | None = values.get("_name_or_path")
    return found


@cache
def _name_of_hub_id() -> Mapping[str, str]:
    """The built-in name of each hub id, in lower case."""
    ids = ((hub_id(builtin_config(name)), name) for name in builtin_names())
    return {found.lower(): name for found, name in ids if found is not None}


def builtin_name(text: str) -> str | None:
    """The name that is meant by a name, the beginning of just one, or a hub id; None if none is."""
    whole = text.strip().lower()
    short = whole.rsplit("/", 1)[-1]
    if whole in _name_of_hub_id():
        return _name_of_hub_id()[whole]
    if HUB_ID.fullmatch(whole):
        return short if short in builtin_names() else None
    return by_prefix(whole, builtin_names())


def by_prefix(text: str, names: Iterable[str]) -> str | None:
    """The name, or the only one that begins so, or the first of a series: x-1 for x where there is x-1-long too."""
    found = sorted((name for name in names if text and name.startswith(text)), key=len)
    if found and (found[0] == text or len(found) == 1):
        return found[0]
    series = bool(found) and found[0][len(text)] == "-" and all(name.startswith(found[0]) for name in found)
    return found[0] if series else None


def near_names(text: str) -> list[str]:
    """Built-in names that begin as a text does, or else are written much like it."""
    short = text.rsplit("/", 1)[-1].lower()
    beginning = [name for name in builtin_names() if short and name.startswith(short)]
    return beginning or get_close_matches(short, builtin_names(), 3, 0.4)
