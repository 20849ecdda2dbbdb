"""`drain: preempt`: what goes wrong when requests are frozen, while they are, and when they are to go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from tests.support.eventually import eventually
from tests.support.gateway_process import failed_start
from tests.support.serve import serve

from .matrix import fault
from .stage import Answer, Setting, Stage, Stream, expected

LONG = 4000
"""Tokens of an answer that goes on for two seconds, its freezes not counted."""
TURNS = Setting(turns=True)
MANAGED = Setting(turns=True, managed="ab")


def turn(stage: Stage, model: str | None) -> None:
    """Have `model` be served next; `None`: whoever has waited longest."""
    assert stage.turns is not None
    stage.turns.turn = model


@contextmanager
def interrupted(stage: Stage) -> Iterator[tuple[Stream, Stream]]:
    """A stream of a that is frozen, and one of b that runs. Until told otherwise b goes on."""
    turn(stage, "b")
    with stage.stream("a", LONG) as frozen, stage.stream("b", LONG) as running:
        assert stage.statistics().frozen["a"] == 1
        yield frozen, running


def assert_whole(stream: Stream, model: str) -> None:
    assert stream.rest().end == "done", stream.error
    assert stream.text == expected(model, LONG)


def assert_cut_short(stream: Stream) -> None:
    assert stream.rest().end == "error"
    assert stream.error.partition(":")[0] in ("upstream_error", "request_interrupted")


def freezes(stage: Stage) -> list[object]:
    """How often each request of a that is over was frozen, if it was."""
    spans = [span.attributes or {} for span in stage.spans("llmux.request")]
    return [span["llmux.freezes"] for span in spans if span.get("llmux.model") == "a" and "llmux.freezes" in span]


# The freeze


@fault(
    "`/sleep?mode=keep` answers 500, once",
    "200; the running answer pauses, and is whole",
    "WARNING 'it is tried once more'; `llmux.freezes` on the request",
    "as after any switch",
    TURNS,
)
def freeze_fails_once(stage: Stage) -> None:
    stage.faults("a", "sleep:1:fail")
    with stage.stream("a", LONG) as stream:
        assert stage.ask("b") == Answer(200, expected("b"))
        assert_whole(stream, "a")
    assert stage.logged("putting the model 'a' to sleep failed, it is tried once more")
    eventually("the span has ended", lambda: bool(freezes(stage)))


@fault(
    "`/sleep?mode=keep` answers 500, each time; server by URL",
    "503 to who waits for the target; the running answer goes on, and is whole",
    "ERROR; the switch is `failed`",
    "nothing has changed",
    TURNS,
)
def freeze_fails(stage: Stage) -> None:
    stage.faults("a", "sleep:*:fail")
    with stage.stream("a", LONG) as stream:
        answer = stage.ask("b")
        assert (answer.status, "POST /sleep answered 500" in answer.error) == (503, True)
        assert_whole(stream, "a")
    assert stage.logged("switching from 'a' to 'b' failed", logging.ERROR)
    stage.until_outcomes("failed")
    assert stage.statistics().active_model == "a"
    assert freezes(stage) == []
    stage.mend("a")


@fault(
    "`/sleep?mode=keep` answers 500, each time; managed",
    "200; an error event to the running one",
    "WARNING 'ending the process'; the request's span is an error",
    "the process is ended; the model's next request starts it again",
    MANAGED,
)
def freeze_fails_managed(stage: Stage) -> None:
    stage.faults("a", "sleep:*:fail")
    with stage.stream("a", LONG) as stream:
        assert stage.ask("b") == Answer(200, expected("b"))
        assert_cut_short(stream)
    assert stage.logged("ending the process of the model 'a'")
    stage.until_failed_spans("llmux.request", 1)


@fault(
    "`/sleep?mode=keep` hangs; server by URL",
    "503 after twice `timeouts.sleep`; the running answer pauses, and is whole",
    "ERROR 'took longer than'; the switch is `failed`",
    "read back: the model is awake, may still fall asleep, and is frozen before anything is served",
    replace(TURNS, config={"*": {"timeouts": {"sleep": 0.6}}}),
)
def freeze_hangs(stage: Stage) -> None:
    stage.faults("a", "sleep:1:hang", "sleep:2:hang")
    with stage.stream("a", 2 * LONG) as stream:
        answer = stage.ask("b")
        assert (answer.status, "took longer than 0.6 s" in answer.error) == (503, True)
        assert stream.rest().end == "done", stream.error
        assert stream.text == expected("a", 2 * LONG)
    stage.until_outcomes("failed", "completed")
    eventually("the span has ended", lambda: freezes(stage) == [1])


@fault(
    "`/sleep?mode=keep` hangs; managed",
    "200, after twice `timeouts.sleep`; an error event to the running one",
    "WARNING 'ending the process'",
    "the process is ended; the model's next request starts it again",
    replace(MANAGED, config={"*": {"timeouts": {"sleep": 0.6}}}),
)
def freeze_hangs_managed(stage: Stage) -> None:
    stage.faults("a", "sleep:*:hang")
    with stage.stream("a", 2 * LONG) as stream:
        assert stage.ask("b") == Answer(200, expected("b"))
        assert_cut_short(stream)
    assert stage.logged("ending the process of the model 'a'")


@fault(
    "A freeze that was given up takes effect later",
    "200, or 503 if the server does not say in time that it sleeps after all; the running answer pauses, and is whole",
    "WARNING 'took longer than'",
    "as after any switch",
    replace(TURNS, config={"*": {"timeouts": {"sleep": 0.6}}}),
)
def freeze_comes_late(stage: Stage) -> None:
    stage.faults("a", "sleep:1:delay=0.9")
    with stage.stream("a", LONG) as stream:
        assert stage.ask("b").status in (200, 503)
        assert_whole(stream, "a")
    assert stage.logged("took longer than 0.6 s")


@fault(
    "The process dies over the freeze",
    "200; an error event to the running one",
    "WARNING; the request's span is an error",
    "`unreachable`, its memory free; managed: started at its next request",
    MANAGED,
)
def freeze_dies(stage: Stage) -> None:
    stage.faults("a", "sleep:1:die")
    with stage.stream("a", LONG) as stream:
        assert stage.ask("b") == Answer(200, expected("b"))
        assert_cut_short(stream)
    stage.until_failed_spans("llmux.request", 1)


@fault(
    "A server too old to freeze its requests",
    "with the lifespan the gateway does not start; mounted without it, 503",
    "ERROR 'drain: preempt needs POST /sleep?mode=keep' with the version to upgrade to",
    "exit status of the ASGI server, not 0; no server was touched",
    Setting(sims={"b": {"version": "0.13.0"}}, warm=False),
)
def freeze_unknown_to_the_server(stage: Stage) -> None:
    config = stage.configuration()
    config["policy"]["drain"] = "preempt"
    status, log = failed_start(config, stage.loop)
    assert status != 0
    assert "drain: preempt needs POST /sleep?mode=keep" in log
    assert "Upgrade it to 0.17 or later" in log
    with serve(Starlette(routes=[Mount("/llm", LLMuxApp(config))]), stage.loop) as url:
        response = httpx.post(url + "/llm/v1/completions", json={"model": "b", "prompt": "x"}, timeout=20)
        assert response.status_code == 503
        assert "Upgrade it to 0.17 or later" in response.json()["error"]["message"]
    assert (stage.asleep("a"), stage.asleep("b")) == (False, True)


# The wake, with frozen requests


@fault(
    "The wake of a model with frozen requests fails, once",
    "the frozen answers go on, and are whole",
    "WARNING 'it is tried once more'; the switch is `completed`",
    "as after any switch",
    TURNS,
)
def thaw_fails_once(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "wake:1:fail")
        turn(stage, None)
        assert_whole(frozen, "a")
        assert_whole(running, "b")
    assert stage.logged("waking the model 'a' failed, it is tried once more")


@fault(
    "The wake of a model with frozen requests runs out of memory, once: half-woken",
    "the frozen answers go on, and are whole",
    "WARNING 'out of memory'",
    "frozen as a whole, woken as a whole",
    TURNS,
)
def thaw_runs_out_of_memory_once(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "wake:1:oom")
        turn(stage, None)
        assert_whole(frozen, "a")
        assert_whole(running, "b")
    assert stage.logged("CUDA out of memory")


@fault(
    "The wake of a model with frozen requests fails, each time; server by URL",
    "an error event to the frozen ones of that model; those of the other model go on, and are whole",
    "ERROR; the switch is `failed`, the requests' spans are errors",
    "the server forgets them; the model backs off",
    TURNS,
)
def thaw_fails(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "wake:1:fail", "wake:2:fail")
        turn(stage, None)
        assert frozen.rest().end == "error"
        assert frozen.error.startswith("model_switch_failed")
        assert "POST /wake_up answered 500" in frozen.error
        stage.until_forgotten("a")
        assert_whole(running, "b")
    assert stage.logged("switching from 'b' to 'a' failed", logging.ERROR)
    stage.until_failed_spans("llmux.request", 1)


@fault(
    "The wake of a model with frozen requests fails, each time; managed",
    "an error event to the frozen ones of that model; those of the other model go on, and are whole",
    "WARNING 'ending the process'",
    "a new process serves the model",
    MANAGED,
)
def thaw_fails_managed(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("a", "wake:*:fail")
        turn(stage, None)
        assert frozen.rest().end == "error"
        assert_whole(running, "b")
    assert stage.logged("ending the process of the model 'a'")


@fault(
    "The wake of the target fails while requests of two other models are frozen; server by URL",
    "503 to who waits for the target; the frozen answers go on, and are whole",
    "ERROR; the switch is `failed`",
    "the frozen ones have their turns; the target backs off",
    replace(TURNS, models="abc"),
)
def target_fails_while_others_are_frozen(stage: Stage) -> None:
    with interrupted(stage) as (frozen, running):
        stage.faults("c", "wake:1:fail", "wake:2:fail")
        turn(stage, "c")
        answer = stage.ask("c")
        assert (answer.status, "POST /wake_up answered 500" in answer.error) == (503, True)
        turn(stage, None)
        assert_whole(frozen, "a")
        assert_whole(running, "b")
    assert stage.logged("switching from 'b' to 'c' failed", logging.ERROR)
