"""`drain: preempt`: what goes wrong while requests are frozen: servers die, clients leave, the gateway ends."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from tests.support.eventually import eventually
from tests.support.gateway_process import GatewayProcess

from .freezing import LONG, MANAGED, TURNS, assert_whole, interrupted, turn
from .matrix import fault
from .stage import Answer, Setting, Stage, Stream, expected

B_STAYS = Setting(policy={"drain": "preempt", "min_active_duration": 600}, warm=False)
"""The gateway finds a awake and owes it no time; b, once woken, is not left."""


@fault(
    "`kill -9` of a server while its requests are frozen; server by URL",
    "an error event to the frozen ones at once; the active model's answer goes on",
    "WARNING 'broke off'; the requests' spans are errors",
    "`unreachable` until its supervisor has restarted it: 503 'nothing listens there'",
    TURNS,
)
def killed_while_frozen(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.kill("a")
        assert frozen.rest().end == "error"
        assert frozen.error.startswith("upstream_error")
        stage.until_frozen("a", 0)
        assert_whole(running, "b")
    stage.until_failed_spans("llmux.request", 1)
    turn(stage, None)
    assert "nothing listens there" in stage.ask("a").error
    stage.restart("a", start_asleep=1)


@fault(
    "`kill -9` of a server while its requests are frozen; managed",
    "an error event to the frozen ones at once; the active model's answer goes on",
    "WARNING 'broke off'; the requests' spans are errors",
    "the model's next request starts it again",
    MANAGED,
)
def killed_while_frozen_managed(stage: Stage) -> None:
    before = stage.pid("a")
    with interrupted(stage) as (frozen, running):
        stage.kill("a")
        assert frozen.rest().end == "error"
        assert frozen.error.startswith("upstream_error")
        assert_whole(running, "b")
    turn(stage, None)
    assert stage.ask("a") == Answer(200, expected("a"))
    assert stage.pid("a") != before


@fault(
    "The engine of a server dies while its requests are frozen; server by URL",
    "an error event to the frozen ones; the active model's answer goes on",
    "WARNING 'broke off', or nothing: the error event is the server's",
    "503 until its supervisor has restarted it",
    TURNS,
)
def engine_dies_while_frozen(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "health:1:crash")
        stage.health("a")
        assert frozen.rest().end == "error"
        assert_whole(running, "b")
    turn(stage, None)
    stage.wait_for_end("a")
    assert "nothing listens there" in stage.ask("a").error
    stage.restart("a", start_asleep=1)


@fault(
    "The engine of a server dies while its requests are frozen; managed",
    "an error event to the frozen ones; the active model's answer goes on",
    "WARNING 'broke off', or nothing: the error event is the server's",
    "the model's next request starts it again",
    MANAGED,
)
def engine_dies_while_frozen_managed(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "health:1:crash")
        stage.health("a")
        assert frozen.rest().end == "error"
        assert_whole(running, "b")
    turn(stage, None)
    stage.until_gone("a")
    assert stage.ask("a") == Answer(200, expected("a"))


@fault(
    "The active model's server gives no answer any more (SIGSTOP) while requests of another one are frozen; server by URL",
    "an error event to the frozen ones when their turn comes and the active model cannot be put to sleep",
    "ERROR 'switching failed'; WARNING 'the state of the model is unknown'",
    "nobody is served before the server answers; then its own answer goes on, and is whole",
    replace(TURNS, config={"b": {"timeouts": {"sleep": 0.6, "probe": 0.6}}}),
)
def active_model_hangs_while_others_are_frozen(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.kill("b", signal.SIGSTOP)
        turn(stage, None)
        assert frozen.rest().end == "error"
        assert frozen.error.startswith("model_switch_failed")
        stage.until_forgotten("a")
        assert stage.logged("switching from 'b' to 'a' failed", logging.ERROR)
        stage.resume("b")
        assert_whole(running, "b")


@fault(
    "The active model's server gives no answer any more (SIGSTOP) while requests of another one are frozen; managed",
    "the frozen ones go on, and are whole; an error event to the active model's",
    "WARNING 'ending the process'",
    "the process is killed; the model's next request starts it again",
    replace(MANAGED, config={"b": {"timeouts": {"sleep": 0.6, "probe": 0.6, "stop": 0.2}}}),
)
def active_model_hangs_while_others_are_frozen_managed(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.kill("b", signal.SIGSTOP)
        turn(stage, None)
        assert_whole(frozen, "a")
        assert running.rest().end == "error"
    assert stage.logged("ending the process of the model 'b'")


@fault(
    "A client leaves while its request is frozen",
    "nothing: it has gone",
    "`llmux.client_disconnected` on the request",
    "its place is free, its server forgets it, and its model is not woken for it",
    TURNS,
)
def client_leaves_while_frozen(stage: Stage) -> None:
    turn(stage, "b")
    with ExitStack() as leaving, ExitStack() as staying:
        leaving.enter_context(stage.stream("a", LONG))
        running = staying.enter_context(stage.stream("b", LONG))
        assert stage.statistics().frozen["a"] == 1
        leaving.close()
        stage.until_frozen("a", 0)
        stage.until_forgotten("a")
        turn(stage, None)
        assert_whole(running, "b")
    stage.until_outcomes("completed")
    assert any((span.attributes or {}).get("llmux.client_disconnected") for span in stage.spans("llmux.request"))


@fault(
    "A request is frozen for longer than `max_frozen`",
    "comments in the stream, then an error event `model_queue_timeout`; the active model's answer goes on",
    "WARNING 'its model's next turn did not come'; the request's span is an error",
    "its place is free, its server forgets it, and its model is not woken for it",
    replace(TURNS, policy={"max_frozen": 0.5}, limits={"heartbeat": 0.1}),
)
def frozen_for_too_long(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        assert frozen.rest().end == "error"
        assert frozen.error.startswith("model_queue_timeout")
        assert frozen.comments > 0
        stage.until_frozen("a", 0)
        stage.until_forgotten("a")
        turn(stage, None)
        assert_whole(running, "b")
    assert stage.logged("its model's next turn did not come")
    stage.until_failed_spans("llmux.request", 1)
    stage.until_outcomes("completed")


@fault(
    "Somebody else wakes a server while its requests are frozen, and there is room for it",
    "the frozen answers go on at once, and are whole, as those of the active model",
    "one more `sleep` span, or nothing",
    "one model in memory after the next switch",
    replace(TURNS, sims={"*": {"gpu_memory_mib": 65536}}),
)
def woken_while_frozen(stage: Stage) -> None:
    stage.allow_two_awake()
    with interrupted(stage) as (frozen, running):
        stage.by_hand("a", "/wake_up")
        assert_whole(frozen, "a")
        stage.until_frozen("a", 0)
        assert stage.statistics().active_model == "b"
        assert_whole(running, "b")
    turn(stage, None)


@fault(
    "Somebody else wakes a server while its requests are frozen, and a switch to a third model comes before they are over",
    "the frozen answers pause again, and are whole",
    "one more `sleep` span",
    "the server has been frozen once more; one model in memory after the switch",
    replace(TURNS, models="abc", sims={"*": {"gpu_memory_mib": 98304}}),
)
def woken_while_frozen_and_frozen_again(stage: Stage) -> None:
    stage.allow_two_awake()
    with interrupted(stage) as (frozen, running):
        stage.by_hand("a", "/wake_up")
        turn(stage, "c")
        assert stage.ask("c") == Answer(200, expected("c"))
        assert (stage.asleep("a"), stage.asleep("b")) == (True, True)
        turn(stage, None)
        assert_whole(frozen, "a")
        assert_whole(running, "b")


@fault(
    "The gateway leaves its lifespan while requests are frozen; managed",
    "an error event to the frozen ones at once; running ones finish, within `limits.shutdown`",
    "INFO 'is gone' for each process",
    "all processes are ended",
    MANAGED,
)
def shutdown_while_frozen(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        closing = stage.in_background(stage.close_the_gateway)
        assert frozen.rest().end == "error"
        assert "the gateway is shutting down" in frozen.error
        assert_whole(running, "b")
        closing.result()
    assert stage.own_processes() == []
    turn(stage, None)


@contextmanager
def interrupted_at(stage: Stage, gateway: GatewayProcess) -> Iterator[tuple[Stream, Stream]]:
    """A stream of a that is frozen, and one of b that runs, at a gateway in a process of its own."""
    with stage.stream("a", LONG) as frozen, stage.stream("b", LONG) as running:
        assert gateway.statistics()["frozen"] == {"a": 1, "b": 0}
        yield frozen, running


@fault(
    "SIGTERM to the gateway while requests are frozen",
    "running ones finish; the frozen ones are cut, or get an error event, when the ASGI server's grace is over",
    "INFO",
    "exit status 0; the servers forget the requests",
    B_STAYS,
)
def gateway_gets_sigterm_while_frozen(stage: Stage) -> None:
    with stage.another_gateway() as gateway, stage.through(gateway):
        with interrupted_at(stage, gateway) as (frozen, running):
            gateway.kill(signal.SIGTERM)
            assert_whole(running, "b")
            assert frozen.rest().end in ("error", "cut")
            assert frozen.text != expected("a", LONG)
        assert gateway.wait() == 0
    stage.until_forgotten("a")
    stage.checked = "ba"  # b is awake, and who was woken stays


@fault(
    "`kill -9` of the gateway while requests are frozen",
    "nothing: the connection is cut",
    "nothing: it is dead",
    "the servers see it and forget the requests; the next gateway serves within one switch",
    B_STAYS,
)
def gateway_killed_while_frozen(stage: Stage) -> None:
    with stage.another_gateway() as first, stage.through(first):
        with interrupted_at(stage, first) as (frozen, running):
            first.kill()
            assert first.wait() == -signal.SIGKILL
            assert (frozen.rest().end, running.rest().end) == ("cut", "cut")
        stage.until_forgotten("a")
        stage.until_forgotten("b")
    with stage.another_gateway() as second, stage.through(second):
        assert stage.ask("a") == Answer(200, expected("a"))
        assert second.statistics()["switches"] == 1
    assert second.wait() == 0
    eventually("it sleeps", lambda: stage.asleep("b"))
