"""What is collected while a configuration is converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from .errors import ConfigImportError

__all__ = ["Draft", "Finding", "Status", "list_at", "mapping_at", "number_at"]

Status: TypeAlias = Literal["converted", "note", "none"]
"""`note`: converted, and there is something to know; `none`: there is no counterpart, it was left out."""


class Finding(msgspec.Struct, frozen=True):
    """What became of one field of the source. `field` is its path, `text` says where it went or what to do instead."""

    field: str
    status: Status
    text: str


class Draft:
    """The configuration under construction, as plain data, and what is to be said of single fields."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {"models": {}}
        self.findings: list[Finding] = []

    def say(self, field: str, text: str, *, status: Status = "note") -> None:
        """Say something of one field, in place of what the table says of all fields of that name."""
        self.findings.append(Finding(field, status, text))


def mapping_at(raw: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """Return the mapping that `raw` holds under `key`, by texts; none is an empty one."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigImportError(f"{where}{key}: expected a mapping, got {type(value).__name__}")
    return {str(name): each for name, each in value.items()}


def list_at(raw: Mapping[str, Any], key: str, where: str = "") -> list[Any]:
    """Return the list that `raw` holds under `key`; none is an empty one."""
    value = raw.get(key)
    if value is None or isinstance(value, list):
        return value or []
    raise ConfigImportError(f"{where}{key}: expected a list, got {type(value).__name__}")


def number_at(raw: Mapping[str, Any], key: str, where: str = "") -> float | int | None:
    """Return the number that `raw` holds under `key`, `None` if there is none."""
    value = raw.get(key)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise ConfigImportError(f"{where}{key}: expected a number, got {value!r}")
