"""Config records on the command line: makes flags from their fields, and records from the values of the flags.

It owns the form of a flag. Names and help come from the fields, and the records check values and combinations.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any, get_args

import typer

from longspan.attention.backends import BACKEND_NAMES
from longspan.attention.schedules import SCHEDULE_NAMES
from longspan.config import CacheConfig, ParallelConfig, SchedulerConfig, parse_bytes
from longspan.config.option import Option, build, flags

# choices that the help of config fields cannot name, because `config` must not import these packages
_CHOICES = {"schedule": SCHEDULE_NAMES, "attention_backend": BACKEND_NAMES}


def flag(record: type[Any], name: str) -> Any:
    """The flag of one field, for a command that does not take the whole record."""
    (found,) = (one for one in flags(record) if one.name == name)
    return _typer_option(found)


def takes_records(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a flag for each option of the config records that `command` takes; it calls `command`."""
    taken = inspect.signature(command, eval_str=True).parameters
    records: dict[str, Any] = {name: one.annotation for name, one in taken.items() if is_dataclass(one.annotation)}

    def with_flags(**values: Any) -> None:
        values.update(_folder_and_size(values.get("kv_offload_disk")))
        built = {name: build(record, values) for name, record in records.items()}
        command(**{name: built.get(name, values.get(name)) for name in taken})

    parameters: list[inspect.Parameter] = []
    for name, one in taken.items():
        parameters += map(_parameter, flags(records[name])) if name in records else [one]
    with_flags.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    )
    with_flags.__annotations__ = {one.name: one.annotation for one in parameters}
    with_flags.__doc__, with_flags.__name__ = command.__doc__, command.__name__
    return with_flags


def _parameter(one: Option) -> inspect.Parameter:
    """An option as a parameter in the form that typer reads."""
    if one.default is MISSING:
        info = typer.Argument(metavar=one.name.upper(), help=one.help, show_default=False)
        default = inspect.Parameter.empty
    else:
        info, default = _typer_option(one), one.default
    kind = one.kind if one.parse is None else str | None if default is None else str
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _typer_option(one: Option) -> Any:
    name = (one.flag or one.name).replace("_", "-")
    may_be_refused = bool in (one.kind, *get_args(one.kind)) and one.default is not False
    names = [f"--{name}/--no-{name}" if may_be_refused else f"--{name}", *([one.short] if one.short else [])]
    choices = f": {', '.join(_CHOICES[one.name])}" if one.name in _CHOICES else ""
    return typer.Option(*names, metavar=one.metavar, help=f"{one.help}{choices}")


def _folder_and_size(disk: str | None) -> dict[str, Any]:
    """The two options in the text `PATH[:SIZE]`. Raises `ConfigError`."""
    folder, colon, size = (disk or "").rpartition(":")
    if not (colon and re.fullmatch(r"\d.*", size)):
        return {}
    return {"kv_offload_disk": folder, "kv_offload_disk_bytes": parse_bytes("kv_offload_disk", size)}


ExpertParallel = Annotated[bool, flag(ParallelConfig, "enable_expert_parallel")]
PageSize = Annotated[int, flag(CacheConfig, "page_size")]
PrefixCaching = Annotated[bool, flag(CacheConfig, "enable_prefix_caching")]
NumSeqs = Annotated[int | None, flag(SchedulerConfig, "max_num_seqs")]
LocalContext = Annotated[int | None, flag(SchedulerConfig, "local_context")]
Schedule = Annotated[str, flag(SchedulerConfig, "schedule")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
