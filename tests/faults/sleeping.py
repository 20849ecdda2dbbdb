"""Putting the outgoing model to sleep goes wrong."""

from __future__ import annotations

import logging

from llmux_asgi import Mode, Phase

from .matrix import fault
from .stage import Answer, Setting, Stage, expected

MANAGED = Setting(managed="ab")


@fault(
    "`/sleep` answers 500, once",
    "200",
    "WARNING; the switch is `completed`",
    "as after any switch",
)
def sleep_fails_once(stage: Stage) -> None:
    stage.faults("a", "sleep:1:fail")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("putting the model 'a' to sleep failed, it is tried once more")
    stage.until_outcomes("completed")


@fault(
    "`/sleep` answers 500, each time; server by URL",
    "503 to who waits for the target; the awake model goes on",
    "ERROR; switch and `sleep` span are errors",
    "nothing has changed",
)
def sleep_fails(stage: Stage) -> None:
    stage.faults("a", "sleep:*:fail")
    answer = stage.ask("b")
    assert answer.status == 503
    assert "POST /sleep answered 500" in answer.error
    assert stage.logged("switching from 'a' to 'b' failed", logging.ERROR)
    stage.until_outcomes("failed")
    assert (stage.failed_spans("sleep"), stage.failed_spans("llmux.switch")) == (1, 1)
    assert stage.ask("a").status == 200
    assert stage.statistics().active_model == "a"
    stage.mend("a")


@fault(
    "`/sleep` answers 500, each time; managed",
    "200",
    "WARNING 'ending the process'; the switch is `completed`",
    "the process is ended; the model's next request starts it again",
    MANAGED,
)
def sleep_fails_managed(stage: Stage) -> None:
    before = stage.pid("a")
    stage.faults("a", "sleep:*:fail")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'a'")
    assert stage.statistics().servers["a"] == "stopped"
    assert stage.ask("a").status == 200
    assert stage.pid("a") != before


@fault(
    "`/sleep` hangs; server by URL",
    "503 after `timeouts.sleep`, twice that at most",
    "ERROR 'took longer than'; the switch is `failed`",
    "read back: the model is awake, may still fall asleep, and is put to sleep before anything is served",
    Setting(config={"*": {"timeouts": {"sleep": 0.6}}}),
)
def sleep_hangs(stage: Stage) -> None:
    stage.faults("a", "sleep:1:hang", "sleep:2:hang")
    answer = stage.ask("b")
    assert answer.status == 503
    assert "took longer than 0.6 s" in answer.error
    stage.until_outcomes("failed")


@fault(
    "`/sleep` hangs; managed",
    "200, after twice `timeouts.sleep`",
    "WARNING 'ending the process'",
    "the process is ended",
    Setting(managed="ab", config={"*": {"timeouts": {"sleep": 0.6}}}),
)
def sleep_hangs_managed(stage: Stage) -> None:
    stage.faults("a", "sleep:*:hang")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'a': ")
    assert stage.statistics().servers["a"] == "stopped"


@fault(
    "`/sleep` answers 200 and does nothing, once",
    "200",
    "WARNING 'the server is still awake'",
    "as after any switch",
)
def sleep_lies_once(stage: Stage) -> None:
    stage.faults("a", "sleep:1:lie")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("the server is still awake")


@fault(
    "`--enable-sleep-mode` forgotten: says that it sleeps and frees nothing; server by URL, memory check on",
    "503 that names the memory in use",
    "ERROR 'MiB in use'; the switch is `failed`",
    "no other model is woken until the server is started right",
    Setting(memory_check=True),
)
def sleep_frees_nothing(stage: Stage) -> None:
    stage.faults("a", "sleep:*:leak")
    answer = stage.ask("b")
    assert answer.status == 503
    assert "20480 MiB in use" in answer.error
    assert stage.logged("20480 MiB in use", logging.ERROR)
    stage.restart("a", start_asleep=1)


@fault(
    "Memory stays taken after a sleep; managed, memory check on",
    "200",
    "WARNING 'MiB in use', 'ending the process'",
    "the process is ended; its memory is free",
    Setting(managed="ab", memory_check=True),
)
def sleep_frees_nothing_managed(stage: Stage) -> None:
    stage.faults("a", "sleep:*:leak")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("20480 MiB in use")
    assert stage.logged("ending the process of the model 'a'")


@fault(
    "The process dies while it is put to sleep",
    "200: its memory is free",
    "nothing but the switch, `completed`",
    "`unreachable`; managed: started at its next request",
    Setting(managed="a"),
)
def sleep_dies(stage: Stage) -> None:
    stage.faults("a", "sleep:1:die")
    assert stage.ask("b") == Answer(200, expected("b"))
    stage.until_outcomes("completed")
    assert stage.statistics().servers["a"] in ("stopped", "unreachable")


