"""The instruments: what they record, whom they belong to, and that nothing is measured for nobody."""

from __future__ import annotations

import gc
import weakref
from types import MappingProxyType
from typing import Any

import anyio
import pytest
from opentelemetry import metrics as otel_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from llmux_asgi import BackendError, FifoPolicy, LLMuxMiddleware
from llmux_asgi._estimates import ModelCosts
from llmux_asgi._instruments import METRICS
from llmux_asgi._state import Mode, SwitcherStatistics
from llmux_asgi.telemetry import Telemetry
from tests.support.pool import LIMIT, Pool, running, until_waiting
from tests.test_middleware import Connection, Inner, call


class Meters:
    """What has been recorded into one provider."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def collect(self, scope: str = "llmux_asgi") -> dict[str, dict[tuple[Any, ...], Any]]:
        """The points by instrument and the values of its attributes, in the order of `METRICS`; of histograms the count."""
        data = self.reader.get_metrics_data()
        found: dict[str, dict[tuple[Any, ...], Any]] = {}
        attributes = {metric.name: metric.attributes for metric in METRICS}
        for scoped in data.resource_metrics[0].scope_metrics if data is not None else ():
            for metric in scoped.metrics if scoped.scope.name == scope else ():
                for point in metric.data.data_points:
                    assert set(point.attributes or ()) == set(attributes[metric.name]), metric.name
                    key = tuple((point.attributes or {})[each] for each in attributes[metric.name])
                    found.setdefault(metric.name, {})[key] = getattr(point, "count", None) or getattr(point, "value", None)
        return found


@pytest.mark.anyio
async def test_a_switch_its_requests_and_its_failure_are_in_every_instrument_with_its_attributes() -> None:
    meters = Meters()
    policy = FifoPolicy(min_active_duration=0)
    pool = Pool(policy, awake="a", telemetry=Telemetry(meter_provider=meters.provider), costs={"a": ModelCosts(1.0, 2.0)})
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    for model in ("a", "b", "b", "nobody"):
        await call(app, Connection(b'{"model": "%s"}' % model.encode()))
    pool.backends["c"].fail("wake", BackendError("out of memory"), times=2)
    await call(app, Connection(b'{"model": "c"}'))
    found = meters.collect()
    await pool.switcher.aclose()

    assert {metric.name for metric in METRICS} == found.keys()
    assert found["llmux.switch.duration"] == {("a", "b", "completed"): 1, ("b", "c", "failed"): 1}
    assert found["llmux.switch.failures"] == {("c", "BackendError"): 1}
    assert found["llmux.pool.time"].keys() == {("serving",), ("switching",), ("idle",)}
    phases = found["llmux.switch.phase.duration"]
    assert phases == {
        **{(phase, "a"): 1 for phase in ("cooldown", "drain", "sleep")},
        **{(phase, "b"): 1 for phase in ("wake", "ready", "cooldown", "drain", "sleep")},
        ("wake", "c"): 2,
    }
    assert found["llmux.requests"] == {("a", 201): 1, ("b", 201): 2, ("", 404): 1, ("c", 503): 1}
    assert found["llmux.request.failures"] == {("", "UnknownModelError"): 1, ("c", "SwitchError"): 1}
    # The first one for `a` waits until its server is known to be awake; the second one for `b` does not wait at all.
    assert found["llmux.queue.time"] == {("a",): 1, ("b",): 1}
    assert found["llmux.request.time_to_first_byte"] == {("a", False): 1, ("b", False): 2}
    assert found["llmux.switch.estimate"].keys() >= {("a", "sleep"), ("a", "wake"), ("b", "wake")}
    assert found["llmux.server.state"]["a", "asleep"] == 1
    assert found["llmux.server.state"]["a", "awake"] == 0


@pytest.mark.anyio
async def test_what_runs_and_what_waits_is_read_when_it_is_collected() -> None:
    meters = Meters()
    pool = Pool(awake="a", telemetry=Telemetry(meter_provider=meters.provider))
    async with running(pool) as run:
        first = await run.served("a")
        run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        found = meters.collect()
        first.finish.set()
    assert found["llmux.request.in_flight"] == {("a",): 1, ("b",): 0, ("c",): 0}
    assert found["llmux.request.waiting"] == {("a",): 0, ("b",): 1, ("c",): 0}
    oldest = found["llmux.queue.oldest"]
    assert oldest["b",] >= oldest["a",] == 0.0
    assert found["llmux.request.frozen"] == {("a",): 0, ("b",): 0, ("c",): 0}


def snapshot(*models: str) -> SwitcherStatistics:
    counts = MappingProxyType(dict.fromkeys(models, 0))
    states = MappingProxyType(dict.fromkeys(models, "asleep"))
    costs = MappingProxyType(dict.fromkeys(models, ModelCosts(1.0, 1.0)))
    return SwitcherStatistics(Mode.IDLE, None, None, None, counts, counts, counts, 0, 0, 0, states, costs)


def test_a_model_that_is_taken_out_is_in_no_gauge_any_more() -> None:
    meters = Meters()
    telemetry = Telemetry(meter_provider=meters.provider)
    gauges = [metric.name for metric in METRICS if metric.kind in ("gauge", "up-down counter")]
    for models in (("a", "b"), ("b",), ("b", "c")):
        now = snapshot(*models)
        telemetry.observe(lambda now=now: now)  # type: ignore[misc]
        found = meters.collect()
        assert all({key[0] for key in found[name]} == set(models) for name in gauges)


def test_two_gateways_on_one_provider_do_not_take_each_others_place() -> None:
    meters = Meters()
    first, second = Telemetry(meter_provider=meters.provider), Telemetry(meter_provider=meters.provider)
    for telemetry, model in ((first, "a"), (second, "b")):
        now = snapshot(model)
        telemetry.observe(lambda now=now: now)  # type: ignore[misc]
        telemetry.queued(model, 1.0)
    assert meters.collect()["llmux.request.waiting"].keys() == {("a",)}
    assert meters.collect()["llmux.queue.time"] == {("a",): 1}
    assert meters.collect("llmux_asgi.2")["llmux.request.waiting"].keys() == {("b",)}
    assert meters.collect("llmux_asgi.2")["llmux.queue.time"] == {("b",): 1}


def test_a_provider_keeps_no_gateway_alive() -> None:
    meters = Meters()
    pool = Pool(telemetry=Telemetry(meter_provider=meters.provider))
    switcher = weakref.ref(pool.switcher)
    del pool
    gc.collect()
    assert switcher() is None
    assert meters.collect() == {}


@pytest.mark.anyio
async def test_without_a_provider_an_answer_goes_straight_to_the_server_and_one_that_is_set_later_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(awake="a")
    telemetry = pool.switcher.telemetry
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    await call(app, Connection(b'{"model": "a"}'))
    before = telemetry.is_measured
    meters = Meters()
    monkeypatch.setattr(otel_metrics, "get_meter_provider", lambda: meters.provider)
    monkeypatch.setattr(telemetry, "_look_again", 0.0)  # a second has passed
    await call(app, Connection(b'{"model": "a"}'))
    await pool.switcher.aclose()
    assert (before, telemetry.is_measured) == (False, True)
    found = meters.collect()
    assert found["llmux.requests"] == {("a", 201): 2}  # what is counted anyway counts from the beginning
    assert found["llmux.request.time_to_first_byte"] == {("a", False): 1}


@pytest.mark.anyio
async def test_the_first_byte_is_that_of_the_servers_answer_and_of_no_error_of_the_gateways() -> None:
    meters = Meters()
    pool = Pool(awake="a", telemetry=Telemetry(meter_provider=meters.provider))

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise BackendError("it is gone")

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        assert "llmux.request.time_to_first_byte" not in meters.collect()
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})

    with anyio.fail_after(LIMIT):
        for inner in (broken, streaming):
            await call(LLMuxMiddleware(inner, pool.switcher), Connection(b'{"model": "a"}'))
        await pool.switcher.aclose()
    assert meters.collect()["llmux.request.time_to_first_byte"] == {("a", True): 1}
