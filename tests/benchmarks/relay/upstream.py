"""A server that costs next to nothing, which a gateway takes for an awake vLLM: `python -m tests.benchmarks.relay.upstream`.

Bytes are matched, nothing is parsed: a request's head is searched for its path and the length of its body. It also takes in
spans (OTLP over HTTP) and forgets them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
from typing import cast

import uvloop

from tests.benchmarks.relay.wire import BURST_EVENTS, END, EVENT_SECONDS, MODEL, answer, body_of, events, head, kind_of

__all__ = ["main"]

_STREAM_HEAD = head("text/event-stream; charset=utf-8")
_FIXED = {
    b"/health": answer(b""),
    b"/version": answer(b'{"version":"0.32.0"}'),
    b"/is_sleeping": answer(b'{"is_sleeping":false}'),
    b"/openapi.json": answer(b'{"paths":{"/sleep":{"post":{"parameters":[]}}}}'),
    b"/metrics": answer(b"", "text/plain"),
    b"/v1/traces": answer(b"", "application/x-protobuf"),
    b"/v1/models": answer(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()),
    b"/get_server_info": answer(b"{}"),
    b"/get_model_info": answer(b"{}"),
}
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
_PLAIN = answer(body_of("plain", 0))


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_BURST = _STREAM_HEAD + b"".join(map(_chunk, events(BURST_EVENTS))) + END


class Upstream(asyncio.Protocol):
    """One connection. `slow` is what a slow stream consists of."""

    def __init__(self, loop: asyncio.AbstractEventLoop, slow: list[bytes]) -> None:
        self._loop = loop
        self._slow = slow
        self._rest = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            top = data[:end]
            place = (lower := top.lower()).find(b"content-length:")
            length = int(lower[place + 15 :].split(b"\r", 1)[0]) if place >= 0 else 0
            if len(data) < end + 4 + length:
                break
            self._answer(top, data[end + 4 : end + 4 + length])
            data = data[end + 4 + length :]
        self._rest = data

    def _answer(self, top: bytes, body: bytes) -> None:
        if top.startswith(b"POST /v1/chat/completions "):
            match kind_of(body):
                case "plain":
                    self._transport.write(_PLAIN)
                case "burst":
                    self._transport.write(_BURST)
                case "slow":
                    self._transport.write(_STREAM_HEAD)
                    self._send_event(0, self._loop.time())
        else:
            path = top.split(b" ", 2)[1].split(b"?", 1)[0]
            self._transport.write(_FIXED.get(path, _NOT_FOUND))

    def _send_event(self, index: int, begun: float) -> None:
        self._transport.write(self._slow[index])
        if index + 1 < len(self._slow):
            when = begun + EVENT_SECONDS * (index + 1)
            self._timer = self._loop.call_at(when, self._send_event, index + 1, begun)


async def _serve(port: int, slow_events: int) -> None:
    loop = asyncio.get_running_loop()
    slow = list(map(_chunk, events(slow_events)))
    slow[-1] += END
    server = await loop.create_server(lambda: Upstream(loop, slow), "127.0.0.1", port, backlog=4096)
    gc.disable()  # there are no cycles
    await server.serve_forever()


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.upstream")
    parser.add_argument("port", type=int)
    parser.add_argument("--slow-events", type=int, default=400, help="how many events a slow stream has")
    given = parser.parse_args()
    uvloop.run(_serve(given.port, given.slow_events))


if __name__ == "__main__":
    main()
