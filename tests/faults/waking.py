"""Waking the target goes wrong."""

from __future__ import annotations

import logging

from .matrix import fault
from .stage import Answer, Setting, Stage, expected

MANAGED = Setting(managed="ab")


@fault(
    "`/wake_up` answers 500, once",
    "200",
    "WARNING 'it is tried once more'; the first `wake` span is an error, the switch `completed`",
    "as after any switch",
)
def wake_fails_once(stage: Stage) -> None:
    stage.faults("b", "wake:1:fail")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("waking the model 'b' failed, it is tried once more")
    stage.until_outcomes("completed")
    assert (stage.failed_spans("wake"), len(stage.spans("wake"))) == (1, 2)


@fault(
    "`/wake_up` answers 500, each time; server by URL",
    "503 with `Retry-After`; other models are served",
    "ERROR; switch and `wake` spans are errors",
    "idle, the target asleep; the model backs off",
)
def wake_fails(stage: Stage) -> None:
    stage.faults("b", "wake:1:fail", "wake:2:fail")
    answer = stage.ask("b")
    assert answer.status == 503
    assert answer.retry_after is not None
    assert "POST /wake_up answered 500" in answer.error
    assert stage.logged("switching from 'a' to 'b' failed", logging.ERROR)
    stage.until_outcomes("failed")
    assert stage.failed_spans("wake") == 2
    assert stage.ask("a").status == 200


@fault(
    "`/wake_up` answers 500, each time; managed",
    "200, after a restart",
    "WARNING 'ending the process'; the switch is `completed`",
    "a new process serves the model",
    MANAGED,
)
def wake_fails_managed(stage: Stage) -> None:
    before = stage.pid("b")
    stage.faults("b", "wake:*:fail")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'b'")
    assert stage.pid("b") != before


@fault(
    "Out of memory in the middle of the wake, once: half-woken",
    "200",
    "WARNING 'out of memory'",
    "woken whole: a half-woken server counts neither as awake nor as asleep",
)
def wake_runs_out_of_memory_once(stage: Stage) -> None:
    stage.faults("b", "wake:1:oom")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("CUDA out of memory")


@fault(
    "Out of memory in the middle of the wake, twice; server by URL",
    "503; other models are served",
    "ERROR 'out of memory'",
    "the half-woken server has been woken whole and put to sleep before another model is woken",
)
def wake_runs_out_of_memory(stage: Stage) -> None:
    stage.faults("b", "wake:1:oom", "wake:2:oom")
    assert stage.ask("b").status == 503
    assert stage.logged("CUDA out of memory", logging.ERROR)
    assert stage.ask("a") == Answer(200, expected("a"))


@fault(
    "Out of memory at each wake; managed",
    "200, after a restart",
    "WARNING 'ending the process'",
    "a new process serves the model",
    MANAGED,
)
def wake_runs_out_of_memory_managed(stage: Stage) -> None:
    stage.faults("b", "wake:*:oom")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'b'")


@fault(
    "`/wake_up` hangs; server by URL",
    "503 after `timeouts.wake`",
    "ERROR 'took longer than'",
    "the half-woken server is put to sleep before anything else is woken",
    Setting(config={"b": {"timeouts": {"wake": 0.6}}}),
)
def wake_hangs(stage: Stage) -> None:
    stage.faults("b", "wake:1:hang")
    answer = stage.ask("b")
    assert answer.status == 503
    assert "took longer than 0.6 s" in answer.error
    assert stage.logged("took longer than 0.6 s", logging.ERROR)
    assert stage.ask("a").status == 200


@fault(
    "`/wake_up` hangs; managed",
    "200, after `timeouts.wake` and a restart",
    "WARNING 'ending the process'",
    "a new process serves the model",
    Setting(managed="ab", config={"b": {"timeouts": {"wake": 0.7}}}),
)
def wake_hangs_managed(stage: Stage) -> None:
    stage.faults("b", "wake:*:hang")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("ending the process of the model 'b'")


@fault(
    "`/wake_up` answers 200 and does nothing; server by URL",
    "503 after `timeouts.wake`",
    "ERROR 'waiting for the woken model took longer'; the `ready` span is an error",
    "the target asleep; other models are served",
    Setting(config={"b": {"timeouts": {"wake": 0.7}}}),
)
def wake_lies(stage: Stage) -> None:
    stage.faults("b", "wake:1:lie")
    assert stage.ask("b").status == 503
    assert stage.logged("waiting for the woken model took longer than 0.7 s", logging.ERROR)
    stage.until_outcomes("failed")
    assert stage.failed_spans("ready") == 1
    assert stage.ask("a").status == 200


@fault(
    "The process dies while it is woken; managed",
    "200, after a restart",
    "WARNING 'ending the process'",
    "a new process serves the model",
    MANAGED,
)
def wake_dies_managed(stage: Stage) -> None:
    stage.faults("b", "wake:1:die")
    assert stage.ask("b") == Answer(200, expected("b"))
    stage.until_outcomes("completed")


@fault(
    "The process dies while it is woken; server by URL",
    "503 until its supervisor has restarted it; other models are served",
    "ERROR; the switch is `failed`",
    "`unreachable`, its memory free",
)
def wake_dies(stage: Stage) -> None:
    stage.faults("b", "wake:1:die")
    assert stage.ask("b").status == 503
    assert stage.logged("switching from 'a' to 'b' failed", logging.ERROR)
    assert stage.ask("a").status == 200
    answer = stage.ask("b")
    assert "nothing listens there" in answer.error
    assert stage.statistics().servers["b"] == "unreachable"
    assert stage.statistics().active_model == "a"
    stage.restart("b")


@fault(
    "The weights cannot be read after a level-2 sleep, once",
    "200",
    "WARNING 'it is tried once more'",
    "weights in order: what the model says is compared",
    Setting(policy={"sleep_level": 2}),
)
def reload_fails_once(stage: Stage) -> None:
    stage.faults("b", "reload:1:fail")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("POST /collective_rpc answered 500")


@fault(
    "The weights cannot be read at all (`--load-format dummy`); server by URL",
    "503; other models are served",
    "ERROR 'reload_weights'",
    "the model backs off",
    Setting(policy={"sleep_level": 2}, sims={"b": {"dummy_weights": True, "start_asleep": 2}}, warm=False),
)
def reload_impossible(stage: Stage) -> None:
    assert stage.ask("a").status == 200
    answer = stage.ask("b")
    assert answer.status == 503
    assert "POST /collective_rpc answered 500" in answer.error
    assert stage.logged("POST /collective_rpc answered 500", logging.ERROR)
    stage.checked = "a"


@fault(
    "The weights are lost and nobody has noticed; `probe: fingerprint`",
    "200, after the weights have been read again",
    "WARNING 'its weights have not come back'",
    "weights in order",
    Setting(config={"*": {"probe": "fingerprint"}}, sims={"*": {"gpu_memory_mib": 65536}}),
)
def weights_lost(stage: Stage) -> None:
    stage.allow_two_awake()
    stage.by_hand("b", "/wake_up?tags=weights")
    stage.by_hand("b", "/wake_up?tags=kv_cache")
    stage.by_hand("b", "/sleep?level=2")
    stage.by_hand("b", "/sleep?level=1")
    assert stage.ask("b") == Answer(200, expected("b"))
    assert stage.logged("its weights have not come back")
