"""What an operator may do: wake, sleep, stop, pin, drain; in the middle of traffic. On asyncio and on trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmux_asgi import (
    BackendError,
    BackendUnsupportedError,
    DrainingError,
    FifoPolicy,
    LLMuxError,
    Mode,
    OperationError,
    Phase,
    PolicyError,
    QueueTimeoutError,
    SwitchContext,
    SwitchError,
    UnknownModelError,
)
from llmux_asgi._orders import Order, OrderKind
from llmux_asgi.telemetry import Telemetry
from tests.support.pool import Pool, Runner, running, until_frozen, until_phase, until_waiting

pytestmark = pytest.mark.anyio


class Call:
    """An operator's call in the background."""

    def __init__(self, run: Runner, operation: Callable[[], Awaitable[None]]) -> None:
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()
        self.error: LLMuxError | None = None
        self._operation = operation
        run._tasks.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            try:
                await self._operation()
            except LLMuxError as exc:
                self.error = exc
        self.done.set()


def kinds(pool: Pool, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
    return [(entry.kind, entry.data) for entry in pool.switcher.journal.since(0)[0] if entry.kind in kinds]


# Sleep


async def test_a_model_that_is_put_to_sleep_is_drained_first_and_no_other_is_woken() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        assert pool.switcher.try_acquire("a") is None
        assert pool.switcher.statistics().switch is not None
        assert not call.done.is_set()
        request.finish.set()
        await call.done.wait()
        assert (call.error, request.interrupted) == (None, False)
        statistics = pool.switcher.statistics()
        assert (statistics.mode, statistics.active_model, statistics.switch) == (Mode.IDLE, None, None)
        assert (statistics.switches, statistics.servers["a"]) == (1, "asleep")
        await pool.switcher.sleep("a")
        await pool.switcher.sleep("b")
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_requests_that_come_during_the_drain_of_a_sleep_wait_and_wake_the_model_again() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        late = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        first.finish.set()
        await late.done.wait()
        await call.done.wait()
    assert pool.gpu.events == ["sleep a", "asleep a", "wake a", "awake a"]


async def test_those_who_wait_for_others_are_served_after_a_sleep() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.switcher.pin("a")  # else the switch to b would come first
        other = run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        first.finish.set()
        await call.done.wait()
        await other.done.wait()
        assert other.error is None
    assert pool.gpu.events == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_a_sleep_that_is_ordered_during_a_switch_comes_after_it() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        gate = pool.backends["b"].gate("wake")
        request = run.send("b")
        await gate.entered.wait()
        first, second = Call(run, lambda: pool.switcher.sleep("a")), Call(run, lambda: pool.switcher.sleep("b"))
        gate.open.set()
        await request.granted.wait()
        await until_phase(pool, Phase.DRAIN)
        request.finish.set()
        await first.done.wait()
        await second.done.wait()
        assert (first.error, second.error, request.interrupted) == (None, None, False)
    assert pool.gpu.events == ["sleep a", "asleep a", "wake b", "awake b", "sleep b", "asleep b"]


@pytest.mark.parametrize("moment", ["drain", "sleep"])
async def test_a_caller_that_leaves_does_not_leave_a_sleep_half_done(moment: str) -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        gate = pool.backends["a"].gate("sleep")
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        if moment == "drain":
            call.scope.cancel()
        request.finish.set()
        await gate.entered.wait()
        call.scope.cancel()
        await call.done.wait()
        gate.open.set()
        while pool.switcher.statistics().mode is not Mode.IDLE:
            await anyio.lowlevel.checkpoint()
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_a_sleep_that_fails_tells_its_caller_and_the_model_goes_on_as_its_server_says() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: it will not"), times=2)
        gate = pool.backends["a"].gate("sleep")
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await gate.entered.wait()
        late = run.send("a", finish=True)
        gate.open.set()
        await call.done.wait()
        assert isinstance(call.error, BackendError)
        await late.done.wait()
        assert late.error is None
        statistics = pool.switcher.statistics()
        assert (statistics.mode, statistics.active_model, statistics.failures) == (Mode.ACTIVE, "a", 1)
        assert statistics.last_errors["a"].message == "fake://a: it will not"
        assert statistics.retry_in == {}, "it was not the wake that failed"


async def test_a_sleep_aborts_what_runs_if_draining_is_off() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False), awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        await pool.switcher.sleep("a")
        request.finish.set()
        await request.done.wait()
        assert request.interrupted


