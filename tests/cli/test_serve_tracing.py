"""`llmux-asgi serve` sends its spans where OpenTelemetry's environment variables say, and says so if it cannot."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.resources import SERVICE_NAME

from llmux_asgi.cli._tracing import tracer_provider
from llmux_asgi.sim import start_sim
from tests.cli.test_serve import served
from tests.support.otlp import receive_spans

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def test_its_spans_arrive_also_those_of_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_sim("qwen") as sim, receive_spans() as (endpoint, spans):
        monkeypatch.setenv(ENDPOINT, endpoint.removesuffix("/v1/traces"))
        config = tmp_path / "llmux.json"
        config.write_text(json.dumps({"models": {"qwen": {"url": sim.url}}}))
        with served(str(config)) as (url, process):
            body = {"model": "qwen", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
            assert httpx.post(f"{url}/chat/completions", json=body, timeout=30).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    assert [span.name for span in spans] == ["llmux.request"]


def test_without_being_asked_it_sends_nothing() -> None:
    assert tracer_provider() is None


@pytest.mark.parametrize(
    "variables",
    [
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: ""},
    ],
)
def test_it_sends_nothing_if_it_is_told_not_to(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracer_provider() is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "console"}, "OTEL_TRACES_EXPORTER is console"),
        ({ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "the protocol is to be grpc"),
    ],
)
def test_what_it_cannot_do_is_logged_with_what_can(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracer_provider() is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert said in record.message
    assert "opentelemetry-instrument llmux-asgi serve" in record.message


@pytest.mark.parametrize(
    ("variables", "service"),
    [
        ({ENDPOINT: "http://127.0.0.1:1"}, "llmux-asgi"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "llmux-asgi"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1", "OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({ENDPOINT: "http://127.0.0.1:1", "OTEL_RESOURCE_ATTRIBUTES": "service.name=ours"}, "ours"),
    ],
)
def test_the_service_is_named_by_the_environment(
    variables: dict[str, str], service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    provider = tracer_provider()
    assert provider is not None
    assert provider.resource.attributes[SERVICE_NAME] == service
    provider.shutdown()


def python(code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_a_provider_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
from llmux_asgi.cli._tracing import tracer_provider
print(tracer_provider())
"""
    assert python(code, monkeypatch) == "None\n"


def test_a_missing_extra_is_logged_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
sys.modules["opentelemetry.exporter.otlp.proto.http"] = None
from llmux_asgi.cli._tracing import tracer_provider
print(tracer_provider())
"""
    said = python(code, monkeypatch)
    assert said.startswith("None\n")
    assert f"although {ENDPOINT} is set: pip install 'llmux-asgi[otlp]'" in said
