"""What a caller adds to the built-in tables.

It owns the checks of what is added; its members are Python objects, which only ranks of this process can be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from longspan.attention.schedules import SCHEDULE_NAMES, SCHEDULES, Schedule
from longspan.config import require
from longspan.models.registry import BUILT_IN, Family


@dataclass(frozen=True)
class Extensions:
    """What an engine has beside what is built in."""

    # chosen from and forced like the built-in ones
    schedules: tuple[Schedule, ...] = ()
    # looked at before the built-in ones
    families: tuple[Family, ...] = ()

    def all_schedules(self, executor: str) -> Mapping[str, Schedule]:
        """The built-in schedules and these, by name. Raises `ConfigError` if the executor's ranks cannot have them."""
        added = {schedule.name: schedule for schedule in self.schedules}
        _require_ranks_here("schedules", tuple(added), executor)
        for name in SCHEDULE_NAMES:
            require(name not in added, "schedules", name, "is the name of a built-in choice", "give it another name")
        require(
            len(added) == len(self.schedules), "schedules", [schedule.name for schedule in self.schedules],
            "two have one name", "give each its own",
        )  # fmt: skip
        return MappingProxyType({**SCHEDULES, **added})

    def all_families(self, executor: str) -> tuple[Family, ...]:
        """These families and the built-in ones. Raises `ConfigError` if the executor's ranks cannot have them."""
        _require_ranks_here("families", [name for family in self.families for name in family.architectures], executor)
        return (*self.families, *BUILT_IN)


def _require_ranks_here(field: str, added: Sequence[str], executor: str) -> None:
    """Raise `ConfigError` if something is added that the executor's ranks cannot be given."""
    require(
        not added or executor in ("threads", "dry"), field, added,
        f"executor={executor} has its ranks in other processes, which know the built-in {field} only",
        "use executor='threads'",
    )  # fmt: skip


NONE_ADDED = Extensions()
