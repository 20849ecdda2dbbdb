"""What the gateway reads and writes of OpenAI's API."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux_asgi._openai import (
    InterruptedAnswer,
    relayed_request_headers,
    relayed_response_headers,
    split_events,
)


def test_headers_of_the_connection_are_dropped_whatever_their_case() -> None:
    headers = [
        (b"Host", b"x"),
        (b"Content-Length", b"3"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Connection", b"close, X-Secret"),
        (b"connection", b"X-Other"),
        (b"X-Secret", b"1"),
        (b"x-other", b"1"),
        (b"Expect", b"100-continue"),
        (b"Accept", b"a"),
        (b"Accept", b"b"),
    ]
    assert relayed_request_headers(headers) == [(b"accept", b"a"), (b"accept", b"b"), (b"accept-encoding", b"identity")]
    answer = [(b"Content-Length", b"3"), (b"Date", b"x"), (b"Server", b"x"), (b"Keep-Alive", b"x"), (b"X", b"1")]
    assert relayed_response_headers(answer) == [(b"content-length", b"3"), (b"x", b"1")]
    assert relayed_response_headers([*answer, (b"Transfer-Encoding", b"chunked")]) == [(b"x", b"1")]


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


def test_routes_that_cannot_say_so_are_never_believed() -> None:
    answer = InterruptedAnswer("/v1/responses", b"{}")
    assert cut(answer, event("stop")) == 0
    assert not answer.is_finished
    assert not answer.is_whole(b'{"status": "completed"}')
