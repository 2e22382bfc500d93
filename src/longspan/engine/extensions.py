"""What a caller adds to the built-in tables.

It owns the checks of what is added; its members are Python objects, which only ranks of this process can be given.
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.config import require
from longspan.models.registry import BUILT_IN, Family


@dataclass(frozen=True)
class Extensions:
    """What an engine has beside what is built in."""

    # looked at before the built-in ones
    families: tuple[Family, ...] = ()

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
