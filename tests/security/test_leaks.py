"""What logs, spans and errors tell, and to whom."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmux_asgi import LLMuxApp, exceptions
from llmux_asgi._errors import describe
from tests.security.conftest import CHAT, Fortress
from tests.security.wire import recording

EVIL = "\r\nCRITICAL forged\x1b[2J\x07\u202e\0"
SECRET = "sk-very-secret"


async def ask(llm: LLMuxApp, headers: dict[str, str] | None = None, body: bytes = b"{}", path: str = CHAT[4:]) -> Any:
    """Send a request past any server, and return status, headers and body of the answer."""
    sent: list[Any] = []

    async def receive() -> Any:
        if body_sent:
            await anyio.sleep_forever()
        body_sent.append(True)
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    body_sent: list[bool] = []
    pairs = [(name.encode(), value.encode("latin-1", "ignore")) for name, value in (headers or {}).items()]
    with anyio.fail_after(5):
        await llm({"type": "http", "method": "POST", "path": path, "headers": pairs}, receive, send)
    return sent[0]["status"], sent[0]["headers"], b"".join(each.get("body", b"") for each in sent[1:])


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced(url: str, spans: InMemorySpanExporter, **config: Any) -> LLMuxApp:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return LLMuxApp({"models": {"a": {"url": url}}, **config}, tracer_provider=provider)


def told(spans: InMemorySpanExporter) -> str:
    """All that the spans say."""
    return "".join(span.to_json() for span in spans.get_finished_spans())


@pytest.mark.anyio
async def test_a_huge_model_name_is_cut_wherever_it_is_told(spans: InMemorySpanExporter) -> None:
    llm = traced("http://127.0.0.1:9", spans)
    name = "x" * 1_000_000
    for headers, body in (({}, b'{"model": "%s"}' % name.encode()), ({"x-llmux-model": name[:60_000]}, b"{}")):
        status, _, answer = await ask(llm, headers, body)
        assert status in (400, 404)
        assert len(answer) < 1000
    for headers in ({"x-llmux-priority": name[:60_000]},):
        assert len((await ask(llm, headers, b'{"model": "a"}'))[2]) < 1000
    assert len((await ask(llm, path="/" + name))[2]) < 1000
    assert len(told(spans)) < 20_000


@pytest.mark.anyio
async def test_no_client_writes_a_line_of_the_log(caplog: pytest.LogCaptureFixture, spans: InMemorySpanExporter) -> None:
    caplog.set_level(logging.DEBUG)
    with recording() as server:
        server.answer = lambda request: b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n"
        llm = traced(server.url, spans)
        name = EVIL.encode("unicode_escape").decode().replace("\\x", "\\u00")
        for body in (f'{{"model": "{name}"}}', f'{{"model": "a", "x": "{name}"}}', f'{{"{name}": 1}}', EVIL):
            await ask(llm, {"x-llmux-priority": "forged"} if "a" in body else {}, body.encode())
        for header in ("x-llmux-model", "x-llmux-priority", "user-agent", "traceparent", "x-request-id"):
            await ask(llm, {header: "forged\x1b[2J\x07"}, b'{"model": "a"}')
        await ask(llm, path="/v1/" + EVIL)
        await llm.aclose()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("llmux")]
    assert [line for line in lines if "forged" in line or not line.isprintable()] == []


@pytest.mark.anyio
async def test_what_is_told_of_a_client_is_escaped() -> None:
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}})
    for headers, path in (({"x-llmux-model": "<script>\x1b[2J"}, CHAT[4:]), ({}, "/<script>\x1b[2J\r\nx: y")):
        status, pairs, answer = await ask(llm, headers, path=path)
        assert status == 404
        assert dict(pairs)[b"content-type"] == b"application/json"  # which no browser takes for a page
        assert b"\x1b" not in answer
        assert rb"\\x1b" in answer  # escaped once for who reads it, and once more by JSON
        assert b"\n" not in answer


@pytest.mark.anyio
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_no_secret_is_logged_or_traced_or_told(
    caplog: pytest.LogCaptureFixture, spans: InMemorySpanExporter, status: int, tmp_path: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    with recording() as server:
        server.answer = lambda request: b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status
        llm = traced(server.url, spans, request_log=str(tmp_path / "log"))
        body = b'{"model": "a", "messages": [{"role": "user", "content": "%s"}]}' % SECRET.encode()
        names = ("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization")
        answers = [await ask(llm, dict.fromkeys(names, SECRET), body), await ask(llm, {"authorization": SECRET}, body[:-1])]
        await llm.aclose()
    assert SECRET.encode() not in b"".join(answer[2] for answer in answers)
    assert SECRET not in told(spans)
    assert SECRET not in caplog.text
    assert SECRET not in (tmp_path / "log").read_text()


@pytest.mark.anyio
async def test_an_error_tells_no_address_of_a_server(caplog: pytest.LogCaptureFixture) -> None:
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}})
    status, _, answer = await ask(llm, body=b'{"model": "a"}')
    await llm.aclose()
    assert (status, b"127.0.0.1" in answer) == (503, False)
    assert b"the server: nothing listens there" in answer
    assert "http://127.0.0.1:9" in caplog.text  # whom it helps reads the log


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("http://10.0.0.7:8001: POST /sleep failed", "the server: POST /sleep failed"),
        ("https://gpu.internal/a/b: nothing listens there", "the server: nothing listens there"),
        ("http://[fd00::1]:8001/x: gone. See http://user.internal", "the server: gone. See the server"),
        ("it ended: exit status 3; its last lines:\nHF_TOKEN=hf_x\nTraceback", "exit status 3; its last lines are in"),
    ],
)
def test_a_reason_is_told_without_addresses_and_without_the_output_of_a_process(reason: str, expected: str) -> None:
    for error in (exceptions.SwitchError("a", reason), exceptions.UpstreamError("a", reason)):
        answer = describe(error).body.decode()
        assert expected in answer
        assert not any(each in answer for each in ("10.0.0.7", "internal", "fd00", "800", "hf_x", "Traceback"))


def test_no_site_is_invited_to_read_answers(gateway: Fortress) -> None:
    for method in ("POST", "OPTIONS"):
        request = b"%s %s HTTP/1.1\r\nhost: x\r\norigin: http://evil\r\naccess-control-request-method: POST\r\n" % (
            method.encode(),
            CHAT.encode(),
        )
        answer = gateway.send(request + b'connection: close\r\ncontent-length: 14\r\n\r\n{"model": "a"}')
        assert b"access-control" not in answer.head.lower()
        assert answer.statuses == ([200] if method == "POST" else [405])


def test_what_is_the_gateways_is_not_passed_up(gateway: Fortress) -> None:
    names = (b"x-llmux-model", b"llmux.lease", b"llmux-route", b"x-llmux-lease", b"x-llmux-route")
    assert gateway.post(b"{}", b"x-llmux-model: a", *(name + b": b" for name in names[1:])).statuses == [200]
    (request,) = gateway.asked
    assert request.target == "/v1/chat/completions"
    assert request.values("x-llmux-model") == []
    assert request.body == b'{"model":"a"}'