@fault(
    "A `/sleep` that was given up takes effect later",
    "503, or 200 if the server says in time that it sleeps after all",
    "WARNING",
    "the late sleep cannot hit a later wake: the model is put to sleep for certain first",
    Setting(config={"*": {"timeouts": {"sleep": 0.3, "probe": 0.3}}}),
)
def sleep_comes_late(stage: Stage) -> None:
    stage.faults("a", "sleep:1:delay=1.5")
    assert stage.ask("b").status in (200, 503)
    answers = [stage.ask("a") for _ in range(20)]
    assert {answer.status for answer in answers} <= {200, 503}
    assert {answer.text for answer in answers} <= {"", expected("a")}
    while stage.ask("a").status != 200:  # until its engine has got through with it
        pass


@fault(
    "Somebody else sends `/sleep?mode=wait` while answers run: it takes effect when they are done",
    "the running answers finish; 200 to who comes then, or 503 if it comes before the watch has noticed (200 with `retry`)",
    "WARNING 'is not awake any more'",
    "woken again",
    Setting(limits={"health_interval": 0.05}),
)
def sleep_by_hand_in_mode_wait(stage: Stage) -> None:
    with stage.stream("a", tokens=600) as stream:
        stranger = stage.in_background(lambda: stage.by_hand("a", "/sleep?mode=wait"))
        assert stream.rest().end == "done"
        assert stream.text == expected("a", 600)
    stranger.result()
    stage.expect_requests_asleep(5)
    answer = stage.ask("a")
    assert answer == Answer(200, expected("a")) or answer.error.startswith("request_interrupted")
    assert stage.logged("not awake")


@fault(
    "Somebody else puts the active model to sleep while a request is on its way; `retry: true`",
    "200: it hangs until the watch has noticed, and is sent once more",
    "WARNING 'The request is sent once more'",
    "woken again",
    Setting(limits={"health_interval": 0.3}, config={"a": {"retry": True}}),
)
def sleep_by_hand_retried(stage: Stage) -> None:
    stage.expect_requests_asleep(1)
    stage.by_hand("a", "/sleep?level=1")
    assert stage.ask("a") == Answer(200, expected("a"))
    assert stage.logged("not awake any more")


@fault(
    "Somebody else puts the active model to sleep; with the lifespan's watch",
    "200 for who comes after the watch has noticed",
    "WARNING 'is not awake any more'",
    "idle; the next request wakes it",
    Setting(limits={"health_interval": 0.05}),
)
def sleep_by_hand(stage: Stage) -> None:
    stage.by_hand("a", "/sleep?level=1")
    stage.until_mode(Mode.IDLE)
    assert stage.ask("a") == Answer(200, expected("a"))
    assert stage.logged("the server of the active model 'a' is not awake any more")


@fault(
    "A drain does not end; no `drain_timeout`",
    "504 to who waits, after `request_timeout`; the endless answer goes on",
    "WARNING 'did not become active within'; the switch is `abandoned`",
    "nothing has changed",
    Setting(policy={"request_timeout": 1}),
)
def drain_never_ends(stage: Stage) -> None:
    with stage.stream("a") as stream:
        answer = stage.ask("b")
        assert answer.status == 504
        assert "1 in flight" in answer.error
        seen = len(stream.text)
        while len(stream.text) == seen:
            assert stream.read_on()
    assert stage.logged("did not become active within")
    stage.until_outcomes("abandoned")


@fault(
    "A drain does not end; with `drain_timeout`",
    "200 to who waits; an error event to the endless one",
    "WARNING 'was aborted'",
    "as after any switch",
    Setting(policy={"drain_timeout": 0.1}),
)
def drain_exceeds_its_deadline(stage: Stage) -> None:
    with stage.stream("a") as stream:
        assert stage.ask("b") == Answer(200, expected("b"))
        assert stream.rest().end == "error"
    assert stream.error.startswith("request_interrupted")
    assert stage.logged("was aborted")


@fault(
    "A thousand requests wait for a switch that fails",
    "503 with `Retry-After` to each",
    "one ERROR",
    "counts at zero; the model backs off",
    Setting(config={"*": {"timeouts": {"sleep": 2}}}, limits={"backoff_initial": 30, "backoff_max": 30}),
)
def switch_fails_for_a_thousand(stage: Stage) -> None:
    stage.faults("a", "sleep:1:delay=1.2", "wake:*:fail")
    stage.faults("b", "wake:*:fail")
    first = stage.begin("b")
    stage.until_phase(Phase.SLEEP)
    # hypercorn takes 20 s for as many as uvicorn takes in 5; what the gateway does with them is the same.
    answers = stage.at_once("b", 999 if stage.loop == "asyncio" else 249)
    assert {status for status, _ in answers} == {503}
    assert all(int(after) > 0 for _, after in answers)
    assert first.result().status == 503
    assert stage.count_logged("switching from 'a' to 'b' failed", logging.ERROR) == 1
    assert stage.ask("b").retry_after is not None
    stage.mend("a")
    stage.mend("b")
    stage.checked = "a"
