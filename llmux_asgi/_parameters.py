"""A model's parameters for the requests that name it, put into a JSON body without encoding the rest of it anew. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ._json_body import decode, find_value
from ._openai import Headers
from ._payload import is_form
from ._routes import Route
from .config import ModelConfig, ParametersConfig
from .exceptions import InvalidRequestError

__all__ = ["Parameters"]

_BLANKS = re.compile(rb"[ \t\r\n]*")
_ABSENT = msgspec.Raw(b"")


class Parameters:
    """What the configuration makes of a request's body: keys of the JSON object itself, and never those inside it."""

    def __init__(self, *configs: ParametersConfig) -> None:
        """Of several configurations, what a later one says of a key counts."""
        said: dict[str, tuple[str, bytes]] = {}
        for config in configs:
            said |= {key: ("default", msgspec.json.encode(value)) for key, value in config.defaults.items()}
            said |= {key: ("forced", msgspec.json.encode(value)) for key, value in config.forced.items()}
            said |= dict.fromkeys(config.strip, ("strip", b""))
        self._names = list(said)
        self._added = {key: value for key, (kind, value) in said.items() if kind != "strip"}
        self._forced = {key: value for key, (kind, value) in said.items() if kind == "forced"}
        self._stripped = {key for key, (kind, _) in said.items() if kind == "strip"}
        fields = [(f"m{i}", msgspec.Raw, msgspec.field(name=key, default=_ABSENT)) for i, key in enumerate(self._names)]
        self._members: type[msgspec.Struct] = msgspec.defstruct("Members", fields)

    @classmethod
    def of(cls, models: Mapping[str, ModelConfig]) -> dict[str, Parameters]:
        """Return those of each model that has any, by all names that it has."""
        found: dict[str, Parameters] = {}
        for name, model in models.items():
            if (given := model.parameters) is not None:
                for each in (name, *model.aliases):
                    found[each] = cls(given, given.aliases.get(each, ParametersConfig()))
        return found

    def apply(self, route: Route, headers: Headers, body: bytes) -> bytes:
        """Return the body with the parameters in it. One without JSON (a form, or none at all) stays as it is.

        Raises `InvalidRequestError`: it is not a JSON object, or one of the keys stands in it twice.
        """
        if route.body is None or (route.body == "form" and is_form(headers)):
            return body
        members = self._find(body)
        edits: list[tuple[int, int, bytes]] = []
        cuts: list[tuple[int, int]] = []
        for name, (start, end) in members.items():
            if name in self._forced:
                edits.append((start, end, self._forced[name]))
            elif name in self._stripped:
                cuts.append(_member(body, start, end))
        at = body.index(b"{") + 1
        closing = _skip_blanks(body, at)
        is_empty = body[closing] == ord("}")
        for start, end in _runs(cuts):
            is_last = body[end - 1] != ord(",")
            if is_last and start == at:
                is_empty = True
            # The comma before the last members goes with them.
            edits.append((start - 1 if is_last and start > at else start, end, b""))
        added = [msgspec.json.encode(name) + b":" + value for name, value in self._added.items() if name not in members]
        if added:
            edits.append((at, at, b",".join(added) + (b"" if is_empty else b",")))
        return _edited(body, edits)

    def _find(self, body: bytes) -> dict[str, tuple[int, int]]:
        """Return where the values of the names begin and end, by name."""
        copy = bytearray(body)
        values = self._raws(copy)
        spans = {name: find_value(body, copy, value, name) for name, value in values.items()}
        if spans:
            # What stands there once is not found again when it has another name. Blanks are no name of a parameter.
            copy[:] = body
            for start, _ in spans.values():
                opening, closing = _key(body, start)
                copy[opening + 1 : closing] = b" " * (closing - opening - 1)
            for name in self._raws(copy):
                raise InvalidRequestError(f"The request body has the key {name} more than once.", param=name)
        return spans

    def _raws(self, body: bytearray) -> dict[str, memoryview]:
        found: Any = decode(body, self._members)
        values = ((name, memoryview(getattr(found, f"m{i}"))) for i, name in enumerate(self._names))
        return {name: value for name, value in values if value}


def _key(body: bytes, value: int) -> tuple[int, int]:
    """Return where the quotes of a key are whose value begins at `value`: but for blanks, only a colon stands between."""
    closing = body.rindex(b'"', 0, body.rindex(b":", 0, value))
    opening = body.rindex(b'"', 0, closing)
    while _is_escaped(body, opening):
        opening = body.rindex(b'"', 0, opening)
    return opening, closing


def _skip_blanks(body: bytes, at: int) -> int:
    found = _BLANKS.match(body, at)
    return at if found is None else found.end()


def _is_escaped(body: bytes, quote: int) -> bool:
    at = quote
    while body[at - 1] == ord("\\"):
        at -= 1
    return (quote - at) % 2 == 1


def _member(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Return what belongs to the member with this value: from behind the comma or brace before it, its own comma included."""
    opening, _ = _key(body, start)
    begin = max(body.rfind(b",", 0, opening), body.rfind(b"{", 0, opening)) + 1
    end = _skip_blanks(body, end)
    return begin, end + 1 if body[end] == ord(",") else end


def _runs(cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join those that follow upon one another."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(cuts):
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return runs


def _edited(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    if not edits:
        return body
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    # What is added at a place comes before what is cut there.
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        pieces += [view[at:start], new]
        at = end
    return b"".join([*pieces, view[at:]])