async def test_a_sleep_freezes_nobody() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain="preempt"), awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        await anyio.wait_all_tasks_blocked()
        assert pool.gpu.events == []
        request.finish.set()
        await call.done.wait()
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_a_policy_that_fails_before_a_sleep_leaves_everything_as_it_was() -> None:
    class Faulty(FifoPolicy):
        async def prepare_switch(self, context: SwitchContext) -> None:
            assert (context.from_model, context.to_model) == ("a", None)
            raise ZeroDivisionError

    pool = Pool(Faulty(min_active_duration=0), awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        with pytest.raises(PolicyError):
            await pool.switcher.sleep("a")
        (await run.served("a")).finish.set()
        assert [error.kind for error in pool.switcher.statistics().errors] == ["PolicyError"]
    assert pool.gpu.events == []


async def test_a_policy_that_fails_before_a_sleep_costs_those_nothing_who_came_meanwhile() -> None:
    fail = anyio.Event()

    class Faulty(FifoPolicy):
        async def prepare_switch(self, context: SwitchContext) -> None:
            await fail.wait()
            raise ZeroDivisionError

    pool = Pool(Faulty(min_active_duration=0), awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        call = Call(run, lambda: pool.switcher.sleep("a"))
        await until_phase(pool, Phase.DRAIN)
        late = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        fail.set()
        await late.done.wait()
        await call.done.wait()
        assert (type(call.error), late.error) == (PolicyError, None)


async def test_an_unexpected_error_is_told_to_whoever_has_given_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        with monkeypatch.context() as patch:
            patch.setattr(pool.switcher._driver, "exclusively", None)
            first = Call(run, lambda: pool.switcher.sleep("a"))
            second = Call(run, lambda: pool.switcher.sleep("a"))
            await first.done.wait()
            await second.done.wait()
        assert {type(call.error) for call in (first, second)} == {OperationError}
        await pool.switcher.sleep("a")


async def test_an_idle_sleep_belongs_to_nobodys_trace() -> None:
    with TracerProvider().get_tracer("host").start_as_current_span("request") as span:
        assert trace.get_current_span(Order(OrderKind.SLEEP, "a").context) is span
        assert not trace.get_current_span(Order(OrderKind.IDLE, "a").context).get_span_context().is_valid


async def test_the_servers_are_asked_before_a_first_sleep_and_if_they_give_no_answer_it_is_not_done() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.switcher.distrust()
        pool.backends["a"].fail("state", BackendError("fake://a: no answer"))
        with pytest.raises(OperationError, match="no answer"):
            await pool.switcher.sleep("a")
        await pool.switcher.sleep("a")
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_closing_gives_up_a_sleep_that_waits_for_requests() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        calls = [Call(run, lambda: pool.switcher.sleep("a")) for _ in range(2)]
        await until_phase(pool, Phase.DRAIN)
        run._tasks.start_soon(pool.switcher.aclose)
        for call in calls:
            await call.done.wait()
            assert isinstance(call.error, OperationError)
        request.finish.set()
    assert pool.gpu.events == []


async def test_an_order_that_is_refused_while_the_lock_is_awaited_is_not_missed_afterwards() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        lock = pool.switcher._driver.exclusively()
        async with lock:
            call = Call(run, lambda: pool.switcher.sleep("a"))
            while not lock.statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            run._tasks.start_soon(pool.switcher.aclose)
            await call.done.wait()
        assert isinstance(call.error, OperationError)
    assert pool.switcher.statistics().errors == ()


# Stop


async def test_a_process_is_stopped_once_its_requests_are_over_and_started_again_by_the_next() -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        request = await run.served("a")
        call = Call(run, lambda: pool.switcher.stop("a"))
        await until_phase(pool, Phase.DRAIN)
        request.finish.set()
        await call.done.wait()
        assert pool.switcher.statistics().servers["a"] == "stopped"
        (await run.served("a")).finish.set()
        await pool.switcher.sleep("a")
        await pool.switcher.stop("a")
    assert pool.gpu.events == [
        "stop a", "stopped a", "wake a", "awake a", "sleep a", "asleep a", "stop a", "stopped a"
    ]  # fmt: skip


async def test_the_process_of_somebody_else_is_not_stopped() -> None:
    pool = Pool(awake="a")
    async with running(pool):
        with pytest.raises(BackendUnsupportedError, match="not started by the gateway"):
            await pool.switcher.stop("a")
    assert pool.gpu.events == []


async def test_a_process_that_keeps_frozen_requests_is_not_stopped() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain="preempt"), awake="a", stoppable="a")
    async with running(pool) as run:
        frozen = await run.served("a")
        other = await run.served("b")
        await until_frozen(pool, "a", 1)
        pool.switcher.pin("b")
        with pytest.raises(OperationError, match="1 requests are frozen"):
            await pool.switcher.stop("a")
        pool.switcher.unpin()
        other.finish.set()
        frozen.finish.set()
    assert "stop a" not in pool.gpu.events


