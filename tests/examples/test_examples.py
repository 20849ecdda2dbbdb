"""Every file in examples/ runs, against simulated servers and over real sockets."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import httpx
import msgspec
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import Defer, LLMuxApp, PolicyContext, SwitchNow, json_schema, load_config
from llmux_asgi.access import hash_key, new_key
from llmux_asgi.sim import GpuLedger, SimProcess

from .hosting import (
    EXAMPLES,
    LIMIT,
    ROOT,
    ask,
    ask_streaming,
    check_both_models,
    client,
    load_example,
    load_module,
    pointed,
    serving,
)


@pytest.mark.parametrize("name", ["starlette_app", "fastapi_app", "litestar_app"])
def test_a_host_serves_both_models_and_its_own_routes(name: str, tmp_path: Path, sims: list[SimProcess]) -> None:
    example = load_example(name, tmp_path, sims)
    with serving(example.app) as url:
        check_both_models(f"{url}/llm")
        assert "own routes" in httpx.get(url, trust_env=False, timeout=LIMIT).text


def test_the_middleware_switches_around_a_gateway_that_forwards_by_itself(tmp_path: Path, sims: list[SimProcess]) -> None:
    example = load_example("middleware_app", tmp_path, sims)
    with serving(example.app) as url, client(url) as gateway:
        answers = {model: ask(gateway, model) for model in ("qwen", "llama", "gpt-4o")}
        assert answers["qwen"] == answers["gpt-4o"] != answers["llama"]
        assert {model: ask_streaming(gateway, model) for model in answers} == answers
        with pytest.raises(openai.NotFoundError):
            ask(gateway, "gpt-5")
        assert httpx.get(f"{url}/health", trust_env=False, timeout=LIMIT).text == "ok"
    assert example.switcher.statistics().switches >= 3


def test_each_span_is_printed_on_a_line(
    tmp_path: Path, sims: list[SimProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = load_example("printed_traces", tmp_path, sims)
    with serving(example.app) as url:
        check_both_models(f"{url}/llm")
    printed = capsys.readouterr().out
    assert re.search(r"^llmux\.switch +\d+\.\d\d s  from=\w+ to=llama waiting=1 outcome=completed$", printed, re.MULTILINE)
    assert {line.split()[0] for line in printed.splitlines()} >= {"llmux.request", "drain", "sleep", "wake", "ready"}


def test_keys_are_taken_from_everywhere_that_the_example_names(
    tmp_path: Path, sims: list[SimProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {name: new_key() for name in ("reports", "website", "other")}
    monkeypatch.setenv("REPORTS_KEY", made["reports"])
    monkeypatch.setenv("VLLM_API_KEY", "of-the-server")
    Path("website-keys").write_text(made["website"])
    Path("keys.yaml").write_text(f"other: {{hash: '{hash_key(made['other'])}', models: [llama]}}")
    Path("access.yaml").write_text(pointed((EXAMPLES / "access.yaml").read_text(), sims))
    llm = LLMuxApp("access.yaml")
    host = Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)
    with serving(host) as url, client(f"{url}/llm") as stranger:
        for name, listed in (("reports", ["qwen"]), ("website", ["llama", "qwen"]), ("other", ["llama"])):
            gateway = stranger.with_options(api_key=made[name])
            assert sorted(card.id for card in gateway.models.list()) == listed
            assert ask(gateway, listed[0])
        with pytest.raises(openai.PermissionDeniedError):
            ask(gateway, "qwen")
        with pytest.raises(openai.AuthenticationError):
            ask(stranger, "llama")
        answer = stranger.with_options(api_key=made["reports"]).models.with_raw_response.list()
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) in range(99_900, 100_001)


@pytest.mark.parametrize("name", ["access_starlette", "access_fastapi"])
def test_the_hosts_users_are_the_gateways_clients(name: str, tmp_path: Path, sims: list[SimProcess]) -> None:
    example = load_example(name, tmp_path, sims)
    with serving(example.app) as url, client(f"{url}/llm") as stranger:
        staff = stranger.with_options(api_key=example.TOKEN)
        assert [card.id for card in staff.models.list()] == ["qwen"]
        assert ask(staff, "qwen")
        with pytest.raises(openai.PermissionDeniedError):
            ask(staff, "llama")
        with pytest.raises((openai.AuthenticationError, openai.PermissionDeniedError)):
            ask(stranger, "qwen")


def test_the_policy_of_ones_own_defers_only_while_the_awake_model_is_busy(tmp_path: Path, sims: list[SimProcess]) -> None:
    example = load_example("own_policy", tmp_path, sims)
    policy = example.PatientPolicy(patience=0.5)
    assert policy.on_pending_request(_waiting(active_in_flight=0)) == SwitchNow()
    decision = policy.on_pending_request(_waiting(active_in_flight=2))
    assert isinstance(decision, Defer)
    decision.awaitable.close()  # type: ignore[attr-defined]
    with serving(example.app) as url:
        check_both_models(f"{url}/llm")


def test_the_requests_go_over_a_client_of_ones_own(tmp_path: Path, sims: list[SimProcess]) -> None:
    example = load_example("own_client", tmp_path, sims)
    relayed: list[bytes] = []
    handle = example.transport.handle_async_request

    async def note(request: httpx.Request) -> httpx.Response:
        relayed.append(request.extensions["target"])
        response: httpx.Response = await handle(request)
        return response

    example.transport.handle_async_request = note
    with serving(example.app) as url:
        check_both_models(f"{url}/llm")
    assert set(relayed) == {b"/v1/chat/completions"}


def _waiting(active_in_flight: int) -> PolicyContext:
    return PolicyContext(
        target_model="llama", active_model="qwen", target_queue_depth=1, oldest_waiting=0.1, active_in_flight=active_in_flight
    )


def test_the_traces_arrive_over_otlp(tmp_path: Path, sims: list[SimProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    with _collector() as (endpoint, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        example = load_example("tracing", tmp_path, sims)
        with serving(example.app) as url:
            check_both_models(f"{url}/llm")
    resources = [resource for request in received for resource in request.resource_spans]
    services = {
        pair.value.string_value for each in resources for pair in each.resource.attributes if pair.key == "service.name"
    }
    assert services == {"llm-gateway"}
    names = [span.name for each in resources for scope in each.scope_spans for span in scope.spans]
    assert names.count("llmux.request") == 6
    assert {"llmux.switch", "drain", "sleep", "wake", "ready"} <= set(names)


@contextmanager
def _collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def test_jaeger_listens_on_loopback_where_the_exporter_sends_to() -> None:
    compose = msgspec.yaml.decode((EXAMPLES / "compose.yaml").read_bytes())
    assert compose["services"]["jaeger"]["ports"] == ["127.0.0.1:4318:4318", "127.0.0.1:16686:16686"]


def test_the_commented_configuration_names_every_key() -> None:
    paths = [EXAMPLES / f"{name}.yaml" for name in ("llmux", "managed", "access", "admin")]
    assert load_config(paths[0]).aliases == {"gpt-4o": "qwen"}
    assert [name for name, model in load_config(paths[1]).models.items() if model.command] == ["qwen", "llama"]
    text = "".join(path.read_text() for path in paths)
    keys = {key for struct in json_schema()["$defs"].values() for key in struct["properties"]}
    assert [key for key in sorted(keys) if f"{key}:" not in text] == []


# The demo


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_module(EXAMPLES / "demo.py")


def test_the_demo_shows_its_switches_and_loses_nothing() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert sum("completed │" in line for line in lines) >= 6
    assert "24 requests, all answered" in lines[-1]
    begin = next(index for index, line in enumerate(lines) if line.startswith("The spans of"))
    tree = [line.strip("│├└─ ").split()[0] for line in lines[begin:] if line.strip()]
    positions = [tree.index(name) for name in ("llmux.request", "llmux.switch", "cooldown", "drain", "sleep", "wake", "ready")]
    assert positions == sorted(positions)


def test_the_demo_fails_when_an_answer_is_lost_or_wrong(demo: ModuleType, tmp_path: Path) -> None:
    right = {("qwen", "?"): "yes"}

    def outcome(**fields: object) -> object:
        return demo.Outcome(
            **{"number": 1, "model": "qwen", "prompt": "?", "stream": True, "finish_reason": "length", **fields}
        )

    ledger = GpuLedger(tmp_path / "gpu", model="qwen")
    assert demo.problems([outcome(text="yes")], right, 6, ledger) == []
    assert "lost" in demo.problems([outcome(error="gone")], right, 6, ledger)[0]
    assert "wrong" in demo.problems([outcome(text="no")], right, 6, ledger)[0]
    assert "wrong" in demo.problems([outcome(text="yes", finish_reason="abort")], right, 6, ledger)[0]
    assert "switches" in demo.problems([outcome(text="yes")], right, 5, ledger)[0]
    assert "no span" in demo.untraced([outcome()], [])[0]


def test_the_demo_fails_when_two_models_were_awake_at_once(demo: ModuleType, tmp_path: Path) -> None:
    # Process 1 always lives, so that the ledger keeps its memory.
    for pid, model in ((os.getpid(), "qwen"), (1, "llama")):
        ledger = GpuLedger(tmp_path / "gpu", model=model, pid=pid)
        ledger.allocate("weights", 1)
        ledger.record("wake_end")
    ledger.record("request_while_asleep")
    assert demo.problems([], {}, 6, ledger) == [
        "2 models were awake at once",
        "1 requests reached a sleeping server: ['llama']",
    ]
