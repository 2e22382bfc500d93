"""What people can touch, one line each: `python scripts/snapshot.py` writes tests/snapshot.txt, which a test compares.

It owns how each surface is read: commands, endpoints, metrics, models, machines, tested layouts and Python names. It
starts no engine.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import typer
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "snapshot.txt"
_LAYOUT_ARGUMENTS = ("grid", "layout")  # of tests
_LISTS_OF_CHOICES = ("attention.schedules.SCHEDULE_NAMES", "config.EXECUTOR_NAMES", "config.DEVICE_NAMES",
    "config.DTYPE_NAMES", "config.QUANTIZATION_NAMES", "config.KV_DTYPE_NAMES",
    "config.LOAD_FORMAT_NAMES", "config.SCHEDULING_POLICY_NAMES",
    "attention.backends.BACKEND_NAMES",
    "server.tools.TOOL_FORMATS", "planner.layouts.OBJECTIVES", "planner.rows.QUANTITIES")  # fmt: skip


def snapshot() -> str:
    """The whole file."""
    sources: tuple[Callable[[], Iterable[str]], ...] = (
        _commands, _choices, _server, _router, _metrics, _planner, _tested_layouts, _python, _errors, _config
    )  # fmt: skip
    return "".join(f"{line}\n" for line in sorted({line for source in sources for line in source()}))


def _commands() -> Iterator[str]:
    from longspan.cli.main import build_app

    yield from _command(typer.main.get_command(build_app()), "longspan")


def _command(command: Any, path: str) -> Iterator[str]:
    """A command with its parameters, or a group with its commands, hidden ones too."""
    yield f"command {path}"
    for name, child in getattr(command, "commands", {}).items():
        yield from _command(child, f"{path} {name}")
    callback = getattr(command, "callback", None)
    annotated = inspect.signature(callback, eval_str=True).parameters if callback else {}
    for parameter in command.params:
        names = ", ".join((*parameter.opts, *parameter.secondary_opts))
        default = "required" if parameter.required else f"= {parameter.default!r}"
        kind = _shown(get_args(annotated[parameter.name].annotation)[0])
        yield f"command {path} {parameter.param_type_name} {names}: {kind} {default}"


def _choices() -> Iterator[str]:
    """What options take that are strings on the command line."""
    for path in _LISTS_OF_CHOICES:
        module, _, name = path.rpartition(".")
        for choice in getattr(importlib.import_module(f"longspan.{module}"), name):
            yield f"choice {name} {choice}"


def _server() -> Iterator[str]:
    """The server's endpoints, those hidden from its documentation too."""
    from longspan.server.app import Service, build_app
    from longspan.server.options import ServeOptions
    from longspan.server.served import ServedModel

    engine = SimpleNamespace(setup=SimpleNamespace(max_model_len=1), metrics=SimpleNamespace(failed=None))
    app = build_app(
        Service(cast(Any, engine), cast(Any, SimpleNamespace(max_bytes=0)), ServeOptions(), ServedModel("model"), 0.0)
    )
    for route in app.routes:
        yield from _endpoints("server", route)
        body = getattr(route, "body_field", None)
        if body is not None:
            model = cast(type[BaseModel], body.field_info.annotation)
            schema = model.model_json_schema()
            yield f"{_at('server', route)} takes {model.__name__}"
            for name, part in {model.__name__: schema, **schema.get("$defs", {})}.items():
                yield from _body(f"body {name}", part)


def _router() -> Iterator[str]:
    from longspan.server.router.proxy import RouteOptions, build_router

    for route in build_router(cast(Any, None), RouteOptions()).routes:
        yield from _endpoints("router", route)


def _endpoints(app: str, route: Any) -> Iterator[str]:
    yield _at(app, route)
    needed = getattr(route, "dependant", None)
    for place in ("path", "query", "header", "cookie") if needed is not None else ():
        for parameter in getattr(needed, f"{place}_params"):
            required = "required" if parameter.field_info.is_required() else f"= {parameter.field_info.default!r}"
            yield f"{_at(app, route)} {place} {parameter.alias}: {_shown(parameter.field_info.annotation)} {required}"


def _at(app: str, route: Any) -> str:
    return f"endpoint {app} {','.join(sorted(set(route.methods or ()) - {'HEAD'}))} {route.path}"


def _body(place: str, schema: dict[str, Any]) -> Iterator[str]:
    """The fields of an object of a JSON schema."""
    others = schema.get("additionalProperties", True)
    yield f"{place} other fields: {'refused' if others is False else 'taken'}"
    for name, part in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        default = "required" if required else f"= {json.dumps(part.get('default'))}"
        yield f"{place} {name}: {_json_type(part)} {default}"


