"""What the gateway reads and writes of OpenAI's API."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux_asgi._openai import (
    AnswerHead,
    InterruptedAnswer,
    relayed_request_headers,
    split_events,
)


def test_headers_of_the_clients_connection_are_dropped() -> None:
    headers = [
        (b"host", b"x"),
        (b"content-length", b"3"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"close, X-Secret"),
        (b"connection", b"X-Other"),
        (b"x-secret", b"1"),
        (b"x-other", b"1"),
        (b"expect", b"100-continue"),
        (b"accept", b"a"),
        (b"accept", b"b"),
    ]
    assert relayed_request_headers(headers) == [(b"accept", b"a"), (b"accept", b"b"), (b"accept-encoding", b"identity")]


def test_headers_of_the_servers_connection_are_dropped_whatever_their_case() -> None:
    answer = [(b"Content-Length", b"3"), (b"Date", b"x"), (b"Server", b"x"), (b"Keep-Alive", b"x"), (b"X", b"1")]
    assert AnswerHead.of(answer) == AnswerHead([(b"content-length", b"3"), (b"x", b"1")], 3, is_events=False)
    chunked = AnswerHead.of([*answer, (b"Transfer-Encoding", b"chunked"), (b"X-Hop", b"1"), (b"Connection", b"x-hop")])
    assert chunked == AnswerHead([(b"x", b"1")], None, is_events=False)


@pytest.mark.parametrize(
    ("headers", "is_events"),
    [
        ([(b"Content-Type", b"text/event-stream; charset=utf-8")], True),
        ([(b"content-type", b"application/json")], False),
        ([(b"content-type", b"text/event-stream"), (b"Content-Encoding", b"gzip")], False),
        ([(b"content-type", b"text/event-stream"), (b"content-encoding", b"identity")], True),
        ([], False),
    ],
)
def test_events_are_looked_into_if_they_are_not_compressed(headers: list[tuple[bytes, bytes]], is_events: bool) -> None:
    assert AnswerHead.of(headers).is_events is is_events


@given(st.lists(st.sampled_from([b"data: x", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b": ping\n\n"]), max_size=12), st.data())
def test_splitting_loses_nothing_and_passes_whole_events_on(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    passed, rest, at = b"", b"", 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        events, rest = split_events(rest + stream[at : at + step])
        assert events == b"" or events.endswith((b"\n\n", b"\r\n\r\n"))
        passed += events
        at += step
    assert passed + rest == stream


def event(reason: str | None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"finish_reason": reason}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def cut(answer: InterruptedAnswer, events: bytes) -> int | None:
    answer.note(events)
    return answer.cut_at(events)


def test_an_interrupted_stream_is_cut_before_the_event_that_says_so() -> None:
    answer = InterruptedAnswer("/v1/completions", b"{}")
    assert cut(answer, event(None)) is None
    assert cut(answer, event(None) + event("abort") + DONE) == len(event(None))
    assert not answer.is_finished


def test_an_interrupted_stream_without_any_reason_is_cut_before_its_end() -> None:
    assert cut(InterruptedAnswer("/v1/completions", b"{}"), DONE) == 0
    assert cut(InterruptedAnswer("/v1/completions", b"{}"), event(None) + DONE) == len(event(None))


def test_a_stream_that_finished_is_believed_also_when_its_end_comes_apart() -> None:
    answer = InterruptedAnswer("/v1/chat/completions", b"{}")
    answer.note(event("stop"))  # perhaps before the interruption
    assert answer.is_finished
    assert cut(answer, DONE) is None


@pytest.mark.parametrize(
    ("request_body", "choices"),
    [
        (b'{"prompt": "a"}', 1),
        (b'{"n": 3, "messages": []}', 3),
        (b'{"n": 2, "prompt": ["a", "b"]}', 4),
        (b'{"prompt": [1, 2, 3]}', 1),
        (b'{"prompt": [[1, 2], [3]]}', 2),
        (b'{"n": null}', 1),
    ],
)
def test_every_choice_must_have_finished(request_body: bytes, choices: int) -> None:
    answer = InterruptedAnswer("/v1/completions", request_body)
    for _ in range(choices):
        assert not answer.is_finished
        assert cut(answer, DONE) == 0
        answer.note(event("length"))
    assert answer.is_finished
    assert cut(answer, DONE) is None
    finished = b'{"finish_reason": "stop"}'
    assert not answer.is_whole(finished * (choices - 1))
    assert answer.is_whole(finished * choices)


@pytest.mark.parametrize("padding", [0, 100_000])
def test_the_choices_of_a_large_request_are_counted_too(padding: int) -> None:
    answer = InterruptedAnswer("/v1/completions", b'{"n": 2, "user": "%b"}' % (b"x" * padding))
    answer.note(event("stop"))
    assert not answer.is_finished
    answer.note(event("stop"))
    assert answer.is_finished


def test_the_answer_to_a_request_that_cannot_be_read_is_not_believed() -> None:
    answer = InterruptedAnswer("/v1/completions", b'{"prompt": "\\ud800"}')  # Python's json takes it
    answer.note(event("stop"))
    assert not answer.is_finished
    assert not answer.is_whole(b'{"finish_reason": "stop"}')


def test_routes_that_cannot_say_so_are_never_believed() -> None:
    answer = InterruptedAnswer("/v1/responses", b"{}")
    assert cut(answer, event("stop")) == 0
    assert not answer.is_finished
    assert not answer.is_whole(b'{"status": "completed"}')
