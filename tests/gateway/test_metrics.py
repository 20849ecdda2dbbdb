"""`/metrics`: what Prometheus gets, from whom, and who may ask."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from llmux_asgi import ConfigError, Identity, LLMuxApp
from llmux_asgi._instruments import FirstByteTimes
from llmux_asgi.access import hash_key
from llmux_asgi.exposition._first_bytes import first_byte_family
from llmux_asgi.telemetry import Telemetry
from tests.gateway.conftest import gateway
from tests.gateway.scripts import echo
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange, Script

VLLM = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="served"} 3.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="served"} 17.0
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="served"} 1.7e+09
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="1.0",model_name="served"} 2.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="served"} 2.0
vllm:e2e_request_latency_seconds_count{engine="0",model_name="served"} 2.0
vllm:e2e_request_latency_seconds_sum{engine="0",model_name="served"} 0.5
# TYPE llmux_requests_total counter
llmux_requests_total{llmux_model="a",http_response_status_code="200"} 1e9
# TYPE moody gauge
moody{model="else"} 1.0
"""
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Every sample once: a family that came twice would be a fault of the exposition."""
    families = list(parse(text))
    assert len({family.name for family in families}) == len(families)
    every = [sample for family in families for sample in family.samples]
    found = {(each.name, frozenset(each.labels.items())): each.value for each in every}
    assert len(found) == len(every)
    return found


def openmetrics(text: str) -> set[str]:
    """The names of the families; the parser refuses what OpenMetrics does not allow."""
    return {family.name for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]


def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def telling(text: str, content_type: str = "text/plain; version=0.0.4") -> Script:
    """A server with these metrics."""

    async def script(exchange: Exchange) -> None:
        if exchange.path != "/metrics":
            await echo(exchange)
            return
        await exchange.start(content_type)
        await exchange.chunk(text.encode(), last=True)

    return script


def is_scrape(exchange: Exchange) -> bool:
    """Whether it is a client's doing: the gateway itself asks for the level at which a server sleeps."""
    return exchange.path == "/metrics" and (b"accept", b"text/plain;version=0.0.4") in exchange.headers


async def hanging(exchange: Exchange) -> None:
    await exchange.client_left()


async def failing(exchange: Exchange) -> None:
    await exchange.start("text/plain", 500)
    await exchange.chunk(b"", last=True)


def test_prometheus_and_openmetrics_are_answered_and_nothing_of_a_server_is_asked_for(loop: EventLoop) -> None:
    with gateway(loop, metrics={}) as running:
        running.a.script = running.b.script = echo
        for model in ("a", "b"):
            assert running.chat(model).status_code == 200
        text = running.client.get("/metrics?backends=1", headers={"authorization": "Bearer whatever"})
        opened = running.client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
        head = running.client.head("/metrics")
        assert running.client.post("/metrics").status_code == 404
        asked = [exchange for exchange in (*running.a.requests, *running.b.requests) if is_scrape(exchange)]
    assert asked == []
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(text.text)
    assert found[sample("llmux_requests_total", llmux_model="b", http_response_status_code="200")] == 1
    duration = sample(
        "llmux_switch_duration_seconds_count", llmux_switch_from="a", llmux_switch_to="b", llmux_switch_outcome="completed"
    )
    assert found[duration] == 1
    assert found[sample("llmux_server_state", llmux_model="b", llmux_server_state="awake")] == 1
    first_byte = {"llmux_model": "a", "llmux_streamed": "false"}
    assert found[sample("llmux_request_time_to_first_byte_seconds_count", **first_byte)] == 1
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics(opened.text) == {family.name for family in parse(text.text)}
    assert head.status_code == 200
    assert not head.content


def test_the_servers_metrics_are_put_together_by_model_and_cannot_pose_as_the_gateways(loop: EventLoop) -> None:
    other = VLLM.replace("moody gauge", "moody counter").replace("17.0", "18.0").replace("\nmoody{", "\nmoody_total{")
    with gateway(loop, metrics={"backends": True, "timeout": 10}) as running:
        running.a.script, running.b.script = telling(VLLM), telling(other)
        text = running.client.get("/metrics").text
        assert list(map(is_scrape, running.a.requests)).count(True) == 1
        without = samples(running.client.get("/metrics?backends=0").text)
        opened = running.client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    found = samples(text)
    own = {"engine": "0", "model_name": "served"}
    assert found[sample("llmux_backend_up", model="a")] == 1
    assert found[sample("llmux_backend_up", model="b")] == 1
    assert found[sample("vllm:prompt_tokens_total", model="a", **own)] == 17
    assert found[sample("vllm:prompt_tokens_total", model="b", **own)] == 18
    assert found[sample("vllm:e2e_request_latency_seconds_bucket", model="b", le="1.0", **own)] == 2
    assert found[sample("moody", model="a", exported_model="else")] == 1
    assert text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    assert text.count("# HELP vllm:num_requests_running Number of requests in model execution batches.") == 1
    assert not [key for key in found if key[0] == "llmux_requests_total"]
    assert not [key for key in without if key[0].startswith(("vllm:", "llmux_backend"))]
    # OpenMetrics allows less than servers write.
    assert opened.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("script", [hanging, failing, telling("no metrics {{{ at all"), telling("\xff" * 10)])
