"""What a caller adds to the built-in tables.

It owns the checks of what is added; its members are Python objects, which only ranks of this process can be given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from longspan.attention.backends import BACKENDS, AttentionBackend
from longspan.attention.schedules import SCHEDULES, Schedule
from longspan.config import require
from longspan.models.registry import BUILT_IN, Family


@dataclass(frozen=True)
class Extensions:
    """What an engine has beside what is built in."""

    # chosen from and forced like the built-in ones
    schedules: tuple[Schedule, ...] = ()
    # looked at before the built-in ones
    families: tuple[Family, ...] = ()
    # likewise, where `auto` may choose them
    backends: tuple[AttentionBackend, ...] = ()

    def all_schedules(self, executor: str) -> Mapping[str, Schedule]:
        """The built-in schedules and these, by name. Raises `ConfigError` if the executor's ranks cannot have them."""
        _require_new("schedules", SCHEDULES, self.schedules, executor)
        return MappingProxyType({**SCHEDULES, **{schedule.name: schedule for schedule in self.schedules}})

    def all_backends(self, executor: str) -> Mapping[str, AttentionBackend]:
        """These backends and the built-in ones, by name. Raises `ConfigError` likewise."""
        _require_new("backends", BACKENDS, self.backends, executor)
        return MappingProxyType({**{backend.name: backend for backend in self.backends}, **BACKENDS})

    def all_families(self, executor: str) -> tuple[Family, ...]:
        """These families and the built-in ones. Raises `ConfigError` if the executor's ranks cannot have them."""
        _require_ranks_here("families", [name for family in self.families for name in family.architectures], executor)
        return (*self.families, *BUILT_IN)


def _require_new(
    field: str, built_in: Iterable[str], added: Sequence[Schedule | AttentionBackend], executor: str
) -> None:
    """Raise `ConfigError` for a name that is taken, or ranks that cannot have what is added."""
    names = tuple(one.name for one in added)
    _require_ranks_here(field, names, executor)
    for name in ("auto", *built_in):
        require(name not in names, field, name, "is the name of a built-in choice", "give it another name")
    require(len(set(names)) == len(names), field, list(names), "two have one name", "give each its own")


def _require_ranks_here(field: str, added: Sequence[str], executor: str) -> None:
    """Raise `ConfigError` if something is added that the executor's ranks cannot be given."""
    require(
        not added or executor in ("threads", "dry"), field, added,
        f"executor={executor} has its ranks in other processes, which know the built-in {field} only",
        "use executor='threads'",
    )  # fmt: skip


NONE_ADDED = Extensions()
