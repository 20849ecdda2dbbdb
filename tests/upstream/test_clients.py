"""What every client for the relay does, byte for byte: `Http1Upstream` on each event loop, and `HttpxUpstream`."""

from __future__ import annotations

import hashlib
import socket
import threading

import anyio
import msgspec
import pytest

from llmux_asgi import Origin, UpstreamFault
from llmux_asgi.upstream import Content
from tests.support.serve import free_port
from tests.support.wire import Peer
from tests.upstream.conftest import Client, until

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

WHOLE = {
    "length": (OK, 200, b"hi"),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b""),
    "chunked": (CHUNKED + b"1\r\nh\r\n1;x=y\r\ni\r\n0\r\nX-Trailer: 1\r\n\r\n", 200, b"hi"),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: </a>\r\n\r\n" + OK, 200, b"hi"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "304": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", 304, b""),
    "no reason": (b"HTTP/1.1 404 \r\ncontent-length: 2\r\n\r\nhi", 404, b"hi"),
    "500": (b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nhi", 500, b"hi"),
}


@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("case", WHOLE)
async def test_an_answer_is_read_however_it_comes(client: Client, case: str, bytewise: bool) -> None:
    answer, status, body = WHOLE[case]
    client.server.answer(answer, bytewise=bytewise)
    assert await client.read() == (status, body)