def test_a_server_that_does_not_tell_is_down_and_holds_nothing_up(script: Script) -> None:
    with gateway("asyncio", metrics={"backends": True, "timeout": 0.3}) as running:
        running.a.script = script
        found = samples(running.client.get("/metrics").text)
        assert running.a.controls.count("/wake_up") == 0
    assert found[sample("llmux_backend_up", model="a")] == 0


def test_a_server_that_is_not_there_is_down_and_a_router_is_not_asked() -> None:
    models: dict[str, Any] = {"a": {"url": "http://127.0.0.1:9"}, "b": {"server": "llama.cpp"}}
    with gateway("asyncio", metrics={"backends": True}, **models) as running:
        text = running.client.get("/metrics").text
        assert not any(map(is_scrape, running.b.requests))
    assert [key for key in samples(text) if key[0] == "llmux_backend_up"] == [sample("llmux_backend_up", model="a")]


def test_with_a_key_nobody_reads_the_metrics_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_KEY", "the-key-of-a-client")
    access = {"keys": {"client": {"env": "CLIENT_KEY"}}}
    with gateway(
        "asyncio", metrics={"path": "/own", "key": {"hash": hash_key("the-key-for-metrics")}}, access=access
    ) as running:

        def ask(headers: dict[str, str], path: str = "/own") -> int:
            return running.client.get(path, headers=headers).status_code

        for headers in (
            {},
            {"authorization": "Bearer the-key-of-a-client"},
            {"authorization": "Basic abc"},
            {"x-api-key": "x"},
        ):
            answer = running.client.get("/own", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "llmux_" not in answer.text
        assert ask({"authorization": "Bearer the-key-for-metrics"}) == 200
        running.app.reload_keys()
        assert ask({"x-api-key": "the-key-for-metrics"}) == 200
        assert ask({"authorization": "Bearer the-key-for-metrics"}, "/v1/models") == 401
        assert ask({"authorization": "Bearer the-key-of-a-client"}, "/metrics") == 404


def test_without_a_key_access_control_guards_the_metrics_and_who_may_use_some_models_may_not_read_them() -> None:
    def identify(scope: object) -> Identity | None:
        headers = dict(scope["headers"])  # type: ignore[index]
        return {b"all": Identity("all"), b"some": Identity("some", models=("a",))}.get(headers.get(b"who", b""))

    with gateway("asyncio", metrics={}, app={"identify": identify}) as running:
        answers = {who: running.client.get("/metrics", headers={"who": who}) for who in ("all", "some", "nobody")}
    assert {who: answer.status_code for who, answer in answers.items()} == {"all": 200, "some": 403, "nobody": 401}
    assert answers["some"].json()["error"]["code"] == "metrics_not_allowed"


def test_the_times_to_first_byte_are_shown_as_the_exporter_would_show_them() -> None:
    """The gateway adds them up by itself."""
    registry = CollectorRegistry()
    official = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=registry)
    telemetry = Telemetry(meter_provider=MeterProvider([official], shutdown_on_exit=False))
    own = FirstByteTimes()
    for model, seconds, streamed in (("a", 0.005, True), ("a", 0.3, True), ("a", 1e9, True), ("b", 0.0, False)):
        telemetry.first_byte(model, seconds, streamed=streamed)
        own.record(seconds, {"llmux.model": model, "llmux.streamed": streamed})
    (expected,) = registry.collect()
    family = first_byte_family(own)
    assert (family.name, family.documentation, family.type, family.unit) == (
        expected.name,
        expected.documentation,
        expected.type,
        expected.unit,
    )
    assert [(each.name, each.labels, each.value) for each in family.samples] == [
        (each.name, each.labels, each.value) for each in expected.samples
    ]


def test_two_gateways_in_one_process_each_tell_their_own(loop: EventLoop) -> None:
    with gateway(loop, metrics={}) as one, gateway(loop, metrics={}) as two:
        one.a.script = echo
        assert one.chat("a").status_code == 200
        counted = sample("llmux_requests_total", llmux_model="a", http_response_status_code="200")
        assert counted in samples(one.client.get("/metrics").text)
        assert counted not in samples(two.client.get("/metrics").text)


def test_without_the_extra_the_configuration_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llmux_asgi.exposition", raising=False)
    monkeypatch.delitem(sys.modules, "llmux_asgi.exposition._endpoint", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.prometheus", None)
    with pytest.raises(ConfigError, match=r"^\$\.metrics: needs the extra prometheus: pip install"):
        LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}, "metrics": {}})
