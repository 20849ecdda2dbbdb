"""What one client can make the gateway hold, and for how long."""

from __future__ import annotations

import gzip
from contextlib import ExitStack

import pytest

from llmux_asgi import LLMuxApp
from llmux_asgi._intake import Intake
from tests.security.conftest import CHAT, Fortress
from tests.security.wire import Answer, Request, opened, post
from tests.support.eventually import eventually

BODY = b'{"model": "a"}'
SIZE = 200_000
"""`limits.max_body` of the tight gateway."""


def in_flight(llm: LLMuxApp) -> int:
    return sum(llm.switcher.statistics().in_flight.values())


def began(length: int, *lines: bytes) -> bytes:
    """The head of a request whose body does not come with it."""
    return post(CHAT, b"", *lines).replace(b"content-length: 0", b"content-length: %d" % length)


@pytest.mark.parametrize("where", ["value", "name", "many", "query"])
def test_headers_over_the_limit_are_a_431(tight: Fortress, where: str) -> None:
    target = CHAT + ("?" + "x" * 5000 if where == "query" else "")
    lines = {"value": [b"x: " + b"y" * 5000], "name": [b"x" * 5000 + b": y"], "many": [b"x%d: y" % n for n in range(1000)]}
    answer = tight.post(BODY, *lines.get(where, []), target=target)
    assert (answer.statuses, answer.error["code"]) == ([431], "headers_too_large")
    assert tight.asked == []


def test_headers_below_the_limit_are_passed_on(tight: Fortress) -> None:
    assert tight.post(BODY, b"x: " + b"y" * 3500).statuses == [200]
    assert tight.asked[0].values("x") == ["y" * 3500]


@pytest.mark.parametrize("lines", [(b"content-length: 200001",), (b"transfer-encoding: chunked",)])
def test_a_body_over_the_limit_is_a_413_before_it_is_all_there(tight: Fortress, lines: tuple[bytes, ...]) -> None:
    sent = began(SIZE + 1) if lines[0].startswith(b"content") else began(0).replace(b"content-length: 0", lines[0])
    part = b"" if lines[0].startswith(b"content") else b"%x\r\n" % (SIZE + 1) + b" " * (SIZE + 1)
    answer = tight.send(sent, part)  # and never the rest
    assert (answer.statuses, answer.error["code"]) == ([413], "request_too_large")


@pytest.mark.parametrize("part", [b"", BODY[:5]])
def test_a_body_that_does_not_come_is_a_408_and_the_connection_is_closed(tight: Fortress, part: bytes) -> None:
    # As one that would be kept open: the rest of the body may come at any time, and must not be taken for a request.
    answer = tight.send(began(len(BODY)).replace(b"connection: close\r\n", b""), part)
    assert (answer.statuses, answer.error["code"], answer.closed) == ([408], "request_timeout", True)
    assert b"connection: close" in answer.head.lower()
    assert tight.asked == []


def test_a_body_that_comes_drop_by_drop_is_a_408(tight: Fortress) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(opened(tight.url, began(SIZE)))
        client.settimeout(0.02)
        answer = b""
        for _ in range(200):  # each in time, the whole not
            client.sendall(b" ")
            try:
                answer = client.recv(65536)
                break
            except TimeoutError:
                continue
        assert Answer(answer, closed=False).statuses == [408]


def test_a_client_that_sends_slowly_holds_no_lease(gateway: Fortress) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(opened(gateway.url, began(len(BODY)) + BODY[:5]))
        eventually("the gateway reads", lambda: gateway.app._inference.intake.held == 5)
        assert in_flight(gateway.app) == 0
        client.sendall(BODY[5:])
        assert b"200" in client.recv(65536)