def _json_type(schema: Any) -> str:
    """A JSON schema in a few words."""
    if not isinstance(schema, dict):
        return "any"
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema or "oneOf" in schema:
        return " | ".join(map(_json_type, schema.get("anyOf", schema.get("oneOf"))))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    name = str(schema.get("type", "any"))
    inside = schema.get("items", schema.get("additionalProperties"))
    bounds = {key: value for key, value in schema.items() if key.startswith(("max", "min", "exclusive", "pattern"))}
    return f"{name}{f'[{_json_type(inside)}]' if inside else ''}{f' {json.dumps(bounds)}' if bounds else ''}"


def _metrics() -> Iterator[str]:
    """Names, types and labels in /metrics."""
    from longspan.server.metrics import Metrics

    registry: CollectorRegistry = Metrics("model", (1,)).registry
    labels = {
        name: collector._labelnames  # the library shows labels only once they have values
        for collector, names in registry._collector_to_names.items()
        for name in names
    }
    for family in registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        yield f"metric {family.name}{suffix} {family.type} by {', '.join(labels[family.name])}"


def _planner() -> Iterator[str]:
    from longspan.models.registry import architectures
    from longspan.planner.hardware import hardware_table
    from longspan.weights.builtin import builtin_names

    yield from (f"architecture {name}" for name in architectures())
    yield from (f"planner's model {name}" for name in builtin_names())
    yield from (f"hardware {name}" for name in hardware_table())


def _tested_layouts() -> Iterator[str]:
    """Layouts that tests of engines and of attention are run on, as (tp, pcp, dcp), (pp, tp, pcp, dcp) or options."""
    for path in sorted([*ROOT.glob("tests/engine/test_*.py"), *ROOT.glob("tests/ranks/test_*.py")]):
        where = path.relative_to(ROOT).with_suffix("")
        module = importlib.import_module(".".join(where.parts))
        for test in vars(module).values():
            marks = getattr(test, "pytestmark", []) if inspect.isfunction(test) else []
            for mark in marks:
                if mark.name == "parametrize":
                    yield from (f"tested {where} {layout}" for layout in _layouts_of(*mark.args[:2]))


def _layouts_of(names: str | tuple[str, ...], cases: Iterable[Any]) -> Iterator[str]:
    """What a test's parameters that name a layout are."""
    names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
    for case in cases:
        made = hasattr(case, "marks")  # by pytest.param
        values = case.values if made else case if len(names) > 1 else (case,)
        yield from (str(value) for name, value in zip(names, values, strict=True) if name in _LAYOUT_ARGUMENTS)


def _python() -> Iterator[str]:
    """What `longspan` exports."""
    import longspan

    for name in longspan.__all__:
        found = getattr(longspan, name)
        if not inspect.isclass(found):
            yield f"python {name}, a {type(found).__name__}"
        elif not issubclass(found, Exception):
            yield from _class(f"python {name}", found)
        else:
            yield f"python {name}, an error"


def _class(place: str, found: type) -> Iterator[str]:
    if issubclass(found, Enum):
        yield from (f"{place}.{member.name} = {member.value!r}" for member in found)
        return
    if is_dataclass(found):
        yield from (f"{place}.{one.name}: {_shown(one.type)}{_default(one)}" for one in fields(found))
    else:
        for parameter in list(inspect.signature(found).parameters.values()):
            yield f"{place}({parameter.kind.description}) {_unquoted(parameter)}"
    for name, member in vars(found).items():
        if isinstance(member, property | cached_property) and not name.startswith("_"):
            yield f"{place}.{name}, a property"
        elif callable(getattr(found, name)) and not name.startswith("_"):
            yield f"{place}.{name}{_unquoted(inspect.signature(getattr(found, name)))}"


def _unquoted(signature: inspect.Signature | inspect.Parameter) -> str:
    """With annotations as they are written."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature))


def _default(one: Field[Any]) -> str:
    if one.default is not MISSING:
        return f" = {one.default!r}"
    return "" if one.default_factory is MISSING else f" = {getattr(one.default_factory, '__name__', 'made')}()"


def _errors() -> Iterator[str]:
    """The exception tree, with its way up to `LongspanError`."""
    from longspan import errors

    for name, found in vars(errors).items():
        if inspect.isclass(found) and issubclass(found, errors.LongspanError):
            parents = ", ".join(base.__name__ for base in found.__bases__)
            yield f"error {name}({parents}){'' if '__init__' not in vars(found) else inspect.signature(found)}"


def _config() -> Iterator[str]:
    """Records that `LLM` and `LLM.from_config` take."""
    from longspan import config
    from longspan.config import CostConstants, TransferConfig

    records = {name: found for name, found in vars(config).items() if inspect.isclass(found) and is_dataclass(found)}
    for name, found in {**records, "CostConstants": CostConstants, "TransferConfig": TransferConfig}.items():
        yield from _class(f"record {name}", found)


def _shown(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the tests' lists
    text = snapshot()
    SNAPSHOT.write_text(text)
    print(f"{SNAPSHOT.relative_to(ROOT)}: {text.count(chr(10))} lines")
