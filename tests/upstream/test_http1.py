"""What `Http1Upstream` does with its connections: when one is used again, when not, and when a request is sent again."""

from __future__ import annotations

import gc
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from llmux_asgi import Http1Upstream, InvalidRequestError, Origin, TimeoutsConfig, UpstreamFault
from llmux_asgi.upstream._request import request_head
from tests.support.eventually import eventually
from tests.support.wire import Peer, WireServer, wire_server
from tests.upstream.conftest import BACKENDS, Client

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def upstream(client: Client) -> Http1Upstream:
    assert isinstance(client.upstream, Http1Upstream)
    return client.upstream


@pytest.mark.anyio
async def test_a_connection_serves_one_request_after_the_other(client: Client, upstream: Http1Upstream) -> None:
    client.server.answer(OK, STREAM + b"2\r\nhi\r\n0\r\n\r\n", b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nhi", OK)
    assert [await client.read() for _ in range(4)] == [(200, b"hi"), (200, b"hi"), (404, b"hi"), (200, b"hi")]
    assert client.server.connections == 1
    assert upstream.idle == 1


@pytest.mark.anyio
async def test_a_connection_is_free_before_its_answer_is_taken(client: Client, upstream: Http1Upstream) -> None:
    client.server.answer(OK)
    response = await client.send()
    assert upstream.idle == 1
    assert [chunk async for chunk in response] == [b"hi"]
    await response.aclose()
    assert upstream.idle == 1


@pytest.mark.anyio
async def test_requests_at_once_have_a_connection_each_and_a_limited_number_is_kept(client: Client) -> None:
    client.server.answer(OK)
    client.upstream = upstream = Http1Upstream(max_idle=20)
    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(client.read)
    assert client.server.connections == 50
    assert upstream.idle == 20
    await upstream.aclose()
    assert upstream.idle == 0


@pytest.mark.anyio
async def test_the_connection_that_was_used_last_is_used_first(client: Client) -> None:
    used: list[Peer] = []
    both = threading.Barrier(2)

    def script(peer: Peer) -> None:
        while peer.read_request():
            used.append(peer)
            if len(used) <= 2:
                both.wait(10)
            peer.send(OK)

    client.server.script = script
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.read)
        tasks.start_soon(client.read)
    for _ in range(3):
        await client.read()
    assert used[0] is not used[1]
    assert used[2] is used[3] is used[4]


SPENT = {
    "it says so": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    "vLLM closes it after a 500": b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nhi",
    "there is something behind the answer": OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", SPENT)
async def test_a_connection_is_not_used_again(client: Client, upstream: Http1Upstream, case: str) -> None:
    client.server.answer(SPENT[case])
    for _ in range(2):
        assert (await client.read())[1] == b"hi"
        assert upstream.idle == 0
    assert client.server.connections == 2


@pytest.mark.anyio
async def test_the_answer_to_head_has_no_body_whatever_its_length_says(client: Client) -> None:
    client.server.answer(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n")
    assert await client.read(b"HEAD", b"") == (200, b"")
    assert b"content-length" not in client.server.requests[0]
    assert await client.read(b"HEAD", b"") == (200, b"")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "unasked", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"\r\n"], ids=["end", "answer", "line"]
)
async def test_a_kept_connection_that_has_ended_or_says_something_is_thrown_away(client: Client, unasked: bytes) -> None:
    go, gone = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        client.server.requests.append(peer.read_request())
        peer.send(OK)
        if client.server.connections == 1:
            assert go.wait(10)
            peer.send(unasked)
            if not unasked:
                peer.socket.close()
            gone.set()
        if unasked or client.server.connections > 1:
            peer.client_left()

    client.server.script = script
    assert await client.read() == (200, b"hi")
    go.set()
    assert gone.wait(10)  # without letting the event loop see it
    assert await client.read() == (200, b"hi")
    assert (client.server.connections, len(client.server.requests)) == (2, 2)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])  # trio's is looked at when it is to be used
