"""The gateway's own processes do not come up, or something happens to who guards them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

from llmux_asgi import Phase
from tests.support.serve import free_port

from .matrix import fault
from .stage import Answer, Setting, Stage, expected

PORT = free_port()
B_COLD = Setting(managed="b", warm=False)


def command(code: str) -> dict[str, object]:
    return {"command": [sys.executable, "-c", code, "{port}"]}


@fault(
    "The port of a managed model is taken by another process",
    "503 that says so; other models are served",
    "ERROR 'another one listens there already'",
    "nothing was started; the active model was not put to sleep for good",
    Setting(managed="b", config={"b": {"url": f"http://127.0.0.1:{PORT}"}}, warm=False),
)
def port_taken(stage: Stage) -> None:
    assert stage.ask("a").status == 200
    with socket.create_server(("127.0.0.1", PORT), reuse_port=False):
        answer = stage.ask("b")
    assert answer.status == 503
    assert "another one listens there already" in answer.error
    assert stage.logged("another one listens there already", logging.ERROR)
    assert stage.ask("a").status == 200


@fault(
    "The command ends before the server is ready",
    "503 with its exit status; other models are served",
    "ERROR with it and its last lines; each line at INFO in `llmux_asgi.vllm`",
    "not started again before the back-off is over",
    Setting(
        managed="b",
        config={"b": command("print('loading'); print('ValueError: no such model'); raise SystemExit(3)")},
        warm=False,
    ),
)
def start_crashes(stage: Stage) -> None:
    answer = stage.ask("b")
    assert answer.status == 503
    assert "exit status 3" in answer.error
    assert "ValueError" not in answer.error
    assert stage.logged("ValueError: no such model", logging.ERROR)
    assert stage.logged("[b] loading", logging.INFO)
    stage.checked = "a"


@fault(
    "The command does not get ready",
    "503 after `timeouts.start`",
    "ERROR 'was not ready in', with its last lines",
    "the process is killed, and all that it has started",
    Setting(
        managed="b",
        config={
            "b": {
                **command(
                    "import subprocess, sys, time; print('hanging', flush=True);"
                    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
                    "time.sleep(600)"
                ),
                "timeouts": {"start": 0.7},
            }
        },
        warm=False,
    ),
)
def start_hangs(stage: Stage) -> None:
    answer = stage.ask("b")
    assert answer.status == 503
    assert "was not ready in 0.7 s" in answer.error
    assert "hanging" not in answer.error
    assert stage.logged("hanging", logging.ERROR)
    assert stage.own_processes() == []
    stage.checked = "a"


@fault(
    "The command cannot be run",
    "503 with its exit status",
    "ERROR 'No such file or directory'",
    "as before",
    Setting(managed="b", config={"b": {"command": ["/no/such/vllm", "{port}"]}}, warm=False),
)
def command_not_found(stage: Stage) -> None:
    answer = stage.ask("b")
    assert answer.status == 503
    assert "exit status 127" in answer.error
    assert stage.logged("No such file or directory", logging.ERROR)
    stage.checked = "a"


@fault(
    "There is too little memory for a process that starts: somebody else uses the GPU",
    "503",
    "ERROR 'out of memory', with the server's last lines",
    "other models are served if they fit; started at the next request",
    Setting(managed="ab", warm=False),
)
def start_out_of_memory(stage: Stage) -> None:
    stage.occupy_the_gpu(16384)
    answer = stage.ask("b")
    assert answer.status == 503
    assert stage.logged("CUDA out of memory", logging.ERROR)
    stage.free_the_gpu()


@fault(
    "The engine dies while the server starts",
    "503",
    "ERROR",
    "the process is killed; started at the next request",
    Setting(managed="b", sims={"b": {"faults": ["is_sleeping:1:crash"]}}, warm=False),
)
def engine_dies_at_start(stage: Stage) -> None:
    assert stage.ask("b").status == 503
    assert stage.own_processes() == []
    stage.checked = "a"


@fault(
    "The guardian of a managed process is killed",
    "200: the server has died with it, and is started again",
    "WARNING",
    "nothing of the old process is left",
    Setting(managed="ab"),
)
def guardian_killed(stage: Stage) -> None:
    old = stage.pid("a")
    guardians = [pid for pid in stage.own_processes() if stage.parent(pid) == os.getpid()]
    assert len(guardians) == 2
    for pid in guardians:
        os.kill(pid, signal.SIGKILL)
    stage.until_gone("a")
    assert stage.ask("a") == Answer(200, expected("a"))
    assert old not in stage.own_processes()


@fault(
    "The disk is full, or the handler fails, where the log is written",
    "200",
    "Python's logging says so on standard error",
    "the servers go on: their output is still read",
    Setting(managed="ab"),
)
def log_disk_full(stage: Stage) -> None:
    with stage.full_disk_for_logs():
        stage.kill("a")
        assert stage.ask("a").status == 200
        assert stage.ask("b").status == 200


@fault(
    "The wall clock jumps, by hours, to and fro",
    "200",
    "nothing: durations are measured by the monotonic clock",
    "as before",
    Setting(policy={"min_active_duration": 0.05}),
)
def clock_jumps(stage: Stage) -> None:
    for hours in (+5, -9):
        with stage.wall_clock_off_by(hours * 3600):
            assert stage.ask("b") == Answer(200, expected("b"))
            assert stage.ask("a") == Answer(200, expected("a"))


@fault(
    "The gateway gets SIGTERM or leaves its lifespan while an answer runs",
    "the running answer finishes, within `limits.shutdown`; 503 to waiting and new ones",
    "INFO 'is gone' for each process",
    "all processes are ended",
    Setting(managed="ab"),
)
def shutdown_while_streaming(stage: Stage) -> None:
    with stage.stream("a", tokens=3000) as stream:
        waiting = stage.begin("b")
        stage.until_waiting("b")
        closing = stage.in_background(stage.close_the_gateway)
        answer = waiting.result()
        assert (answer.status, "shutting down" in answer.error) == (503, True), answer
        assert stage.ask("b").status == 503
        assert stream.rest().end == "done"
    closing.result()
    assert stage.own_processes() == []


@fault(
    "The gateway stops and an answer does not end",
    "an error event after `limits.shutdown`",
    "WARNING",
    "all processes are ended",
    Setting(managed="ab", limits={"shutdown": 0.2}),
)
def shutdown_with_an_endless_answer(stage: Stage) -> None:
    with stage.stream("a") as stream:
        closing = stage.in_background(stage.close_the_gateway)
        assert stream.rest().end == "error"
    closing.result()
    assert stage.own_processes() == []


@fault(
    "The gateway stops while a process starts",
    "503 to who waits for it",
    "ERROR; the switch is `failed`",
    "the start is broken off, not waited for; all processes are ended",
    Setting(managed="b", sims={"b": {"start_seconds": 600}}, warm=False),
)
def shutdown_while_starting(stage: Stage) -> None:
    waiting = stage.begin("b")
    stage.until_phase(Phase.WAKE)
    stage.close_the_gateway()
    assert waiting.result().status == 503
    assert stage.logged("to 'b' failed", logging.ERROR)  # ended before it was ready, or stopped before it was started
    assert stage.own_processes() == []
    stage.checked = "a"


@fault(
    "The client of the request that started a process leaves while it starts",
    "nothing: it has gone",
    "INFO 'switched': the start is not broken off",
    "the model is active; the next request finds it awake",
    Setting(managed="b", sims={"b": {"start_seconds": 0.4}}, warm=False),
)
def client_leaves_while_starting(stage: Stage) -> None:
    with stage.client_that_leaves("b") as leave:
        stage.until_phase(Phase.WAKE)
        leave()
    stage.until_active("b")
