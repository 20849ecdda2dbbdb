"""The engine, or its process, dies outside a switch; what the servers say and what is so drift apart."""

from __future__ import annotations

import signal

from llmux_asgi import Mode

from .matrix import fault
from .stage import Answer, Setting, Stage, expected

MANAGED = Setting(managed="ab")


@fault(
    "The awake server's process is killed while idle; managed",
    "200: nothing was sent to it, so the request is sent once more after the restart",
    "WARNING 'The request is sent once more'",
    "a new process serves the model",
    MANAGED,
)
def killed_idle_managed(stage: Stage) -> None:
    stage.kill("a")
    assert stage.ask("a") == Answer(200, expected("a"))
    assert stage.logged("The request is sent once more")


@fault(
    "The awake server's process is killed while idle; server by URL",
    "503 'nothing listens there' until its supervisor has restarted it; other models are served",
    "WARNING, ERROR",
    "idle; the model backs off",
)
def killed_idle(stage: Stage) -> None:
    stage.kill("a")
    answer = stage.ask("a")
    assert answer.status == 503
    assert "nothing listens there" in answer.error
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.statistics().servers["a"] == "unreachable"
    stage.restart("a", start_asleep=1)


@fault(
    "The awake server dies while idle; with the lifespan's watch",
    "200",
    "WARNING 'does not say that it is awake' or 'is not awake any more'",
    "noticed before the next request; a new process serves the model",
    Setting(managed="ab", limits={"health_interval": 0.05}),
)
def killed_idle_watched(stage: Stage) -> None:
    stage.kill("a")
    stage.until_mode(Mode.IDLE)
    assert stage.logged("the server of the active model 'a' is not awake any more")
    assert stage.ask("a") == Answer(200, expected("a"))
    assert not stage.logged("The request is sent once more")


@fault(
    "The engine dies while it answers (`/health` says 503, soon the process ends); managed",
    "an error event to each running stream",
    "WARNING; the requests' spans are errors",
    "the process is ended; the next request starts it",
    MANAGED,
)
def engine_dies_streaming(stage: Stage) -> None:
    with stage.stream("a") as one, stage.stream("a") as two:
        stage.faults("a", "health:1:crash")
        stage.health("a")
        assert (one.rest().end, two.rest().end) == ("error", "error")
    assert one.error
    assert stage.ask("a") == Answer(200, expected("a"))


@fault(
    "The engine dies and its process lives on for a while; server by URL",
    "503 that says so, until the process has ended",
    "WARNING 'the engine has died'",
    "nothing else is woken before its memory is free",
    Setting(sims={"a": {"crash_seconds": 0.7}}),
)
def engine_dies_slowly(stage: Stage) -> None:
    stage.faults("a", "health:1:crash")
    stage.health("a")
    assert stage.ask("a").status == 500  # the server's own answer; it makes the gateway ask
    answer = stage.ask("b")
    assert (answer.status, "the engine has died" in answer.error) == (503, True), answer
    assert stage.logged("the engine has died")
    stage.wait_for_end("a")
    assert stage.ask("b") == Answer(200, expected("b"))
    stage.restart("a", start_asleep=1)


@fault(
    "The engine dies over the `/sleep` call: vLLM never answers it, soon nothing listens, the process stays; managed",
    "200, as soon as nothing listens any more",
    "WARNING 'does not fall asleep any more'",
    "what is left of it is killed; its next request starts it again",
    MANAGED,
)
def engine_dies_over_its_sleep(stage: Stage) -> None:
    stage.faults("a", "sleep:1:wither")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("the model 'a' does not fall asleep any more")
    assert stage.statistics().servers["a"] in ("asleep", "stopped")


@fault(
    "The engine dies over the `/wake_up` call, as above; managed",
    "200, after a restart",
    "WARNING 'ending the process'",
    "a new process serves the model",
    MANAGED,
)
def engine_dies_over_its_wake(stage: Stage) -> None:
    stage.faults("b", "wake:1:wither")
    assert stage.ask("b") == Answer(200, expected("b"))


@fault(
    "The process is killed while it streams",
    "an error event in the stream",
    "WARNING 'broke off'; the request's span is an error",
    "managed: the next request starts it",
    MANAGED,
)
def killed_streaming(stage: Stage) -> None:
    with stage.stream("a") as stream:
        stage.kill("a")
        assert stream.rest().end == "error"
    assert stream.error.startswith("upstream_error") or stream.error.startswith("request_interrupted")
    stage.until_failed_spans("llmux.request", 1)
    assert stage.ask("a") == Answer(200, expected("a"))


