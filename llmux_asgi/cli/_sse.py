"""Server-sent events, out of the bytes that they come in. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

__all__ = ["Event", "EventParser"]


class Event(msgspec.Struct, frozen=True):
    """One event. `data` is the text of its `data:` lines."""

    kind: str
    data: bytes
    id: str | None = None


class EventParser:
    """Takes a stream's bytes as they come, and yields each event that is whole.

    Lines end with LF or CR LF. (Not at what else `str.splitlines` knows: such characters may stand in the data.)
    """

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> Iterator[Event]:
        """Take some more bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                fields, self._fields = self._fields, {}
                if b"data" in fields:
                    event_id = fields.get(b"id")
                    kind = fields.get(b"event", b"message").decode(errors="replace")
                    yield Event(kind, fields[b"data"], None if event_id is None else event_id.decode(errors="replace"))
                continue
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data" and b"data" in self._fields:
                value = self._fields[b"data"] + b"\n" + value
            self._fields[name] = value  # a comment's name is empty
