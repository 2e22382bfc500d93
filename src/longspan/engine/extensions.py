"""What a caller adds to the built-in tables.

It owns the checks of what is added; its members are Python objects, which only ranks of this process can be given.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        require(
            not added or executor in ("threads", "dry"), "schedules", tuple(added),
            f"executor={executor} has its ranks in other processes, which know the built-in schedules only",
            "use executor='threads'",
        )  # fmt: skip
        for name in SCHEDULE_NAMES:
            require(name not in added, "schedules", name, "is the name of a built-in choice", "give it another name")
        require(
            len(added) == len(self.schedules), "schedules", [schedule.name for schedule in self.schedules],
            "two have one name", "give each its own",
        )  # fmt: skip
        return MappingProxyType({**SCHEDULES, **added})

    def all_families(self, executor: str) -> tuple[Family, ...]:
        """These families and the built-in ones. Raises `ConfigError` if the executor's ranks cannot have them."""
        require(
            not self.families or executor in ("threads", "dry"),
            "families", [name for family in self.families for name in family.architectures],
            f"executor={executor} has its ranks in other processes, which know the built-in families only",
            "use executor='threads'",
        )  # fmt: skip
        return (*self.families, *BUILT_IN)


NONE_ADDED = Extensions()
