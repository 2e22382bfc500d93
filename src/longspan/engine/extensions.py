"""Schedules, model families and backends that a caller adds to the built-in ones.

It owns the checks on them. They are Python objects, so only ranks in this process can use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from longspan.attention.backends import BACKENDS, AttentionBackend
from longspan.attention.schedules import SCHEDULES, Schedule
from longspan.config import EngineConfig, require
from longspan.models.registry import BUILT_IN, Family


@dataclass(frozen=True)
class Extensions:
    """Schedules, families and backends that an engine has in addition to the built-in ones."""

    # the cost model may choose them, and the user may force them
    schedules: tuple[Schedule, ...] = ()
    # take precedence over the built-in families
    families: tuple[Family, ...] = ()
    # take precedence over the built-in backends when `auto` chooses
    backends: tuple[AttentionBackend, ...] = ()

    def all_schedules(self, executor: str) -> Mapping[str, Schedule]:
        """The built-in schedules and these, by name. Raises `ConfigError` if the executor's ranks cannot use them."""
        _require_new("schedules", SCHEDULES, self.schedules, executor)
        return MappingProxyType({**SCHEDULES, **{schedule.name: schedule for schedule in self.schedules}})

    def all_backends(self, executor: str) -> Mapping[str, AttentionBackend]:
        """These backends and the built-in ones, by name. Raises `ConfigError` where `all_schedules` does."""
        _require_new("backends", BACKENDS, self.backends, executor)
        return MappingProxyType({**{backend.name: backend for backend in self.backends}, **BACKENDS})

    def all_families(self, executor: str) -> tuple[Family, ...]:
        """These families and the built-in ones. Raises `ConfigError` if the executor's ranks cannot use them."""
        _require_ranks_here("families", [name for family in self.families for name in family.architectures], executor)
        return (*self.families, *BUILT_IN)


def carried_out(schedules: Mapping[str, Schedule], config: EngineConfig, device_type: str) -> Mapping[str, Schedule]:
    """Those of the schedules that ranks can carry out. Raises `ConfigError` if the user has chosen another one.

    Pages are read in place by ranks that share memory. Not where they draft with layers of a model: a draft sees keys
    that another rank has written in the same step.
    """
    drafts = config.scheduler.speculative
    chosen = schedules.get(config.scheduler.schedule)
    if device_type == "cpu" and config.executor == "threads" and not (drafts and drafts.by_model):
        return schedules
    require(
        chosen is None or chosen.moves != "signals", "schedule", config.scheduler.schedule,
        "needs ranks that are threads on a CPU, and do not draft with a model",
        "use --executor threads --device cpu without such drafts, or --schedule auto",
    )  # fmt: skip
    return MappingProxyType({name: one for name, one in schedules.items() if one.moves != "signals"})


def _require_new(
    field: str, built_in: Iterable[str], added: Sequence[Schedule | AttentionBackend], executor: str
) -> None:
    """Raise `ConfigError` if a name is already used, or if the executor's ranks cannot use what is added."""
    names = tuple(one.name for one in added)
    _require_ranks_here(field, names, executor)
    for name in ("auto", *built_in):
        require(name not in names, field, name, "is the name of a built-in choice", "give it another name")
    require(len(set(names)) == len(names), field, list(names), "two have one name", "give each its own")


def _require_ranks_here(field: str, added: Sequence[str], executor: str) -> None:
    """Raise `ConfigError` if something is added and the executor's ranks are not in this process."""
    require(
        not added or executor in ("threads", "dry"), field, added,
        f"executor={executor} has its ranks in other processes, which know the built-in {field} only",
        "use executor='threads'",
    )  # fmt: skip


NONE_ADDED = Extensions()
