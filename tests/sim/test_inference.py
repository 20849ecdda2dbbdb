"""What the simulated server does that the real one of the tests cannot: whole tool calls, embeddings, audio, realtime."""

from __future__ import annotations

import base64
import io
import json
import struct
import wave
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from llmux_asgi.sim import SimProcess, start_sim
from llmux_asgi.sim.asgi import HttpError
from llmux_asgi.sim.audio import parse_form
from llmux_asgi.sim.tools import demanded
from tests.contract.driver import Driver, Stream
from tests.support.eventually import eventually

_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["c", "f"]},
        "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "hours": {"type": "array", "items": {"type": "number"}},
        "exact": {"const": 3},
        "place": {"properties": {"indoors": {"type": "boolean"}}},
    },
}
_ARGUMENTS = {
    "city": "the quick brown fox",
    "unit": "c",
    "days": 1,
    "hours": [1.5],
    "exact": 3,
    "place": {"indoors": True},
}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}
_NAMED = {"type": "function", "function": {"name": "weather"}}
_CHAT: dict[str, Any] = {"model": "a", "messages": [{"role": "user", "content": "sunny?"}]}


@pytest.fixture(scope="module")
def sim() -> Iterator[SimProcess]:
    with start_sim("a") as sim:
        yield sim


@pytest.fixture(scope="module")
def vllm(sim: SimProcess) -> Iterator[Driver]:
    with Driver(sim.url, "a") as driver:
        yield driver


# Tools


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (_NAMED, "stop")])
def test_a_chat_that_demands_a_tool_is_answered_by_a_call_that_fits_its_schema(vllm: Driver, choice: Any, reason: str) -> None:
    body = {**_CHAT, "tools": [_TOOL], "tool_choice": choice}
    answer = vllm.post("/v1/chat/completions", body).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", _ARGUMENTS)
    assert (answer["message"]["content"], answer["finish_reason"]) == ("", reason)
    stream = Stream(vllm.client, "/v1/chat/completions", {**body, "stream": True}).end()
    deltas = [choice["delta"] for event in stream.events for choice in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls if "id" in call] == ["weather"]
    assert json.loads("".join(call["function"].get("arguments", "") for call in calls)) == _ARGUMENTS
    assert stream.finish_reason == reason


def test_a_response_that_demands_a_tool_is_a_call(vllm: Driver) -> None:
    tool = {"type": "function", "name": "weather", "parameters": _SCHEMA}
    body = {"model": "a", "input": "sunny?", "tools": [tool], "tool_choice": {"type": "function", "name": "weather"}}
    answer = vllm.post("/v1/responses", body).json()
    (call,) = answer["output"]
    assert (call["type"], json.loads(call["arguments"]), answer["status"]) == ("function_call", _ARGUMENTS, "completed")
    stream = Stream(vllm.client, "/v1/responses", {**body, "stream": True}).end()
    assert [event["sequence_number"] for event in stream.events] == list(range(len(stream.events)))
    assert "".join(event.get("delta", "") for event in stream.events) == call["arguments"]


def test_a_message_that_demands_a_tool_is_a_call(vllm: Driver) -> None:
    body = {**_CHAT, "max_tokens": 200, "tools": [{"name": "weather", "input_schema": _SCHEMA}], "tool_choice": {"type": "any"}}
    answer = vllm.post("/v1/messages", body).json()
    (call,) = answer["content"]
    assert (call["type"], call["input"], answer["stop_reason"]) == ("tool_use", _ARGUMENTS, "tool_use")
    cut = vllm.post("/v1/messages", {**body, "max_tokens": 3})
    assert (cut.status_code, cut.json()["error"]["type"]) == (400, "BadRequestError")


def test_a_model_that_may_choose_answers(vllm: Driver) -> None:
    answer = vllm.post("/v1/chat/completions", {**_CHAT, "tools": [_TOOL], "tool_choice": "auto"}).json()["choices"][0]
    assert answer["message"]["content"]
    assert demanded([_TOOL], {"type": "none"}) is None


# Responses