async def test_a_stop_that_fails_has_the_servers_asked() -> None:
    pool = Pool(awake="b", stoppable="a")
    async with running(pool) as run:
        (await run.served("b")).finish.set()
        pool.backends["a"].fail("stop", BackendError("fake://a: it stays"))
        asked = pool.backends["b"].asked
        with pytest.raises(BackendError, match="it stays"):
            await pool.switcher.stop("a")
        (await run.served("b")).finish.set()
        assert pool.backends["b"].asked == asked + 1


# Wake and pin


async def test_waking_makes_a_model_active_as_a_request_would() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        await pool.switcher.wake("b")
        await pool.switcher.wake("b")
        assert pool.switcher.statistics().active_model == "b"
        pool.backends["c"].fail("wake", BackendError("no"), times=2)
        with pytest.raises(SwitchError):
            await pool.switcher.wake("c")
        with pytest.raises(UnknownModelError):
            await pool.switcher.wake("x")
        assert list(pool.switcher.statistics().retry_in) == ["c"]
        (await run.served("a")).finish.set()


async def test_others_wait_while_a_model_is_pinned_and_are_told_so_when_their_time_is_up() -> None:
    pool = Pool(awake="a", aliases={"alias": "a"})
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.switcher.pin("alias")
        assert pool.switcher.pinned == "a"
        late = run.send("b", timeout=0.01)
        await late.done.wait()
        assert isinstance(late.error, QueueTimeoutError)
        assert "'a' is pinned" in str(late.error)
        waiting = run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(OperationError, match="'a' is pinned"):
            await pool.switcher.wake("b")
        (await run.served("a")).finish.set()
        assert pool.gpu.events == []
        pool.switcher.unpin()
        await waiting.done.wait()
        assert waiting.error is None
    assert kinds(pool, "pin") == [("pin", {"model": "a"}), ("pin", {"model": None})]


async def test_a_pinned_model_that_sleeps_is_woken_and_stays() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.switcher.pin("b")
        (await run.served("c")).finish.set()
        (await run.served("b")).finish.set()
        waiting = run.send("c", finish=True)
        await until_waiting(pool, "c", 1)
        await anyio.wait_all_tasks_blocked()
        assert pool.switcher.statistics().active_model == "b"
        waiting.scope.cancel()


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
async def test_pinning_gives_up_a_switch_away_that_has_not_put_the_model_to_sleep(phase: Phase) -> None:
    pool = Pool(FifoPolicy(min_active_duration=60 if phase is Phase.COOLDOWN else 0))
    async with running(pool) as run:
        first = await run.served("a")
        other = run.send("b", finish=True)
        await until_phase(pool, phase)
        late = run.send("a", finish=True)
        pool.switcher.pin("a")
        await late.done.wait()
        assert late.error is None
        assert pool.switcher.statistics().abandoned == 1
        await anyio.wait_all_tasks_blocked()
        assert pool.switcher.statistics().waiting["b"] == 1
        other.scope.cancel()
        first.finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_pinning_comes_too_late_for_a_sleep_that_is_on_the_wire() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        gate = pool.backends["a"].gate("sleep")
        other = run.send("b", finish=True)
        await gate.entered.wait()
        pool.switcher.pin("a")
        gate.open.set()
        await other.done.wait()
        assert other.error is None
        (await run.served("a")).finish.set()


# Drain


async def test_new_requests_are_refused_while_draining_and_those_that_run_or_wait_finish() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        waiting = run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        pool.switcher.drain()
        for model in "ab":
            refused = run.send(model)
            await refused.done.wait()
            assert isinstance(refused.error, DrainingError)
        assert (pool.switcher.draining, pool.switcher.statistics().drained) == (True, False)
        first.finish.set()
        await waiting.done.wait()
        assert waiting.error is None
        assert pool.switcher.statistics().drained
        await pool.switcher.wake("c")
        await pool.switcher.sleep("c")
        pool.switcher.resume()
        (await run.served("a")).finish.set()
        assert not pool.switcher.statistics().drained
    assert kinds(pool, "drain") == [("drain", {"draining": True}), ("drain", {"draining": False})]


async def test_a_gateway_that_was_draining_when_it_was_closed_still_is_afterwards() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        pool.switcher.drain()
        await pool.switcher.aclose()
        assert pool.switcher.try_acquire("a") is None
        pool.switcher.resume()
        (await run.served("a")).finish.set()


# The journal, and what the statistics tell


