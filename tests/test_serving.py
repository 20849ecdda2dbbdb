"""uvicorn's protocol with fewer system calls and timers, on real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from llmux_asgi._intake import SCOPE_HEAD_BYTES
from llmux_asgi.serving import GatheringProtocol

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)]

REQUEST = b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n"


class Recorder:
    """A transport that notes what it is given to write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Server:
    """One connection to an app."""

    def __init__(self, protocol: GatheringProtocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.protocol = protocol
        self.reader = reader
        self.writer = writer

    @property
    def written(self) -> list[bytes]:
        recorder = cast("Any", self.protocol.transport)._transport
        found: list[bytes] = recorder.written
        return found

    @property
    def timer(self) -> asyncio.TimerHandle | None:
        return self.protocol.timeout_keep_alive_task

    async def answer(self) -> bytes:
        """Read one answer of a byte."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5) + await self.reader.readexactly(1)


async def one_byte(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": scope["path"][-1:].encode()})


@asynccontextmanager
async def serving(app: Callable[[Scope, Receive, Send], Awaitable[None]], keep_alive: float = 60) -> AsyncIterator[Server]:
    config = Config(cast("Any", app), timeout_keep_alive=cast("int", keep_alive), log_level="critical", lifespan="off")
    made: list[GatheringProtocol] = []

    class Recorded(GatheringProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(cast("asyncio.Transport", Recorder(transport)))
            made.append(self)

    def connect() -> GatheringProtocol:
        return Recorded(config=config, server_state=ServerState(), app_state={})

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(REQUEST % 0)
        assert (await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(1))[1] == b"0"
        try:
            yield Server(made[0], reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()


async def test_headers_and_body_are_written_at_once() -> None:
    async with serving(one_byte) as server:
        server.written.clear()
        server.writer.write(REQUEST % 1)
        assert (await server.answer()).endswith(b"1")
        assert len(server.written) == 1


async def test_what_is_sent_later_is_not_waited_for() -> None:
    taken = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        if scope["path"] == "/1":
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await taken.wait()
            await send({"type": "http.response.body", "body": b"b"})
        else:
            await send({"type": "http.response.body", "body": b"00"})

    async with serving(app) as server:
        assert await server.reader.readexactly(1) == b"0"
        server.writer.write(REQUEST % 1)
        assert (await server.answer()).endswith(b"a")
        taken.set()
        assert await server.reader.readexactly(1) == b"b"


async def test_a_lone_answer_is_out_before_the_app_goes_on() -> None:
    written: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await one_byte(scope, receive, send)
        written.append(len(server.written) if started else 0)

    started = False
    async with serving(app) as server:
        started = True
        for number in range(1, 10):
            server.written.clear()
            server.writer.write(REQUEST % number)
            await server.answer()
    assert written[1] == 0  # it does not know yet that it is alone
    assert written[-1] == 1


async def test_pipelined_requests_are_answered_in_turn() -> None:
    async with serving(one_byte) as server:
        server.writer.write(REQUEST % 1 + REQUEST % 2 + REQUEST % 3)
        assert [(await server.answer())[-1:] for _ in range(3)] == [b"1", b"2", b"3"]


async def test_the_scope_tells_how_many_bytes_the_head_has_at_most() -> None:
    """A request may come in parts, behind another one, or with its body; what is told may be too much, and never too little."""
    told: list[int] = []
    first = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(scope[SCOPE_HEAD_BYTES])
        await one_byte(scope, receive, send)

    post = b"POST /3 HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody"
    async with serving(app) as server:
        assert told == [len(REQUEST % 0)]
        feed = server.protocol.data_received

        def data_received(data: bytes) -> None:
            feed(data)
            first.set()

        server.protocol.data_received = data_received  # type: ignore[method-assign] # to know when the first part is in
        begun, rest = (REQUEST % 1)[:9], (REQUEST % 1)[9:]
        server.writer.write(begun)
        await first.wait()
        server.writer.write(rest + REQUEST % 2)
        assert [(await server.answer())[-1:] for _ in range(2)] == [b"1", b"2"]
        server.writer.write(post)
        assert (await server.answer()).endswith(b"3")
    assert told[1:] == [len(REQUEST % 1 + REQUEST % 2)] * 2 + [len(post)]


@pytest.mark.parametrize("spoiled", [b"a: b\nc", b"a: b\rc", b"a: b\0c", b"a\nb: c", b"a\0: b", b"a: b\r\n c"])
async def test_no_header_has_a_line_break_or_a_null_byte_in_it(spoiled: bytes) -> None:
    """The scope says so: where it tells of its size the gateway does not look again."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await one_byte(scope, receive, send)

    async with serving(app) as server:
        server.writer.write(b"GET /1 HTTP/1.1\r\nhost: x\r\n" + spoiled + b"\r\n\r\n")
        assert b" 400 " in await asyncio.wait_for(server.reader.readline(), 5)
    assert not any(byte in part for pair in seen for part in pair for byte in b"\r\n\0")


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    async with serving(one_byte, keep_alive=0.05) as server:
        assert await asyncio.wait_for(server.reader.read(), 5) == b""


async def test_the_timer_closes_neither_a_busy_connection_nor_one_that_has_not_been_idle_for_long() -> None:
    go_on, arrived = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/1":
            arrived.set()
            await go_on.wait()
        await one_byte(scope, receive, send)

    async with serving(app) as server:
        server.protocol.timeout_keep_alive_handler()  # idle, but not for long
        timers = [server.timer]
        server.writer.write(REQUEST % 1)
        await arrived.wait()
        server.protocol.timeout_keep_alive_handler()
        timers.append(server.timer)
        go_on.set()
        assert (await server.answer()).endswith(b"1")
        timers.append(server.timer)
        # While it is busy there is none, and at the end of the answer one again.
        assert [timer is not None for timer in timers] == [True, False, True]


async def test_one_timer_serves_all_requests_and_ends_with_the_connection() -> None:
    async with serving(one_byte) as server:
        timer = server.timer
        assert timer is not None
        for number in range(3):
            server.writer.write(REQUEST % number)
            await server.answer()
        assert server.timer is timer
        gone = asyncio.Event()
        lost = server.protocol.connection_lost

        def connection_lost(exc: Exception | None) -> None:
            lost(exc)
            gone.set()

        server.protocol.connection_lost = connection_lost  # type: ignore[method-assign]
        server.writer.close()
        await asyncio.wait_for(gone.wait(), 5)
        assert timer.cancelled()


async def test_what_the_client_does_not_take_is_waited_for() -> None:
    """A large answer passes through the flow control of the transport."""
    piece, pieces = b"0" * 1_000_000, 40
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/0":
            await one_byte(scope, receive, send)
            return
        size = b"%d" % (len(piece) * pieces)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]})
        for number in range(1, pieces + 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < pieces})
            sent.append(number)

    async with serving(app) as server:
        server.writer.write(REQUEST % 1)
        await asyncio.wait_for(server.reader.readuntil(b"\r\n\r\n"), 5)
        assert len(sent) < pieces / 2  # the kernel's buffers hold some
        assert len(await server.reader.readexactly(len(piece) * pieces)) == len(piece) * pieces