def test_a_response_made_in_the_background_is_there_later() -> None:
    with start_sim("a", tokens_per_second=100) as sim, Driver(sim.url, "a") as vllm:
        made = vllm.post("/v1/responses", {"model": "a", "input": "x", "max_output_tokens": 20, "background": True}).json()
        name = f"/v1/responses/{made['id']}"
        eventually("it is being made", lambda: vllm.get(name).json()["status"] == "in_progress")
        eventually("it is made", lambda: vllm.get(name).json()["status"] == "incomplete")
        assert vllm.get(name).json()["output"][0]["content"][0]["text"]


def test_without_its_store_a_server_finds_no_response() -> None:
    with start_sim("a", responses_store=False) as sim, Driver(sim.url, "a") as vllm:
        made = vllm.post("/v1/responses", {"model": "a", "input": "x"}).json()
        assert vllm.get(f"/v1/responses/{made['id']}").status_code == 404
        assert vllm.post("/v1/responses", {"model": "a", "input": "x", "background": True}).status_code == 400


# Models that do not generate


def test_an_embedding_in_base64_is_the_same_as_in_numbers(vllm: Driver) -> None:
    body = {"model": "a", "input": ["x", "y"]}
    numbers = [each["embedding"] for each in vllm.post("/v1/embeddings", body).json()["data"]]
    coded = vllm.post("/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"]
    for plain, each in zip(numbers, coded, strict=True):
        assert list(struct.unpack("<8f", base64.b64decode(each["embedding"]))) == pytest.approx(plain)


def test_coheres_embeddings_are_the_same_as_openais(vllm: Driver) -> None:
    (plain,) = vllm.post("/v1/embeddings", {"model": "a", "input": "x"}).json()["data"]
    body = {"model": "a", "texts": ["x"], "input_type": "search_query", "embedding_types": ["float", "base64"]}
    answer = vllm.post("/v2/embed", body).json()
    assert answer["embeddings"]["float"] == [plain["embedding"]]
    assert len(base64.b64decode(answer["embeddings"]["base64"][0])) == 32
    assert vllm.post("/v2/embed", {"model": "a"}).status_code == 400


def test_a_rank_is_cut_to_its_top(vllm: Driver) -> None:
    documents = ["p", "q", "r"]
    body = {"model": "a", "query": "x", "documents": documents, "top_n": 2}
    results = vllm.post("/v1/rerank", body).json()["results"]
    assert len(results) == 2
    assert results[0]["relevance_score"] >= results[1]["relevance_score"]
    assert results[0]["document"]["text"] in documents


# Audio


def test_audio_is_heard_and_the_form_is_what_counts(vllm: Driver) -> None:
    sound = bytes(range(256)) * 250 + b"\r\n--not-the-boundary\r\n"

    def hear(path: str, data: dict[str, str], content: bytes = sound) -> Any:
        return vllm.client.post(path, data={"model": "a", **data}, files={"file": ("a.wav", content, "audio/wav")})

    plain = hear("/v1/audio/transcriptions", {}).json()
    assert plain["usage"] == {"type": "duration", "seconds": 3}
    assert hear("/v1/audio/transcriptions", {}).json() == plain
    assert hear("/v1/audio/transcriptions", {}, sound[1:]).json()["text"] != plain["text"]
    assert hear("/v1/audio/translations", {}).json() == {"text": plain["text"]}
    verbose = hear("/v1/audio/transcriptions", {"response_format": "verbose_json", "language": "de"}).json()
    assert (verbose["text"], verbose["language"], len(verbose["segments"])) == (plain["text"], "de", 1)
    lines = hear("/v1/audio/transcriptions", {"stream": "true", "stream_include_usage": "true"}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(choice["delta"]["content"] for event in events for choice in event["choices"]) == plain["text"]
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert hear("/v1/audio/translations", {"model": "b"}).status_code == 404
    assert hear("/v1/audio/translations", {"response_format": "srt"}).status_code == 400
    assert vllm.client.post("/v1/audio/transcriptions", data={"model": "a"}).status_code == 400


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nno end"),
        ("multipart/form-data; boundary=x", b"--x\r\nno header\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-type: a/b\r\n\r\nno name\r\n--x--\r\n"),
    ],
)
def test_a_broken_form_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(HttpError):
        parse_form(content_type, body)


