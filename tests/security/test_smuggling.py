"""One request in is at most one request out, and neither headers nor answers can be made of something else."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from llmux_asgi import LLMuxApp
from tests.security.conftest import CHAT, Fortress
from tests.security.wire import Request, post, recording
from tests.support.serve import EventLoop

BODY = b'{"model": "a"}'
SMUGGLED = b"POST /llm/v1/completions HTTP/1.1\r\nhost: x\r\nx-smuggled: 1\r\ncontent-length: 14\r\n\r\n" + BODY
CHUNKED = b"e\r\n" + BODY + b"\r\n0\r\n\r\n"


def head(*lines: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    return b"\r\n".join([b"POST %s %s" % (CHAT.encode(), version), b"host: gateway", *lines]) + b"\r\n\r\n"


# What can be read in two ways. Whatever the server in front makes of it, what is behind it must stay part of the body or be
# refused: `SMUGGLED` is a request only for who was fooled.
AMBIGUOUS = {
    "length-and-chunked": head(b"content-length: 14", b"transfer-encoding: chunked") + BODY + SMUGGLED,
    "chunked-and-length": head(b"transfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n" + SMUGGLED,
    "two-lengths": head(b"content-length: 14", b"content-length: %d" % (14 + len(SMUGGLED))) + BODY + SMUGGLED,
    "two-lengths-in-one": head(b"content-length: 14, %d" % (14 + len(SMUGGLED))) + BODY + SMUGGLED,
    "length-with-plus": head(b"content-length: +14") + BODY + SMUGGLED,
    "length-negative": head(b"content-length: -1") + BODY + SMUGGLED,
    "length-hex": head(b"content-length: 0xe") + BODY + SMUGGLED,
    "length-underscore": head(b"content-length: 1_4") + BODY + SMUGGLED,
    "length-too-long": head(b"content-length: " + b"9" * 40) + BODY + SMUGGLED,
    "length-empty": head(b"content-length:") + BODY + SMUGGLED,
    "length-with-words": head(b"content-length: 14 bytes") + BODY + SMUGGLED,
    "chunked-twice": head(b"transfer-encoding: chunked", b"transfer-encoding: identity") + BODY + SMUGGLED,
    "chunked-not-last": head(b"transfer-encoding: chunked, identity") + BODY + SMUGGLED,
    "chunked-misspelled": head(b"transfer-encoding: xchunked") + BODY + SMUGGLED,
    "chunked-with-control": head(b"transfer-encoding: \x0bchunked", b"content-length: 14") + BODY + SMUGGLED,
    "space-before-colon": head(b"transfer-encoding : chunked", b"content-length: 14") + CHUNKED + SMUGGLED,
    "folded": head(b"x: y\r\n transfer-encoding: chunked", b"content-length: 14") + BODY,
    "bare-line-feed": head(b"x: y\ntransfer-encoding: chunked", b"content-length: 14") + BODY,
    "bare-carriage-return": head(b"x: y\rtransfer-encoding: chunked", b"content-length: 14") + BODY,
    "null-in-value": head(b"x: y\0z", b"content-length: 14") + BODY,
    "null-in-name": head(b"x\0y: z", b"content-length: 14") + BODY,
    "chunk-size-negative": head(b"transfer-encoding: chunked") + b"-e\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunk-size-hex-prefix": head(b"transfer-encoding: chunked") + b"0xe\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunk-size-overflow": head(b"transfer-encoding: chunked") + b"1000000000000000e\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunk-without-end": head(b"transfer-encoding: chunked") + b"e\r\n" + BODY + b"XX0\r\n\r\n" + SMUGGLED,
    "old-version-chunked": head(b"transfer-encoding: chunked", version=b"HTTP/1.0") + CHUNKED + SMUGGLED,
    "version-unknown": head(b"content-length: 14", version=b"HTTP/1.9") + BODY,
    "blank-in-target": b"POST /llm/v1/chat/completions /sleep HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n" + BODY,
}
# What is not refused by llhttp, which uvicorn has, and by h11, which hypercorn has.
TAKEN = {
    "asyncio": {"old-version-chunked"},
    # hypercorn hands chunks in HTTP/1.0 to the app, and answers 400 all the same.
    "trio": {"old-version-chunked", "chunked-and-length", "folded", "bare-line-feed", "chunk-size-overflow", "version-unknown"},
}


def consistent(request: Request) -> None:
    """A server can read it in one way only."""
    assert request.values("content-length") == [str(len(request.body))]
    assert request.values("transfer-encoding") == []
    assert len(request.values("host")) == 1


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_request_is_refused_or_made_unambiguous(gateway: Fortress, loop: EventLoop, name: str) -> None:
    taken = name in TAKEN[loop]
    answer = gateway.send(AMBIGUOUS[name], patience=0.2 if taken else 5)
    if taken:
        assert all(status < 500 for status in answer.statuses), answer.raw[:300]
    else:
        assert answer.statuses in ([400], [501]), answer.raw[:300]  # 501: a transfer coding that is not known
        assert answer.closed
        assert gateway.asked == []
    for request in gateway.asked:
        consistent(request)


def test_what_belongs_to_the_connection_is_not_passed_up(gateway: Fortress) -> None:
    lines = [
        b"te: trailers",
        b"trailer: x-late",
        b"keep-alive: timeout=100",
        b"proxy-connection: keep-alive",
        b"proxy-authorization: Basic c2VjcmV0",
        b"connection: x-hop, Keep-Alive",
        b"x-hop: 1",
        b"x-llmux-model: a",
        b"transfer-encoding: chunked",
    ]
    sent = head(b"connection: close", *lines) + b'7;ext="x"\r\n{"model\r\n7\r\n": "a"}\r\n0\r\nx-late: 1\r\n\r\n'
    assert gateway.send(sent).statuses == [200]
    (request,) = gateway.asked
    consistent(request)
    assert request.body == BODY
    dropped = {line.partition(b":")[0].decode() for line in lines} - {"connection"}
    assert dropped & {name.lower() for name, _ in request.headers} == set()
    assert set(request.values("connection")) <= {"keep-alive", "close"}


def test_neither_upgrade_nor_expect_is_passed_up(gateway: Fortress) -> None:
    lines = [b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAAP__", b"connection: upgrade, http2-settings, close"]
    for extra in (lines, [b"upgrade: h2c", b"connection: close"], [b"expect: 100-continue", b"connection: close"]):
        gateway.send(head(*extra, b"content-length: 14") + BODY, patience=1)
    for request in gateway.asked:
        consistent(request)
        assert request.values("upgrade") == request.values("expect") == request.values("http2-settings") == []


@pytest.mark.anyio
async def test_a_trailer_is_not_passed_up() -> None:
    """uvicorn adds the fields behind a body to the headers, by when those have been looked at."""
    with recording() as server:
        llm = LLMuxApp({"models": {"a": {"url": server.url}}})
        headers: list[tuple[bytes, bytes]] = [(b"x-early", b"1")]
        sent: list[Any] = []
        more = [True, False]

        async def receive() -> Any:
            if not more:
                await anyio.sleep_forever()
            headers.append((b"content-encoding", b"gzip"))
            return {"type": "http.request", "body": b"" if more[0] else BODY, "more_body": more.pop(0)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        with anyio.fail_after(5):
            await llm(scope, receive, send)
            await llm.aclose()
        assert sent[0]["status"] == 200
        request = server.requests[-1]
        assert (request.values("x-early"), request.values("content-encoding")) == (["1"], [])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([(b"x", b"y\r\nx-injected: 1")], b""),
        ([(b"x", b"y\nx-injected: 1")], b""),
        ([(b"x", b"y\rx-injected: 1")], b""),
        ([(b"x", b"y\0")], b""),
        ([(b"x\r\nx-injected", b"y")], b""),
        ([(b"x-llmux-priority", b"a\r\nx-injected: 1")], b""),
        ([], b"x HTTP/1.1\r\nx-injected: 1"),
        ([], b"x HTTP/1.1"),
        ([], b"x\ty"),
        ([], b"x\0"),
        ([], b"x#y"),
        ([], "é".encode()),
    ],
)
async def test_a_line_break_that_no_parser_has_refused_is(headers: list[tuple[bytes, bytes]], query: bytes) -> None:
    """HTTP/2 servers and hosts that rewrite requests may hand over what HTTP/1.1 could not have carried."""
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}})  # where nobody listens: it must not be asked
    sent: list[Any] = []

    bodies = [BODY]

    async def receive() -> Any:
        if not bodies:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": bodies.pop()}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": query, "headers": headers}
    with anyio.fail_after(5):
        await llm(scope, receive, send)
    await llm.aclose()
    assert sent[0]["status"] == 400


def test_the_rest_of_a_refused_body_is_not_taken_for_a_request(tight: Fortress) -> None:
    for lines in ([b"content-length: 300000"], [b"transfer-encoding: chunked"]):
        filler = b"x" * 250_000 + SMUGGLED
        rest = b"%x\r\n" % len(filler) + filler if lines[0].startswith(b"transfer") else filler
        answer = tight.send(head(*lines) + rest, patience=0.3)
        assert answer.statuses == [413], answer.raw[:300]
    assert tight.asked == []


@pytest.mark.parametrize(
    "line",
    [b"x: y\rset-cookie: evil=1", b"x: y\nset-cookie: evil=1", b"x: y\0", b"x: y\r\n set-cookie: evil=1", b"x y: z", b": z"],
)
def test_a_server_cannot_split_the_answer(gateway: Fortress, line: bytes) -> None:
    gateway.server.answer = lambda request: b"HTTP/1.1 200 OK\r\n" + line + b"\r\ncontent-length: 2\r\n\r\n{}"
    answer = gateway.post()
    assert len(answer.statuses) == 1
    lines = answer.head.split(b"\r\n")
    # A bare line feed is taken for the end of a line by some parsers: then it is two headers here too, and no line has both.
    assert not any(b"\n" in each or b"\r" in each or b"\0" in each for each in lines)


def test_what_belongs_to_the_connection_is_not_passed_down(gateway: Fortress) -> None:
    def answer(request: Request) -> bytes:
        lines = [b"connection: keep-alive, x-hop", b"x-hop: 1", b"keep-alive: timeout=99", b"proxy-authenticate: x"]
        lines += [b"upgrade: h2c", b"trailer: x-late", b"transfer-encoding: chunked"]
        return b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(lines) + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n"

    gateway.server.answer = answer
    got = gateway.post()
    assert got.statuses == [200]
    names = {line.partition(b":")[0].lower() for line in got.head.split(b"\r\n")[1:]}
    assert names & {b"x-hop", b"keep-alive", b"proxy-authenticate", b"upgrade", b"trailer"} == set()
    assert not {b"content-length", b"transfer-encoding"} <= names


def test_an_answer_of_two_lengths_is_not_passed_on(gateway: Fortress) -> None:
    for lines in (b"transfer-encoding: chunked\r\ncontent-length: 2", b"content-length: 2\r\ncontent-length: 3"):
        gateway.server.answer = lambda request, lines=lines: b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
        assert gateway.post().statuses == [502]


def test_what_a_server_sends_after_its_answer_is_nobodys_answer(gateway: Fortress) -> None:
    extra = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"

    def answer(request: Request) -> bytes:
        body = request.values("x-number")[0].encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body + extra

    gateway.server.answer = answer
    for number in range(5):
        got = gateway.post(BODY, b"x-number: %d" % number)
        assert b"poison" not in got.raw
        if got.statuses == [200]:  # else the server is not believed any more, which is as good
            assert got.raw.endswith(b"\r\n%d" % number) or b"\r\n%d\r\n" % number in got.raw


def test_two_requests_on_one_connection_get_their_own_answers(gateway: Fortress) -> None:
    first, second = b'{"model": "a", "n": 1}', b'{"model": "a", "n": 2}'
    pipelined = head(b"content-length: %d" % len(first)) + first + post(CHAT, second)
    answer = gateway.send(pipelined)
    assert answer.statuses == [200, 200]
    assert answer.raw.index(first) < answer.raw.index(second)
