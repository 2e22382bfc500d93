"""Read a JSON file that holds one object; check the size of a small file of a model before it is read.

It owns the errors of files that are none; it must not interpret the object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import ModelError

_MAX_BYTES = 256 << 20  # the largest known, a tokenizer of 262,144 tokens, has 33 MB


def check_size(path: Path) -> None:
    """Raise `ModelError` for a file that is much larger than any of its kind, before anything reads it."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ModelError(f"{path}: holds {size} bytes, which is no {path.name} of a model; download it again")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises `ModelError`."""
    try:
        check_size(path)
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not readable as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again")
    return values