@fault(
    "The process is killed before it has begun to answer; `retry: false`",
    "502: whether it was executed is not known",
    "WARNING 'broke off'",
    "managed: the next request starts it",
    Setting(managed="ab", sims={"a": {"prefill_seconds": 0.5}}),
)
def killed_before_the_answer(stage: Stage) -> None:
    first = stage.begin("a")
    stage.until_requests("a", 1)
    stage.kill("a")
    assert first.result().status == 502


@fault(
    "The process is killed before it has begun to answer; `retry: true`",
    "200, after the restart",
    "WARNING 'The request is sent once more'",
    "a new process serves the model",
    Setting(managed="ab", sims={"a": {"prefill_seconds": 0.5}}, config={"a": {"retry": True}}),
)
def killed_before_the_answer_retried(stage: Stage) -> None:
    first = stage.begin("a")
    stage.until_requests("a", 1)
    stage.kill("a")
    assert first.result() == Answer(200, expected("a"))
    assert stage.logged("The request is sent once more")


@fault(
    "A sleeping server's process is killed; managed",
    "200",
    "INFO 'started the process'",
    "a new process serves the model",
    MANAGED,
)
def killed_asleep_managed(stage: Stage) -> None:
    stage.kill("b")
    assert stage.ask("b") == Answer(200, expected("b"))


@fault(
    "A sleeping server's process is killed; server by URL",
    "503 'nothing listens there'; the awake model is not disturbed",
    "ERROR",
    "the awake model goes on; the dead one backs off",
)
def killed_asleep(stage: Stage) -> None:
    stage.kill("b")
    with stage.stream("a", tokens=3000) as stream:
        answer = stage.ask("b")
        assert answer.status == 503
        assert "nothing listens there" in answer.error
        assert stream.rest().end == "done"
    assert stage.statistics().active_model == "a"
    stage.restart("b", start_asleep=1)


@fault(
    "A process is frozen (SIGSTOP) as the outgoing model; managed",
    "200, after `timeouts.sleep` twice",
    "WARNING 'ending the process'",
    "the process is killed",
    Setting(managed="ab", config={"*": {"timeouts": {"sleep": 0.5, "probe": 0.5, "stop": 0.2}}}),
)
def frozen_outgoing(stage: Stage) -> None:
    stage.kill("a", signal.SIGSTOP)
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'a'")


@fault(
    "A process is frozen (SIGSTOP) as the active model; managed; requests give up",
    "504 or 502 to its own requests; then 200",
    "WARNING",
    "as soon as nothing is in flight it is ended and started again",
    Setting(managed="ab", config={"*": {"timeouts": {"probe": 0.5, "stop": 0.2, "read": 0.6}}}),
)
def frozen_active(stage: Stage) -> None:
    stage.kill("a", signal.SIGSTOP)
    assert stage.ask("a").status == 502  # silent for timeouts.read
    assert stage.ask("a") == Answer(200, expected("a"))
    assert stage.logged("ending the process of the model 'a'")


@fault(
    "A sleeping server is frozen and gives no answer; it has said before that it sleeps",
    "200: its confirmed sleep counts",
    "WARNING 'is taken to be asleep still'",
    "as after any switch",
    Setting(models="abc", config={"*": {"timeouts": {"probe": 0.6}}}),
)
def frozen_sleeper(stage: Stage) -> None:
    stage.kill("c", signal.SIGSTOP)
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("the model 'c' was put to sleep and is taken to be asleep still")
    stage.resume("c")


@fault(
    "A sleeping server is restarted by its supervisor, and is awake after it",
    "200",
    "WARNING or nothing: it is put to sleep in the next switch",
    "one model in memory after the next switch",
    Setting(models="abc", sims={"*": {"gpu_memory_mib": 65536}}),
)
def restarted_awake(stage: Stage) -> None:
    stage.restart("c", start_asleep=0)
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.asleep("c")
    stage.allow_two_awake()


@fault(
    "Somebody else wakes a sleeping server while another one is active, and there is room for both",
    "200",
    "one more `sleep` span",
    "it is put to sleep in the next switch",
    Setting(models="abc", sims={"*": {"gpu_memory_mib": 65536}}),
)
def woken_by_hand(stage: Stage) -> None:
    stage.by_hand("c", "/wake_up")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.asleep("c")
    stage.allow_two_awake()


@fault(
    "Several servers are awake at the gateway's start",
    "200",
    "WARNING 'putting the model … to sleep'",
    "one is kept, the one in use or most wanted; the others are put to sleep",
    Setting(models="abc", sims={"*": {"gpu_memory_mib": 65536, "start_asleep": 0}}, warm=False),
)
def several_awake_at_start(stage: Stage) -> None:
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.asleep("a")
    assert stage.asleep("c")
    assert stage.logged("putting the model 'a' to sleep")
    stage.allow_two_awake()
