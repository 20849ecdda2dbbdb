"""What the gateway reads and writes of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux_asgi import (
    BackendError,
    BodyTooLargeError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    PolicyError,
    QueueFullError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
    UpstreamError,
)
from llmux_asgi._openai import (
    AnswerHead,
    InterruptedAnswer,
    describe,
    error_event,
    model_of,
    read_fields,
    relayed_request_headers,
    split_events,
    with_model,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b'{"messages": [{"model": "no"}], "x": {"model": "no"}, "model": "a"}', "a"),
        (b'{"model": "a\\u00e9\\n/b"}', "aé\n/b"),
        (b'{"mod\\u0065l": "a"}', "a"),
        (b' \n{"model":"a"} ', "a"),
        (b'{"model": "no", "model": "a"}', "a"),  # the last one counts, as in vLLM
    ],
)
def test_the_top_level_model_is_found(body: bytes, model: str) -> None:
    assert model_of(read_fields(body)) == model


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"7", b"\xff\xfe", b'{"a":' + b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_fields(body)
    assert caught.value.param is None


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"model": 7}', b'{"model": ""}', b'{"model": ["a"]}'])
def test_a_body_without_a_model_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        model_of(read_fields(body))
    assert caught.value.param == "model"


def test_a_body_that_names_the_model_already_is_left_alone() -> None:
    body = b'{ "model" :"a" }'
    assert with_model(body, "a") is body


def test_other_values_keep_their_bytes_when_the_model_is_rewritten() -> None:
    body = b'{"t": 1.0, "big": 12345678901234567890123, "e": 1E5, "s": "\\u00e9", "model": "x"}'
    assert with_model(body, 'b"\n') == (b'{"t":1.0,"big":12345678901234567890123,"e":1E5,"s":"\\u00e9","model":"b\\"\\n"}')


@given(st.dictionaries(st.text(), json_values, max_size=5), st.text())
def test_only_the_model_changes(content: dict[str, Any], model: str) -> None:
    rewritten = json.loads(with_model(json.dumps({**content, "model": "before"}).encode(), model or "a"))
    assert rewritten == {**content, "model": model or "a"}


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (UnknownModelError("x"), 404, "model_not_found", None),
        (InvalidRequestError("x", param="model"), 400, None, None),
        (BodyTooLargeError(5), 413, "request_too_large", None),
        (QueueFullError("x", "why", retry_after=70.5), 429, "rate_limit_exceeded", 71),
        (QueueTimeoutError("x", 1.0, "why", retry_after=2.1), 504, "model_queue_timeout", 3),
        (SwitchError("x", "why", retry_after=0.2), 503, "model_switch_failed", 1),
        (InterruptedRequestError("x"), 503, "request_interrupted", 1),
        (UpstreamError("x", "broke off."), 502, "upstream_error", None),
        (PolicyError("x"), 500, "internal_error", None),
        (BackendError("x"), 500, "internal_error", None),
    ],
)
def test_every_error_has_its_status_and_code(error: LLMuxError, status: int, code: str | None, retry_after: int | None) -> None:
    answer = describe(error)
    content = json.loads(answer.body)["error"]
    assert (answer.status, content["code"], answer.retry_after) == (status, code, retry_after)
    assert content["message"] == str(error)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    assert content["type"] == (kind if status < 500 else "server_error")
    headers = dict(answer.headers)
    assert headers[b"content-length"] == str(len(answer.body)).encode()
    assert headers.get(b"retry-after") == (str(retry_after).encode() if retry_after else None)
    assert error_event(error) == b"data: " + answer.body + b"\n\n"


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


def test_routes_that_cannot_say_so_are_never_believed() -> None:
    answer = InterruptedAnswer("/v1/responses", b"{}")
    assert cut(answer, event("stop")) == 0
    assert not answer.is_finished
    assert not answer.is_whole(b'{"status": "completed"}')