async def test_the_request_and_the_headers_of_the_answer_are_passed_as_they_are(client: Client) -> None:
    client.server.answer(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nset-cookie: b=\xe9\r\nX: \r\ncontent-length: 0\r\n\r\n")
    response = await client.send()
    await response.aclose()
    names = [(name.lower(), value) for name, value in response.headers]
    assert names == [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=\xe9"), (b"x", b""), (b"content-length", b"0")]
    [request] = client.server.requests
    lines = request.lower().split(b"\r\n")
    assert lines[0] == b"post /v1/x?q=%2f http/1.1"
    assert sorted(lines[1:4]) == sorted([b"host: " + client.origin.authority, b"x-a: 1", b"content-length: 2"])
    assert request.endswith(b"\r\n\r\n{}")


async def test_an_answer_without_length_ends_with_the_connection(client: Client) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.0 200 OK\r\n\r\nto the end")

    client.server.script = script
    assert await client.read() == (200, b"to the end")


async def test_the_first_bytes_are_there_before_the_last_are_sent(client: Client) -> None:
    seen = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(CHUNKED + b"3\r\none\r\n")
        assert seen.wait(10)
        peer.send(b"3\r\ntwo\r\n0\r\n\r\n")
        peer.client_left()

    client.server.script = script
    response = await client.send()
    chunks = aiter(response)
    assert await anext(chunks) == b"one"
    ended = [response.ended]
    seen.set()
    assert b"".join([chunk async for chunk in chunks]) == b"two"
    assert [*ended, response.ended] == [False, True]
    await response.aclose()


async def test_a_large_body_arrives_and_is_answered(client: Client) -> None:
    body = bytes(range(256)) * 40_000  # 10 MB

    def script(peer: Peer) -> None:
        request = peer.read_request()
        digest = hashlib.sha256(request.partition(b"\r\n\r\n")[2]).hexdigest().encode()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 64\r\nconnection: close\r\n\r\n" + digest)
        peer.client_left()

    client.server.script = script
    assert await client.read(body=body) == (200, hashlib.sha256(body).hexdigest().encode())
    view = memoryview(body)
    large: list[Content] = [[view[:7], b"", view[7:]], [view[: len(body) // 2], view[len(body) // 2 :]], [body]]
    for pieces in large:
        assert await client.read(body=pieces) == (200, hashlib.sha256(body).hexdigest().encode())
    smalls: list[tuple[Content, bytes]] = [([b"{", memoryview(b"}")], b"{}"), ([], b""), ([b""], b"")]
    for small, whole in smalls:
        assert (await client.read(body=small))[1] == hashlib.sha256(whole).hexdigest().encode()


# What goes wrong


CUT = {
    "nothing": b"",
    "in the head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "in the body": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi",
    "in a chunk": CHUNKED + b"9\r\nhi",
    "before the last chunk": CHUNKED + b"2\r\nhi\r\n",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("case", CUT)
async def test_an_answer_that_is_cut_is_a_fault_and_is_not_asked_for_again(client: Client, case: str, reset: bool) -> None:
    def script(peer: Peer) -> None:
        client.server.requests.append(peer.read_request())
        peer.send(CUT[case])
        if reset:
            peer.reset()

    client.server.script = script
    with pytest.raises(UpstreamFault, match=r"^broke off: ") as caught:
        await client.read()
    assert caught.value.sent
    assert len(client.server.requests) == 1


async def test_a_server_that_does_not_listen_is_a_fault_of_which_nothing_was_sent(client: Client) -> None:
    client.origin = Origin(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UpstreamFault, match=r"^cannot be reached: ") as caught:
        await client.read()
    assert not caught.value.sent


async def test_a_connection_that_does_not_come_about_is_given_up(client: Client) -> None:
    client.timeouts = msgspec.structs.replace(client.timeouts, connect=0.02)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):  # its queue is full: the kernel answers no more
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        client.origin = Origin(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(UpstreamFault, match=r"^did not accept a connection within 0\.02 s\.$") as caught:
            await client.read()
    assert not caught.value.sent


@pytest.mark.parametrize("begun", [b"", CHUNKED, CHUNKED + b"2\r\nhi\r\n"], ids=["no answer", "head", "body"])
async def test_silence_is_given_up(client: Client, begun: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(begun)
        peer.client_left()

    client.server.script = script
    client.timeouts = msgspec.structs.replace(client.timeouts, read=0.02)
    with pytest.raises(UpstreamFault, match=r"^was silent for 0\.02 s\.$") as caught:
        await client.read()
    assert caught.value.sent


async def test_an_answer_may_take_longer_than_a_silence_may(client: Client) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        for start in range(0, len(OK), 8):
            peer.send(OK[start : start + 8])
            threading.Event().wait(0.1)  # the pace of the server is what is tested
        peer.client_left()

    client.server.script = script
    client.timeouts = msgspec.structs.replace(client.timeouts, read=0.4)
    assert await client.read() == (200, b"hi")


async def test_a_server_that_does_not_read_is_given_up(client: Client) -> None:
    given_up = threading.Event()

    def script(peer: Peer) -> None:
        assert given_up.wait(10)

    client.server.script = script
    client.timeouts = msgspec.structs.replace(client.timeouts, read=0.05)
    with pytest.raises(UpstreamFault, match=r"^(did not read the request|was silent) for 0\.05 s\.$"):
        await client.read(body=bytes(20_000_000))
    given_up.set()


async def test_a_client_that_leaves_before_the_answer_ends_the_exchange(client: Client) -> None:
    arrived, left = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        arrived.set()
        peer.client_left()
        left.set()

    client.server.script = script
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.read)
        await until(arrived)
        tasks.cancel_scope.cancel()
    await until(left)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_client_that_leaves_in_the_middle_of_an_answer_ends_the_exchange(client: Client, cancelled: bool) -> None:
    left = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(CHUNKED + b"3\r\none\r\n")
        peer.client_left()
        left.set()

    client.server.script = script
    with anyio.CancelScope() as scope:
        response = await client.send()
        try:
            assert await anext(aiter(response)) == b"one"
            if cancelled:
                scope.cancel()
                await anext(aiter(response))
        finally:
            await response.aclose()
    await until(left)


async def test_a_reader_that_takes_its_time_makes_the_server_wait(client: Client) -> None:
    sent = 0
    stuck = threading.Event()

    def script(peer: Peer) -> None:
        nonlocal sent
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        peer.socket.settimeout(0.2)
        try:
            while sent < 100_000_000:
                sent += peer.socket.send(bytes(65536))
        except TimeoutError:
            stuck.set()
            peer.socket.settimeout(10)
            peer.client_left()

    client.server.script = script
    response = await client.send()
    await anext(aiter(response))
    await until(stuck)  # about 6 MB lie in the kernel's buffers
    total = sum([len(chunk) for chunk in [await anext(aiter(response)) for _ in range(3)]])
    assert 0 < total < 2_000_000
    await response.aclose()
