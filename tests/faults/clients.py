"""Clients leave in every phase; the gateway itself is killed in every phase."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

from llmux_asgi import Phase
from llmux_asgi._process import processes_of
from tests.support.eventually import eventually

from .matrix import fault
from .stage import Answer, Setting, Stage, expected


def leave_in(stage: Stage, phase: Phase, model: str = "b") -> None:
    with stage.client_that_leaves(model) as leave:
        stage.until_phase(phase)
        leave()


@fault(
    "The only waiting client leaves during the cooldown",
    "nothing: it has gone",
    "the switch is `abandoned`; `llmux.client_disconnected` on the request",
    "the active model goes on",
    Setting(policy={"min_active_duration": 600}, warm=False),
)
def client_leaves_in_cooldown(stage: Stage) -> None:
    assert stage.ask("b").status == 200
    leave_in(stage, Phase.COOLDOWN, "a")
    stage.until_outcomes("completed", "abandoned")
    assert stage.statistics().active_model == "b"
    stage.checked = "b"


@fault(
    "The only waiting client leaves during the drain",
    "nothing: it has gone",
    "the switch is `abandoned`",
    "the active model goes on; its running answer was not touched",
)
def client_leaves_in_drain(stage: Stage) -> None:
    with stage.stream("a", tokens=3000) as stream:
        leave_in(stage, Phase.DRAIN)
        stage.until_outcomes("abandoned")
        assert stream.rest().end == "done"
    assert stage.statistics().active_model == "a"


@fault(
    "The only waiting client leaves while the outgoing model is put to sleep",
    "nothing: it has gone",
    "the switch is `abandoned`: the step is ended, the target not woken",
    "idle: no model awake",
)
def client_leaves_in_sleep(stage: Stage) -> None:
    stage.faults("a", "sleep:1:delay=0.4")
    leave_in(stage, Phase.SLEEP)
    stage.until_outcomes("abandoned")
    assert stage.statistics().active_model is None


@fault(
    "The only waiting client leaves while the target is woken",
    "nothing: it has gone",
    "the switch is `completed`: a step on the wire runs to its end",
    "the target is active",
)
def client_leaves_in_wake(stage: Stage) -> None:
    stage.faults("b", "wake:1:delay=0.4")
    leave_in(stage, Phase.WAKE)
    stage.until_outcomes("completed")
    assert stage.statistics().active_model == "b"


@fault(
    "A client leaves while its answer is streamed",
    "nothing: it has gone",
    "`llmux.client_disconnected` on the request",
    "the server stops generating; the count is zero",
)
def client_leaves_in_its_answer(stage: Stage) -> None:
    with stage.stream("a"):
        stage.until_in_flight("a", 1)
    stage.until_in_flight("a", 0)
    assert stage.ask("b") == Answer(200, expected("b"))


def kill_in(stage: Stage, phase: str, provoke: Callable[[], object] = lambda: None, pinned: bool = False) -> None:
    """Kill a gateway, by SIGKILL, while it is in `phase` of the switch from `a` to `b`; then use the next one."""
    with stage.another_gateway() as first, stage.through(first):
        for model in ("b", "a"):
            assert stage.ask(model).status == 200
        with ExitStack() as stack:
            if pinned:
                stack.enter_context(stage.stream("a"))
            provoke()
            with stage.client_that_leaves("b"):
                eventually(f"phase {phase}", lambda: first.statistics()["phase"] == phase)
                first.kill()
                assert first.wait() == -signal.SIGKILL
    with stage.another_gateway() as second, stage.through(second):
        assert stage.ask("b") == Answer(200, expected("b"))
        assert second.statistics()["switches"] <= 1
    assert second.wait() == 0


def end_in_order(stage: Stage, number: signal.Signals) -> None:
    with stage.another_gateway() as gateway, stage.through(gateway):
        assert stage.ask("b").status == 200
        with stage.stream("a", tokens=2000) as stream:
            gateway.kill(number)
            assert stream.rest().end == "done"
            assert stream.text == expected("a", 2000)
        assert gateway.wait() == 0
        assert gateway.log.count("is gone") == 2
    assert processes_of(gateway.pid) == []


KILLED = (
    "nothing: the connection is cut",
    "nothing: it is dead",
    "the next gateway asks the servers and serves within one switch",
)
URL = Setting(warm=False)
COLD = Setting(managed="ab", warm=False)


@fault("`kill -9` of the gateway during the cooldown", *KILLED, Setting(policy={"min_active_duration": 1.5}, warm=False))
def gateway_killed_in_cooldown(stage: Stage) -> None:
    kill_in(stage, "cooldown")


@fault("`kill -9` of the gateway during the drain", *KILLED, URL)
def gateway_killed_in_drain(stage: Stage) -> None:
    kill_in(stage, "drain", pinned=True)


@fault("`kill -9` of the gateway while a model is put to sleep", *KILLED, URL)
def gateway_killed_in_sleep(stage: Stage) -> None:
    kill_in(stage, "sleep", lambda: stage.faults("a", "sleep:1:delay=1"))


@fault("`kill -9` of the gateway while a model is woken", *KILLED, URL)
def gateway_killed_in_wake(stage: Stage) -> None:
    kill_in(stage, "wake", lambda: stage.faults("b", "wake:1:delay=1"))


@fault("`kill -9` of the gateway while it waits for the woken model", *KILLED, URL)
def gateway_killed_in_ready(stage: Stage) -> None:
    kill_in(stage, "ready", lambda: stage.faults("b", "wake:1:lie"))


@fault(
    "`kill -9` of the gateway while one of its processes answers",
    "nothing: the connection is cut",
    "nothing: it is dead",
    "its processes end by themselves; the next gateway waits for that, and serves within one switch",
    COLD,
)
def gateway_killed_with_its_processes(stage: Stage) -> None:
    kill_in(stage, "drain", pinned=True)


@fault(
    "`kill -9` of the gateway and of its guardians at once",
    "nothing: the connection is cut",
    "WARNING of the next gateway if it finds anything",
    "nothing is left of the processes when the next gateway has served",
    COLD,
)
def gateway_and_guardians_killed(stage: Stage) -> None:
    with stage.another_gateway() as first, stage.through(first):
        assert stage.ask("a").status == 200
        own = processes_of(first.pid)
        for pid in (first.pid, *(pid for pid in own if stage.parent(pid) == first.pid)):
            os.kill(pid, signal.SIGKILL)
        first.wait()
    with stage.another_gateway() as second, stage.through(second):
        assert stage.ask("b") == Answer(200, expected("b"))
        assert processes_of(first.pid) == []


@fault(
    "SIGTERM to the gateway while an answer runs",
    "the running answer finishes",
    "INFO 'is gone' for each process",
    "exit status 0; no process is left",
    COLD,
)
def gateway_gets_sigterm(stage: Stage) -> None:
    end_in_order(stage, signal.SIGTERM)


@fault(
    "SIGINT to the gateway while an answer runs",
    "the running answer finishes",
    "INFO 'is gone' for each process",
    "exit status 0; no process is left",
    COLD,
)
def gateway_gets_sigint(stage: Stage) -> None:
    end_in_order(stage, signal.SIGINT)
