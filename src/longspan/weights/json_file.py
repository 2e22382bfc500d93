"""Read a JSON file that holds one object.

It owns the errors of files that do not; it must not interpret the object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import ModelError

_MAX_BYTES = 256 << 20  # the largest known, the index of Kimi-K2, has 7 MB


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises `ModelError`."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ModelError(f"{path}: holds {size} bytes, which is no {path.name} of a model; download it again")
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not readable as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again")
    return values
