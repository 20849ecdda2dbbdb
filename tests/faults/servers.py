"""A server that must not, or cannot, be used as it is."""

from __future__ import annotations

import logging

from .matrix import fault
from .stage import Setting, Stage


@fault(
    "`VLLM_SERVER_DEV_MODE=1` forgotten",
    "503 that says how to start it",
    "ERROR with the hint",
    "other models are served",
    Setting(sims={"b": {"dev_mode": False, "gpu": None}}, warm=False),
)
def dev_mode_off(stage: Stage) -> None:
    answer = stage.ask("b")
    assert answer.status == 503
    assert "VLLM_SERVER_DEV_MODE=1" in answer.error
    assert stage.logged("VLLM_SERVER_DEV_MODE=1", logging.ERROR) or stage.logged("VLLM_SERVER_DEV_MODE=1")
    stage.restart("b", dev_mode=True, start_asleep=1)


@fault(
    "A vLLM version that does not free its weights (0.14 to 0.16)",
    "503 that says which version is needed",
    "ERROR with the hint",
    "other models are served once it is replaced or known to be gone",
    Setting(sims={"b": {"version": "0.15.1"}}, warm=False),
)
def wrong_version(stage: Stage) -> None:
    answer = stage.ask("b")
    assert answer.status == 503
    assert "Upgrade it to 0.17 or later" in answer.error
    stage.restart("b", version="0.32.0", start_asleep=1)


@fault(
    "An unreachable host: packets to it are lost",
    "503 after `timeouts.connect`; other models are served",
    "ERROR 'no connection'",
    "its state is unknown; the awake model goes on",
    Setting(config={"b": {"url": "http://192.0.2.1:8000", "timeouts": {"connect": 0.3}}}, warm=False),
)
def host_unreachable(stage: Stage) -> None:
    assert stage.ask("a").status == 200
    answer = stage.ask("b")
    assert answer.status == 503
    assert "192.0.2.1" not in answer.error  # that is for the log
    assert stage.logged("192.0.2.1:8000", logging.ERROR)
    assert stage.ask("a").status == 200
    stage.checked = "a"


@fault(
    "A slow host: the target answers probes after `timeouts.probe`",
    "503 'was not answered in'; the awake model is not disturbed",
    "ERROR 'was not answered in'",
    "as before",
    Setting(config={"b": {"timeouts": {"probe": 0.5}}}),
)
def host_slow(stage: Stage) -> None:
    stage.faults("b", "is_sleeping:*:delay=1.5")
    answer = stage.ask("b")
    assert answer.status == 503
    assert "was not answered in 0.5 s" in answer.error
    assert stage.logged("was not answered in 0.5 s", logging.ERROR)
    assert stage.statistics().active_model == "a"
    stage.mend("b")


@fault(
    "A server that is something else: control calls give malformed answers",
    "503 'no usable answer'",
    "ERROR",
    "its state is unknown; the awake model goes on",
    Setting(config={"b": {"url": "malformed"}}, warm=False),
)
def answers_malformed(stage: Stage) -> None:
    assert stage.ask("a").status == 200
    answer = stage.ask("b")
    assert answer.status == 503
    assert "gave no usable answer" in answer.error
    assert stage.ask("a").status == 200
    stage.checked = "a"


@fault(
    "The server cuts the connection in the middle of a stream",
    "an error event",
    "WARNING 'broke off'; the request's span is an error",
    "all servers are asked; the model goes on",
)
def stream_cut(stage: Stage) -> None:
    stage.faults("a", "request:1:break=5")
    with stage.stream("a") as stream:
        assert stream.rest().end == "error"
    assert stream.error.startswith("upstream_error")
    assert stage.logged("broke off")


@fault(
    "The server falls silent in the middle of a stream",
    "an error event after `timeouts.read`",
    "WARNING 'was silent for'",
    "all servers are asked; the model goes on",
    Setting(config={"a": {"timeouts": {"read": 0.7}}}),
)
def stream_stalls(stage: Stage) -> None:
    stage.faults("a", "request:1:stall=5")
    with stage.stream("a") as stream:
        assert stream.rest().end == "error"
    assert stage.logged("was silent for 0.7 s")


@fault(
    "The server answers a request with 500; `retry: false`",
    "the server's own answer, 500",
    "nothing",
    "all servers are asked; the model goes on",
)
def request_fails(stage: Stage) -> None:
    stage.faults("a", "request:1:fail")
    assert stage.ask("a").status == 500


@fault(
    "The server answers a request with 500; `retry: true`",
    "200",
    "WARNING 'The request is sent once more'",
    "as before",
    Setting(config={"a": {"retry": True}}),
)
def request_fails_retried(stage: Stage) -> None:
    stage.faults("a", "request:1:fail")
    assert stage.ask("a").status == 200
    assert stage.logged("The request is sent once more")
    stage.faults("a", "request:1:fail", "request:2:fail")
    assert stage.ask("a").status == 500