def test_all_bodies_together_are_bounded_and_given_back(gateway: Fortress, monkeypatch: pytest.MonkeyPatch) -> None:
    intake = gateway.app._inference.intake
    monkeypatch.setattr(intake, "max_buffered", 300_000)
    with ExitStack() as stack:
        large = began(SIZE) + b'{"model": "a", "x": "'
        stack.enter_context(opened(gateway.url, large + b"x" * 150_000))
        eventually("the first is held", lambda: intake.held > 150_000)
        answer = gateway.post(b'{"model": "a", "x": "' + b"x" * 160_000 + b'"}')
        assert (answer.statuses, answer.error["code"]) == ([503], "buffers_full")
        assert b"retry-after: 1" in answer.head.lower()
        assert gateway.post().statuses == [200]  # a small one has room
    eventually("all of it is given back", lambda: intake.held == 0)
    assert gateway.post(b'{"model": "a", "x": "' + b"x" * 160_000 + b'"}').statuses == [200]


def test_a_client_that_does_not_read_gives_its_lease_back(tight: Fortress) -> None:
    huge = b"x" * 30_000_000
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(huge)
    tight.server.answer = lambda request: head + huge
    with ExitStack() as stack:
        stack.enter_context(opened(tight.url, post(CHAT), window=4096))
        eventually("it has its lease", lambda: in_flight(tight.app) == 1)
        eventually("it is dropped", lambda: in_flight(tight.app) == 0, limit=5)
    tight.server.answer = None
    assert tight.post().statuses == [200]


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd", b"GZIP", b"identity, gzip"])
def test_a_compressed_body_is_refused_and_never_inflated(tight: Fortress, coding: bytes) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    answer = tight.post(bomb, b"content-encoding: " + coding)
    assert (answer.statuses, answer.error["code"]) == ([415], "unsupported_content_encoding")
    assert tight.post(BODY, b"content-encoding: identity").statuses == [200]


def test_a_compressed_answer_is_passed_on_as_it_is(gateway: Fortress) -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)

    def answer(request: Request) -> bytes:
        assert request.values("accept-encoding") == ["identity"]
        return b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb) + bomb

    gateway.server.answer = answer
    assert gateway.post(BODY, b"accept-encoding: gzip, br").raw.endswith(bomb)


def test_an_event_that_does_not_end_is_not_held_back_for_ever(gateway: Fortress) -> None:
    endless = b"data: " + b"x" * 3_000_000  # and there it stays, without an end of the event or the answer
    gateway.server.answer = lambda request: b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + endless
    received = 0
    with opened(gateway.url, post(CHAT)) as client:
        while received < 2_000_000:
            received += len(client.recv(65536))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "a", "x": ' + b'{"x":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"x": ' + b"[" * 100_000,
        b'{"model": ' + b"9" * 100_000 + b"}",
        b'{"model": 1e999999999}',
        b'{"model": {"model": "a"}}',
        b'{"model": ["a"]}',
        b'{"model": "' + b"\\u0061" * 20_000 + b'"}',
        b'{"model": "\\ud800"}',
        b"\xef\xbb\xbf" + BODY,
        BODY.decode().encode("utf-16"),
        BODY + BODY,
    ],
    ids=["lists", "objects", "open", "number", "exponent", "object", "list", "escapes", "surrogate", "bom", "utf-16", "two"],
)
def test_a_json_bomb_is_a_client_error_and_reaches_no_server(gateway: Fortress, body: bytes) -> None:
    assert gateway.post(body).statuses in ([400], [404])
    assert gateway.asked == []


def test_a_flood_of_connections_that_say_nothing_takes_nothing(gateway: Fortress) -> None:
    with ExitStack() as stack:
        for start in (b"", b"POST ", b"POST /llm/v1/chat/completions HTTP/1.1\r\nhost: x\r\n", began(100)):
            for _ in range(50):
                stack.enter_context(opened(gateway.url, start))
        assert gateway.post().statuses == [200]
        eventually("only that one had a lease", lambda: in_flight(gateway.app) == 0)
        eventually("and its body is not held", lambda: gateway.app._inference.intake.held == 0)


def test_the_limits_are_those_of_the_configuration() -> None:
    limits = {"max_body": 5, "max_headers": 2000, "max_buffered": 7, "body_timeout": 8, "write_timeout": 9}
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}, "limits": limits})
    assert (llm._inference.max_body, llm._inference.intake) == (5, Intake(2000, 8, 7))
    assert llm._proxy.write_timeout == 9
