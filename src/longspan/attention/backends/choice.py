"""The choice of a rank's attention backend, by device, installed packages and shape.

It owns the choice among the records of a table; it must not know how a backend works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from longspan.attention.backends import BACKENDS
from longspan.attention.backends.base import AttentionBackend, BackendShape
from longspan.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """The backend that was chosen."""

    # its record
    record: AttentionBackend
    # why it was chosen, for people
    reason: str

    @property
    def name(self) -> str:
        """Name of the backend, never `auto`."""
        return self.record.name


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def choose_backend(
    requested: str,
    device_type: str,
    shape: BackendShape,
    backends: Mapping[str, AttentionBackend] = BACKENDS,
    is_installed: Callable[[str], bool] = _is_installed,
) -> Choice:
    """The backend for a device and a shape.

    `auto` takes the first in the table that can be used; the reason says why those before it cannot. Raises
    `ConfigError` if the requested backend cannot be used, or if none can.
    """
    if requested != "auto":
        if requested not in backends:
            names = ", ".join(("auto", *backends))
            raise ConfigError("attention_backend", requested, "is unknown", f"choose one of {names}")
        problem = _problem(backends[requested], device_type, shape, is_installed)
        if problem:
            raise ConfigError("attention_backend", requested, problem, "give another one, or auto")
        return _choice(backends[requested], "asked for", shape)
    lacking: list[str] = []
    for backend in backends.values():
        if not backend.automatic or not _runs_on(backend, device_type):
            continue
        problem = _problem(backend, device_type, shape, is_installed) or backend.unwanted(shape)
        if problem is None:
            return _choice(backend, "; ".join(lacking) or backend.reason, shape)
        lacking.append(f"{backend.name} {problem}")
    raise ConfigError("attention_backend", requested, "; ".join(lacking) or f"none runs on {device_type}", "name one")


def _choice(backend: AttentionBackend, reason: str, shape: BackendShape) -> Choice:
    """The choice of a backend, with what it says of a shape."""
    return Choice(backend, "; ".join(filter(None, (reason, backend.detail(shape)))))


def _runs_on(backend: AttentionBackend, device_type: str) -> bool:
    return not backend.devices or device_type in backend.devices


def _problem(
    backend: AttentionBackend, device_type: str, shape: BackendShape, is_installed: Callable[[str], bool]
) -> str | None:
    """Why a backend cannot be used; None if it can."""
    if not _runs_on(backend, device_type):
        return f"needs a {' or '.join(backend.devices)} device, not {device_type}"
    if backend.package is not None and not is_installed(backend.package):
        return f"needs the package {backend.package}, which is not installed"
    return backend.supports(shape)
