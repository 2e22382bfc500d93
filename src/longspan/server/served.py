"""The model as clients see it: its name, its chat template, and defaults of sampling from its files.

It owns reading these files; it must not know requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longspan.config import require
from longspan.errors import ConfigError, ModelError, RequestError
from longspan.request import SamplingParams
from longspan.server.errors import shortened
from longspan.weights.json_file import read_object
from longspan.weights.tokenizer import template_problem

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # vLLM reads the same
_FILE = "generation_config.json"


@dataclass(frozen=True)
class ServedModel:
    """The model as endpoints see it."""

    # its name for clients
    name: str
    # one of `TOOL_FORMATS`; None: tool calls in the text are not parsed
    tool_format: str | None = None
    # sampling parameters of requests that do not give them
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # whether requests may bring a chat template of their own
    trusts_templates: bool = False


def read_template(given: str) -> str:
    """The chat template in a file, or the template itself if it is one. Raises `ConfigError`."""
    template, remedy = given, "give a file of Jinja, or a template in one line"
    try:
        template = Path(given).expanduser().read_text()
    except (OSError, ValueError) as error:
        require("{" in given, "chat_template", given, f"cannot be read ({error})", remedy)
    problem = template_problem(template)
    require(problem is None, "chat_template", shortened(given), f"is no Jinja ({problem})", remedy)
    return template


def generation_defaults(source: str, model_folder: Path) -> dict[str, Any]:
    """Sampling parameters of a generation_config.json. Raises `ConfigError`.

    `source` is `auto` for the model's own (none if it has none), `vllm` for none at all, or a folder.
    """
    if source == "vllm":
        return {}
    folder = model_folder if source == "auto" else Path(source).expanduser()
    file = folder / _FILE
    if source == "auto" and not file.is_file():
        return {}
    try:
        values = read_object(file)
        found: dict[str, Any] = {
            name: _number(name, values[name]) for name in _DEFAULTS if values.get(name) is not None
        }
        SamplingParams(**found)
    except (ModelError, RequestError) as error:
        remedy = f"give auto, vllm, or a folder with {_FILE}"
        raise ConfigError("generation_config", source, f"{file} cannot be used ({error})", remedy) from error
    return found


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(name, value, "is no number", "change it")
    return value
