"""What may happen between the decision to send a request and the end of the event loop's turn, in which it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from llmux_asgi import UpstreamFault
from llmux_asgi.upstream._asyncio import AsyncioConnection
from llmux_asgi.upstream._pool import Pool

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


@pytest.fixture(params=["asyncio", "uvloop"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def connected(pool: Pool) -> AsyncIterator[tuple[AsyncioConnection, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, and the server's end of it."""
    loop = asyncio.get_running_loop()
    ends: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()
    server = await asyncio.start_server(lambda reader, writer: ends.set_result((reader, writer)), "127.0.0.1", 0)
    async with server:
        _, connection = await loop.create_connection(partial(AsyncioConnection, loop, pool), *server.sockets[0].getsockname())
        reader, writer = await asyncio.wait_for(ends, 5)
        try:
            yield connection, reader, writer
        finally:
            pool.close()
            connection.close()
            writer.close()
            await writer.wait_closed()


async def nothing_comes(reader: asyncio.StreamReader) -> None:
    """The connection ends, by a reset or in order, without a byte."""
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)


def new_pool() -> Pool:
    return Pool(keepalive=60, limit=10)


@pytest.mark.anyio
async def test_a_request_is_sent_when_the_turn_is_over() -> None:
    async with connected(pool := new_pool()) as (connection, reader, writer):
        response = connection.start(b"POST", HEAD, b"body", 5)
        assert await reader.readexactly(len(HEAD) + 4) == HEAD + b"body"
        writer.write(OK)
        await response.head()
        assert (response.status, [chunk async for chunk in response], len(pool)) == (200, [b"hi"], 1)


@pytest.mark.anyio
async def test_the_parts_of_a_large_one_are_sent_in_order() -> None:
    async with connected(new_pool()) as (connection, reader, writer):
        parts = [bytes([letter]) * 400_000 for letter in b"abc"]
        response = connection.start(b"POST", HEAD, list(parts), 5)
        assert await reader.readexactly(len(HEAD) + 1_200_000) == HEAD + b"".join(parts)
        writer.write(OK)
        assert (await response.head()).status == 200


@pytest.mark.anyio
async def test_nothing_is_sent_of_one_that_is_given_up_before() -> None:
    async with connected(new_pool()) as (connection, reader, _):
        response = connection.start(b"POST", HEAD, b"body", 5)
        connection.close()
        with pytest.raises(UpstreamFault) as caught:
            await response.head()
        assert not caught.value.sent
        await nothing_comes(reader)


@pytest.mark.anyio
@pytest.mark.parametrize("unasked", [OK, b"junk"])
async def test_what_comes_before_it_is_no_answer_to_it(unasked: bytes) -> None:
    async with connected(pool := new_pool()) as (connection, reader, _):
        response = connection.start(b"POST", HEAD, b"body", 5)
        connection.data_received(unasked)  # as the event loop calls it
        with pytest.raises(UpstreamFault) as caught:
            await response.head()
        assert (response.status, caught.value.sent, len(pool)) == (0, False, 0)
        await nothing_comes(reader)


@pytest.mark.anyio
async def test_a_server_that_closes_before_it_has_not_got_it() -> None:
    async with connected(new_pool()) as (connection, _, _):
        response = connection.start(b"POST", HEAD, b"body", 5)
        connection.eof_received()
        with pytest.raises(UpstreamFault) as caught:
            await response.head()
        assert not caught.value.sent