async def test_a_connection_that_the_server_closes_leaves_the_pool(client: Client, upstream: Http1Upstream) -> None:
    client.server.script = lambda peer: peer.send(peer.read_request() and OK)
    assert await client.read() == (200, b"hi")
    await anyio.to_thread.run_sync(eventually, "it has left", lambda: upstream.idle == 0)


@pytest.mark.anyio
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_request_that_a_kept_connection_took_is_not_sent_again(client: Client, reset: bool) -> None:
    """The server may have executed it, and may have died of it."""

    def script(peer: Peer) -> None:
        client.server.requests.append(peer.read_request())
        peer.send(OK)
        client.server.requests.append(peer.read_request())
        if reset:
            peer.reset()

    client.server.script = script
    assert await client.read() == (200, b"hi")
    with pytest.raises(UpstreamFault, match=r"^broke off: ") as caught:
        await client.read()
    assert caught.value.sent
    assert (client.server.connections, len(client.server.requests)) == (1, 2)


@pytest.mark.anyio
async def test_a_request_that_a_kept_connection_did_not_take_is_sent_on_a_new_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closed it in the moment between the look at it and the first byte."""
    for module in ("_asyncio", "_streams"):
        monkeypatch.setattr(f"llmux_asgi.upstream.{module}.probe", lambda sock: lambda timeout: [])
    reset = threading.Event()

    def script(peer: Peer) -> None:
        client.server.requests.append(peer.read_request())
        peer.send(OK)
        if client.server.connections == 1:
            peer.reset()
            reset.set()
        else:
            peer.client_left()

    client.server.script = script
    assert await client.read() == (200, b"hi")
    assert reset.wait(10)
    assert await client.read() == (200, b"hi")
    assert (client.server.connections, len(client.server.requests)) == (2, 2)


@pytest.mark.anyio
async def test_silence_on_a_kept_connection_is_not_taken_for_its_end(client: Client) -> None:
    client.server.answer(OK, b"")
    assert await client.read() == (200, b"hi")
    client.timeouts = msgspec.structs.replace(client.timeouts, read=0.02)
    with pytest.raises(UpstreamFault, match="was silent"):
        await client.read()
    assert len(client.server.requests) == 2
    assert client.server.connections == 1


@pytest.mark.anyio
async def test_a_connection_that_was_idle_for_too_long_is_not_used(client: Client) -> None:
    client.server.answer(OK)
    client.upstream = upstream = Http1Upstream(keepalive=0)
    assert [await client.read() for _ in range(3)] == [(200, b"hi")] * 3
    assert client.server.connections == 3
    await upstream.aclose()


@pytest.mark.anyio
async def test_a_connection_that_is_not_used_any_more_is_closed_without_a_further_request(client: Client) -> None:
    client.server.answer(OK)
    client.upstream = upstream = Http1Upstream(keepalive=0.3)
    assert await client.read() == (200, b"hi")
    assert upstream.idle == 1
    await anyio.to_thread.run_sync(eventually, "it is closed", lambda: upstream.idle == 0)


@pytest.mark.anyio
async def test_the_answer_of_a_server_that_does_not_want_the_rest_of_the_body_arrives(client: Client) -> None:
    seen, over = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.socket.recv(1000)
        peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n")
        assert seen.wait(20)
        peer.send(b"hi")
        assert over.wait(20)  # and takes nothing of it

    client.server.script = script
    for _ in range(2):
        response = await client.send(body=bytes(20_000_000))
        seen.set()
        assert [chunk async for chunk in response] == [b"hi"]
        await response.aclose()
    over.set()
    assert client.server.connections == 2


@pytest.mark.anyio
async def test_a_connection_without_time_limit_waits(client: Client) -> None:
    go = threading.Event()

    def script(peer: Peer) -> None:
        for _ in range(2):
            peer.read_request()
            assert go.wait(10)
            peer.send(OK)
        peer.client_left()

    client.server.script = script
    client.timeouts = TimeoutsConfig(read=0.05)
    go.set()
    assert await client.read() == (200, b"hi")
    go.clear()
    client.timeouts = TimeoutsConfig(read=None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.read)
        await anyio.sleep(0.1)  # longer than the limit that the first request had
        go.set()
    await client.upstream.aclose()


# Event loops


def ask_once(upstream: Http1Upstream, origin: Origin, kind: str) -> None:
    async def main() -> None:
        response = await upstream.request(b"POST", origin, b"/", [], b"{}", TimeoutsConfig())
        assert [chunk async for chunk in response] == [b"hi"]
        await response.aclose()
        assert upstream.idle == 1

    backend, options = BACKENDS[kind]
    anyio.run(main, backend=backend, backend_options=options)


def test_a_second_event_loop_begins_anew_and_none_leaves_a_connection_open(server: WireServer, kind: str) -> None:
    """Nobody calls `aclose`: an app that is mounted without its lifespan is told of no end."""
    server.answer(OK)
    upstream = Http1Upstream()
    for count in (1, 2):
        ask_once(upstream, Origin(server.url), kind)
        assert server.connections == count
        server.join()  # they are closed
    del upstream
    gc.collect()  # a socket that was left open would warn


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True)
    with path.open("ab") as file:
        file.write(path.with_suffix(".crt").read_bytes())
    return path


@pytest.mark.anyio
async def test_https_is_spoken_to_a_server_with_a_known_certificate_and_no_other(client: Client, certificate: Path) -> None:

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with wire_server(context) as server:
        server.answer(OK, STREAM + b"2\r\nhi\r\n0\r\n\r\n")
        client.origin = Origin(server.url)
        trusting = ssl.create_default_context(cafile=str(certificate.with_suffix(".crt")))
        client.upstream = upstream = Http1Upstream(ssl_context=trusting)
        assert await client.read() == (200, b"hi")
        assert await client.read(body=bytes(1_000_000)) == (200, b"hi")
        assert server.connections == 1
        await upstream.aclose()
        await anyio.to_thread.run_sync(server.join)  # they are closed
        client.upstream = Http1Upstream()
        with pytest.raises(UpstreamFault, match=r"^cannot be reached: .*certificate") as caught:
            await client.read()
        assert not caught.value.sent
        await client.upstream.aclose()
        await anyio.to_thread.run_sync(server.join)


# Requests


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        (b"POST", b"/a b", []),
        (b"POST", b"/a\r\nx: y", []),
        (b"POST", b"", []),
        (b"PO ST", b"/", []),
        (b"", b"/", []),
        (b"POST", b"/", [(b"x", b"a\r\ny: b")]),
        (b"POST", b"/", [(b"x\r\ny", b"a")]),
        (b"POST", b"/", [(b"x", b"a\nb")]),
        (b"POST", b"/", [(b"x", b"a\rb")]),
        (b"POST", b"/", [(b"x", b"a\0b")]),
    ],
)
def test_a_request_that_would_be_two_is_refused(method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(InvalidRequestError, match="contain what HTTP does not allow"):
        request_head(method, b"h", target, headers, 2)


def test_a_head_is_what_was_asked_for() -> None:
    assert request_head(b"GET", b"h", b"/", [], 0) == b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
    assert request_head(b"POST", b"h", b"/", [], 0) == b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n"
    assert request_head(b"GET", b"h", b"/", [(b"a", b"b")], 0) == b"GET / HTTP/1.1\r\nhost: h\r\na: b\r\n\r\n"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a", (False, "a", 80, b"a")),
        ("http://A:81/v1", (False, "a", 81, b"a:81")),
        ("https://a.b", (True, "a.b", 443, b"a.b")),
        ("http://[::1]:8000", (False, "::1", 8000, b"[::1]:8000")),
        ("http://user:secret@a:81", (False, "a", 81, b"a:81")),
    ],
)
def test_an_origin_is_taken_apart(url: str, expected: tuple[Any, ...]) -> None:
    origin = Origin(url)
    assert (origin.tls, origin.host, origin.port, origin.authority) == expected
    assert "secret" not in origin.url