async def test_the_journal_tells_what_happened_in_order() -> None:
    now = 0.0
    pool = Pool(awake="a", clock=lambda: now)
    async with running(pool) as run:
        request = await run.served("a")
        waiting = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        now += 2.0
        assert pool.switcher.statistics().oldest_waits == {"b": 2.0}
        under_way = pool.switcher.statistics().switch
        assert under_way is not None
        assert (under_way.number, under_way.from_model, under_way.to_model, under_way.phase) == (1, "a", "b", Phase.DRAIN)
        request.finish.set()
        await waiting.done.wait()
        await pool.switcher.sleep("b")
    over = {"outcome": "completed", "duration": 2.0, "served": 1, "longest_wait": 2.0}
    phases = {"cooldown": 0.0, "drain": 2.0, "sleep": 0.0, "wake": 0.0, "ready": 0.0}
    assert kinds(pool, "switch", "phase", "switched", "error")[:7] == [
        ("switch", {"switch": 1, "from": "a", "to": "b", "waiting": 1, "in_flight": 1}),
        ("phase", {"switch": 1, "phase": "cooldown", "model": "a"}),
        ("phase", {"switch": 1, "phase": "drain", "model": "a"}),
        ("phase", {"switch": 1, "phase": "sleep", "model": "a"}),
        ("phase", {"switch": 1, "phase": "wake", "model": "b"}),
        ("phase", {"switch": 1, "phase": "ready", "model": "b"}),
        ("switched", {"switch": 1, "from": "a", "to": "b", "phases": phases, **over}),
    ]
    assert kinds(pool, "switch", "phase", "switched", "error")[7:] == [
        ("switch", {"switch": 2, "from": "b", "to": None, "waiting": 0, "in_flight": 0}),
        ("phase", {"switch": 2, "phase": "drain", "model": "b"}),
        ("phase", {"switch": 2, "phase": "sleep", "model": "b"}),
        (
            "switched",
            {
                "switch": 2,
                "from": "b",
                "to": None,
                "outcome": "completed",
                "duration": 0.0,
                "phases": {"drain": 0.0, "sleep": 0.0},
            }
            | {"served": 0, "longest_wait": None},
        ),
    ]
    states = [(data["model"], data["state"]) for _, data in kinds(pool, "model")]
    assert sorted(states[:3]) == [("a", "awake"), ("b", "asleep"), ("c", "asleep")]
    assert states[3:] == [("a", "asleep"), ("b", "awake"), ("b", "asleep")]


async def test_a_sleep_is_a_span_of_a_switch_under_that_of_whoever_has_ordered_it() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    pool = Pool(awake="a", telemetry=Telemetry(provider))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        with provider.get_tracer("host").start_as_current_span("operator"):
            await pool.switcher.sleep("a")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    switch, operator = spans["llmux.switch"], spans["operator"]
    assert switch.parent is not None
    assert switch.parent.span_id == operator.context.span_id
    assert dict(switch.attributes or {}) == {
        "llmux.switch.from": "a",
        "llmux.switch.sleep_level": 1,
        "llmux.switch.policy": "FifoPolicy",
        "llmux.switch.waiting": 0,
        "llmux.switch.in_flight": 0,
        "llmux.switch.outcome": "completed",
    }
    assert {span.name for span in spans.values() if span.parent and span.parent.span_id == switch.context.span_id} == {
        "drain",
        "sleep",
    }


async def test_requests_for_the_active_model_write_nothing() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        written = pool.switcher.journal.last_id
        for _ in range(3):
            (await run.served("a")).finish.set()
        assert pool.switcher.journal.last_id == written


async def test_failures_and_given_up_switches_are_in_the_journal() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        request = await run.served("a")
        waiting = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        waiting.scope.cancel()
        await waiting.done.wait()
        while pool.switcher.statistics().switch is not None:
            await anyio.lowlevel.checkpoint()
        request.finish.set()
        pool.backends["b"].fail("wake", BackendError("http://127.0.0.1:1: no"), times=2)
        failed = run.send("b")
        await failed.done.wait()
        pool.backends["c"].fail("state", BackendError("down"))
        lost = run.send("c")
        await lost.done.wait()
    assert [data["outcome"] for _, data in kinds(pool, "switched")] == ["abandoned", "failed", "failed"]
    assert [(data["model"], data["kind"], data["message"]) for _, data in kinds(pool, "error")] == [
        ("b", "BackendError", "the server: no"),
        ("c", "BackendError", "down"),
    ]


async def test_the_time_is_shared_out_into_serving_switching_and_idle() -> None:
    now = 0.0
    pool = Pool(FifoPolicy(min_active_duration=0), awake="a", clock=lambda: now)
    async with running(pool) as run:
        now += 1.0  # idle
        first = await run.served("a")
        now += 10.0  # serving
        second = await run.served("a")
        first.finish.set()
        await first.done.wait()
        now += 10.0  # serving
        waiting = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        now += 100.0  # switching
        second.finish.set()
        await waiting.granted.wait()
        now += 10.0  # serving
        waiting.finish.set()
        await waiting.done.wait()
        now += 1.0  # idle
        assert pool.switcher.statistics().shares == {"serving": 30.0, "switching": 100.0, "idle": 2.0}
        third = pool.switcher.try_acquire("b")
        assert third is not None
        now += 5.0  # serving
        assert pool.switcher.statistics().shares == {"serving": 35.0, "switching": 100.0, "idle": 2.0}
        third.release()
