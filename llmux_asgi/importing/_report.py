"""Every field that a source has, with what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from ._draft import Finding
from .fields import Field

__all__ = ["report"]

_NAMED = ("models",)
"""Sections whose keys are names. (Others of that kind are told of as a whole.)"""


def report(raw: Mapping[str, Any], fields: Iterable[Field], said: Iterable[Finding]) -> list[Finding]:
    """Return a finding for each field in `raw`: what was said of it, else what the table says; unknown fields too."""
    table = {field.key: field for field in fields}
    special: dict[str, list[Finding]] = {}
    for finding in said:
        special.setdefault(finding.field, []).append(finding)
    sections = {key[:end] for key in table for end, letter in enumerate(key) if letter == "."}
    found = []
    for path, key in _walk(raw, sections):
        if here := special.get(path):
            found.append(Finding(path, here[0].status, "; ".join(dict.fromkeys(each.text for each in here))))
        elif key in table:
            found.append(Finding(path, table[key].status, table[key].text))
        else:
            found.append(Finding(path, "none", "this field is not known here"))
    # What was said of fields that are not there, of a default for instance.
    return found + [each for path, here in special.items() if path not in {f.field for f in found} for each in here]


def _walk(node: Mapping[str, Any], sections: Set[str], path: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        inner = "NAME" if key in _NAMED else str(name)
        here, there = f"{path}.{name}" if path else str(name), f"{key}.{inner}" if key else inner
        if there in sections:
            if isinstance(value, Mapping):
                yield from _walk(value, sections, here, there)
        else:
            yield here, there