def test_speech_and_images_are_files_of_their_kind(vllm: Driver) -> None:
    spoken = vllm.post("/v1/audio/speech", {"model": "a", "input": "hello", "voice": "none"})
    assert spoken.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(spoken.content)) as sound:
        assert sound.getnframes() == 12_000
    drawn = vllm.post("/v1/images/generations", {"model": "a", "prompt": "hello", "n": 2}).json()["data"]
    assert [base64.b64decode(each["b64_json"])[:4] for each in drawn] == [b"\x89PNG"] * 2
    assert vllm.post("/v1/audio/speech", {"model": "a", "input": "x", "response_format": "mp3"}).status_code == 400
    assert vllm.post("/v1/images/generations", {"model": "a"}).status_code == 400
    form = {"model": "a", "prompt": "hello"}
    edited = vllm.client.post("/v1/images/edits", data=form, files={"image": ("a.png", b"...", "image/png")})
    assert edited.json()["data"] == drawn[:1]


# Realtime


def _say(socket: ClientConnection, kind: str, **fields: Any) -> None:
    socket.send(json.dumps({"type": kind, **fields}))


def _hear(socket: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(socket.recv(10))
    return event


def test_a_realtime_session_turns_audio_into_text(sim: SimProcess) -> None:
    with connect(sim.url.replace("http", "ws") + "/v1/realtime") as socket:
        assert _hear(socket)["type"] == "session.created"
        _say(socket, "session.update", model="a")
        _say(socket, "input_audio_buffer.commit")
        for _ in range(3):
            _say(socket, "input_audio_buffer.append", audio=base64.b64encode(b"\0\1" * 800).decode())
        _say(socket, "input_audio_buffer.commit", final=True)
        words = ""
        while (event := _hear(socket))["type"] == "transcription.delta":
            words += event["delta"]
        assert (event["type"], event["text"]) == ("transcription.done", words)
        assert event["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "session.update"}, "invalid_event"),
        ({"type": "session.update", "model": "b"}, "model_not_found"),
        ({"type": "input_audio_buffer.commit"}, "model_not_validated"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_audio"),
        ({"type": "input_audio_buffer.append", "audio": ""}, "invalid_audio"),
        ({"type": "response.create"}, "unknown_event"),
        ({"type": 3}, "processing_error"),
        (None, "invalid_json"),
    ],
)
def test_a_realtime_session_tells_what_is_wrong_and_goes_on(sim: SimProcess, event: Any, code: str) -> None:
    with connect(sim.url.replace("http", "ws") + "/v1/realtime") as socket:
        _hear(socket)
        socket.send("{" if event is None else json.dumps(event))
        told = _hear(socket)
        assert (told["type"], told["code"]) == ("error", code)
        _say(socket, "session.update", model="a")
        _say(socket, "session.update")
        assert _hear(socket)["code"] == "invalid_event"


def test_a_realtime_client_that_leaves_ends_its_request() -> None:
    with start_sim("a", tokens_per_second=1) as sim:
        with connect(sim.url.replace("http", "ws") + "/v1/realtime") as socket:
            _say(socket, "session.update", model="a")
            _say(socket, "input_audio_buffer.commit")
            _say(socket, "input_audio_buffer.commit", final=True)
            eventually("it runs", lambda: sim.state().running == 1)
        eventually("it has ended", lambda: sim.state().in_flight == 0)
        assert sim.state().disconnected == 1


# Control


def test_calls_of_control_routes_are_counted_whatever_their_method(vllm: Driver, sim: SimProcess) -> None:
    paths = ["/docs", "/openapi.json", "/metrics", "/collective_rpc", "/abort_requests", "/update_weights", "/invocations"]
    before = sim.state().control_calls
    for path in paths:
        vllm.get(path)
        vllm.post(path, {})
    vllm.get("/v1/models")
    after = sim.state().control_calls
    assert {path: after[path] - before.get(path, 0) for path in paths} == dict.fromkeys(paths, 2)
    assert not [path for path in after if path.startswith(("/v1", "/sim"))]
