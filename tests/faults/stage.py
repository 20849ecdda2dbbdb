"""A gateway over real sockets and simulated servers in processes of their own, and the means to break them."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from llmux_asgi import LLMuxApp, Mode, Phase, SwitcherStatistics
from llmux_asgi._process import processes_of
from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess
from llmux_asgi.sim.text import TOKENS, sample
from tests.support.eventually import eventually, is_at_rest
from tests.support.gateway_process import GatewayProcess, gateway_process
from tests.support.serve import EventLoop, serve

from .turns import Turns

__all__ = ["Answer", "Setting", "Stage", "Stream", "expected", "stage_for"]

_FAST = {"start_seconds": 0.0, "sleep_seconds": 0.002, "wake_seconds": 0.002, "crash_seconds": 0.05}
_FAST |= {"sleep_l2_seconds": 0.002, "wake_l2_seconds": 0.002, "tokens_per_second": 2000.0}
_TIMEOUTS = {"sleep": 5, "wake": 5, "probe": 2, "start": 20, "stop": 2, "connect": 2, "read": 10}
T = TypeVar("T")

_PROMPT = "who are you?"
_LIMIT = 20.0


@dataclass(frozen=True)
class Setting:
    """What a fault is played on. `managed` are the models that the gateway starts itself, of `a`, `b` and `c`."""

    models: str = "ab"
    managed: str = ""
    sims: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of the simulated servers, by model; `*` is for all."""
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is added to the configuration of a model; `*` is for all."""
    policy: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    memory_check: bool = False
    turns: bool = False
    """Preempt, and leave it to the test whose turn it is: `Stage.turns`."""
    warm: bool = True
    """Ask every model once before, `a` last."""


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    text: str = ""
    error: str = ""
    """The message of OpenAI's error object, its code in front."""
    retry_after: str | None = None


def expected(model: str, tokens: int = 8) -> str:
    """What a model whose weights are in order says."""
    return "".join(TOKENS[index] for index in sample(model, _PROMPT, tokens))


class Stream:
    """A streamed answer, read as far as the test wants it."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.iter_lines()
        self.status = response.status_code
        self.text = ""
        self.comments = 0
        self.end = ""
        """`done`, `error` (an error event), or `cut` (neither of them)."""
        self.error = ""

    def first(self) -> None:
        """Read until there is text."""
        while not self.text and self._next():
            pass
        assert self.text, self.error

    def rest(self) -> Stream:
        """Read to the end."""
        while self._next():
            pass
        self.end = self.end or "cut"
        return self

    def read_on(self) -> bool:
        """Read one event; returns False at the end."""
        return self._next()

    def _next(self) -> bool:
        try:
            line = next(self._lines)
        except (StopIteration, httpx.HTTPError):
            return False
        data = line.removeprefix("data: ")
        if line.startswith(":"):
            self.comments += 1
        elif data == "[DONE]":
            self.end = self.end or "done"
        elif data:
            event = json.loads(data)
            if "error" in event:
                self.end, self.error = "error", f"{event['error']['code']}: {event['error']['message']}"
            else:
                self.text += event["choices"][0]["text"]
        return True


async def _malformed(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer whatever is asked with something that nobody expects."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>hello</html>"})


class Stage:
    """One gateway and its servers. Made by `stage_for`."""

    def __init__(self, setting: Setting, loop: EventLoop, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.setting = setting
        self.loop = loop
        self.folder = folder
        self.ledger = GpuLedger(folder / "gpu")
        self.sims: dict[str, SimProcess] = {}
        self._caplog = caplog
        self._stack = ExitStack()
        self._spans = InMemorySpanExporter()
        self._pool = ThreadPoolExecutor(32)
        self._requests_asleep = 0
        self._most_awake = 1
        self.checked = setting.models
        """The models that have to answer in the end."""
        self.url = ""
        self.turns = Turns(**self.policy()) if setting.turns else None
        caplog.set_level(logging.INFO)

    def __enter__(self) -> Stage:
        with self._stack:
            stack = self._stack.__enter__()
            limits = httpx.Limits(max_keepalive_connections=0)
            self.client = stack.enter_context(httpx.Client(timeout=_LIMIT, limits=limits, verify=False))  # noqa: S501 (http only)
            self._start_servers(stack)
            tracer_provider = TracerProvider(shutdown_on_exit=False)
            tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
            memory = self.ledger if self.setting.memory_check else None
            self.llm = LLMuxApp(self.configuration(), tracer_provider=tracer_provider, policy=self.turns, memory=memory)

            async def close(request: Request) -> Response:
                await self.llm.aclose()
                return Response()

            routes = [Mount("/llm", self.llm), Route("/close", close, methods=["POST"])]
            app = Starlette(routes=routes, lifespan=self.llm.lifespan)
            self.url = stack.enter_context(serve(app, self.loop)) + "/llm/v1"
            if self.setting.warm:
                for model in reversed(self.setting.models):
                    # The limits of some faults are tight, and the machine may be slow.
                    eventually(f"{model} answers", lambda model=model: self.ask(model).status == 200)  # type: ignore[misc]
            self._caplog.clear()
            self._spans.clear()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._pool.shutdown()

    # Servers

    def options(self, model: str) -> dict[str, Any]:
        asleep = {} if model in self.setting.managed or model == "a" else {"start_asleep": 1}
        own = {**self.setting.sims.get("*", {}), **self.setting.sims.get(model, {})}
        return {"name": model, "gpu": str(self.folder / "gpu"), **_FAST, **asleep, **own}

    def _start_servers(self, stack: ExitStack) -> None:
        for model in self.setting.models:
            if model not in self.setting.managed:
                sim = self.sims[model] = SimProcess(msgspec.convert(self.options(model), SimOptions))
                stack.callback(sim.kill)
        for sim in self.sims.values():
            sim.wait_ready()

    def restart(self, model: str, **options: Any) -> None:
        """Start the server of a model again, at the same address, as its supervisor would."""
        port = int(self.sims[model].url.rpartition(":")[2])
        self.sims[model].kill()
        merged = {**self.options(model), "port": port, "faults": (), **options}
        sim = self.sims[model] = SimProcess(msgspec.convert(merged, SimOptions))
        self._stack.callback(sim.kill)
        sim.wait_ready()

    def policy(self) -> dict[str, Any]:
        """The section `policy` of the configuration."""
        preempts = {"drain": "preempt"} if self.setting.turns else {}
        return {"min_active_duration": 0, "request_timeout": 20, **preempts, **self.setting.policy}

    def configuration(self) -> dict[str, Any]:
        """The gateway's configuration."""
        models = {}
        for model in self.setting.models:
            if model in self.setting.managed:
                options = json.dumps(self.options(model))[:-1] + ', "port": {port}}'
                server: dict[str, Any] = {"command": [sys.executable, "-m", "llmux_asgi.sim", options]}
            else:
                server = {"url": self.sims[model].url}
            own = {**self.setting.config.get("*", {}), **self.setting.config.get(model, {})}
            if own.get("url") == "malformed":
                own["url"] = self._stack.enter_context(serve(_malformed))
            timeouts = {**_TIMEOUTS, **own.pop("timeouts", {})}
            models[model] = {**server, "timeouts": timeouts, **own}
        return {
            "models": models,
            "policy": {"name": "fifo", **self.policy()},
            "limits": {"backoff_initial": 0, "backoff_max": 0, "health_interval": None, "shutdown": 5, **self.setting.limits},
            "memory": {"settle": 0.3},
        }

    def address(self, model: str) -> str:
        return self.llm.config.models[model].address

    def pid(self, model: str) -> int:
        """The process that listens for a model."""
        return int(self.client.get(self.address(model) + "/sim/state").json()["pid"])

    def kill(self, model: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the server's process; if it kills, wait until its memory is free."""
        pid = self.pid(model)
        os.kill(pid, number)
        if number == signal.SIGKILL:
            self.until_gone(model)

    def until_gone(self, model: str) -> None:
        """Wait until nothing listens for a model: a killed process closes its socket when its last thread has ended."""
        host, port = self.address(model).removeprefix("http://").split(":")

        def is_refused() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) == errno.ECONNREFUSED

        eventually("nothing listens", is_refused)

    def faults(self, model: str, *specs: str) -> None:
        """Have the server of a model go wrong."""
        self.client.post(self.address(model) + "/sim/faults", json={"faults": specs}).raise_for_status()

    def mend(self, model: str) -> None:
        """Have the server of a model behave."""
        self.client.delete(self.address(model) + "/sim/faults").raise_for_status()

    def resume(self, model: str) -> None:
        """Thaw a frozen server."""
        os.kill(self.sims[model].pid, signal.SIGCONT)

    def health(self, model: str) -> int:
        """Ask the server for its health, past the gateway."""
        try:
            return self.client.get(self.address(model) + "/health").status_code
        except httpx.HTTPError:
            return 0

    def asleep(self, model: str) -> bool:
        """What the server says, asked past the gateway."""
        return bool(self.client.get(self.address(model) + "/is_sleeping").json()["is_sleeping"])

    def wait_for_end(self, model: str) -> None:
        """Wait until the process of a server has ended by itself."""
        self.sims[model].wait()

    def until_requests(self, model: str, count: int) -> None:
        """Wait until `count` requests have reached the server since its start, beside those of the warm-up."""
        url = self.address(model) + "/sim/state"
        eventually(f"{count} requests at {model}", lambda: self.client.get(url).json()["in_flight"] >= count)

    def own_processes(self) -> list[int]:
        """The processes that the gateway has started, guardians included."""
        return processes_of(os.getpid())

    def parent(self, pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def occupy_the_gpu(self, mib: int) -> None:
        """Have somebody else use memory of the GPU: this process."""
        GpuLedger(self.folder / "gpu", model="somebody else").allocate("context", mib)

    def free_the_gpu(self) -> None:
        GpuLedger(self.folder / "gpu", model="somebody else").release()

    def by_hand(self, model: str, call: str) -> None:
        """Send a control call past the gateway."""
        self.client.post(self.address(model) + call, timeout=_LIMIT).raise_for_status()

    # Clients

    def ask(self, model: str, tokens: int = 8, **options: Any) -> Answer:
        """Send a request and wait for its answer."""
        body = {"model": model, "prompt": _PROMPT, "max_tokens": tokens, **options}
        try:
            response = self.client.post(self.url + "/completions", json=body)
        except httpx.HTTPError as exc:
            return Answer(0, error=repr(exc))
        if response.status_code == 200:
            return Answer(200, response.json()["choices"][0]["text"])
        error = response.json()["error"]
        return Answer(response.status_code, "", f"{error['code']}: {error['message']}", response.headers.get("retry-after"))

    def in_background(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` beside the test."""
        return self._pool.submit(function)

    def at_once(self, model: str, count: int) -> list[tuple[int, str]]:
        """Send `count` requests at once; returns status and `Retry-After` of each."""

        async def ask(client: httpx.AsyncClient) -> tuple[int, str]:
            body = {"model": model, "prompt": _PROMPT, "max_tokens": 1}
            response = await client.post(self.url + "/completions", json=body)
            return response.status_code, response.headers.get("retry-after", "")

        async def run() -> list[tuple[int, str]]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=_LIMIT, limits=limits) as client:
                return await asyncio.gather(*(ask(client) for _ in range(count)))

        return asyncio.run(run())

    def begin(self, model: str, tokens: int = 8) -> Future[Answer]:
        """Send a request and go on; the answer comes later."""
        return self._pool.submit(self.ask, model, tokens)

    @contextmanager
    def stream(self, model: str, tokens: int = 100_000) -> Iterator[Stream]:
        """Send a request for a stream. Its text has begun when the block is entered; leaving the block hangs up."""
        body = {"model": model, "prompt": _PROMPT, "max_tokens": tokens, "stream": True}
        with self.client.stream("POST", self.url + "/completions", json=body) as response:
            stream = Stream(response)
            stream.first()
            yield stream

    @contextmanager
    def client_that_leaves(self, model: str) -> Iterator[Callable[[], None]]:
        """Send a request; the function that is yielded hangs up."""
        body = json.dumps({"model": model, "prompt": _PROMPT}).encode()
        host, port = self.url.removeprefix("http://").partition("/")[0].split(":")
        head = f"POST /llm/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            yield connection.close

    # The gateway

    def close_the_gateway(self) -> None:
        """Do what its host's lifespan does at the end."""
        self.client.post(self.url.removesuffix("/llm/v1") + "/close", timeout=_LIMIT).raise_for_status()

    @contextmanager
    def another_gateway(self) -> Iterator[GatewayProcess]:
        """A gateway over the same servers, in a process of its own."""
        with gateway_process(self.configuration(), self.loop) as gateway:
            yield gateway

    @contextmanager
    def through(self, gateway: GatewayProcess) -> Iterator[None]:
        """Have the clients use another gateway."""
        url, self.url = self.url, gateway.url + "/llm/v1"
        try:
            yield
        finally:
            self.url = url

    @contextmanager
    def full_disk_for_logs(self) -> Iterator[None]:
        """Log to a device on which nothing can be written."""
        handler = logging.FileHandler("/dev/full")
        errors, logging.raiseExceptions = logging.raiseExceptions, False
        logging.getLogger("llmux_asgi").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("llmux_asgi").removeHandler(handler)
            with suppress(OSError):
                handler.close()
            logging.raiseExceptions = errors

    @contextmanager
    def wall_clock_off_by(self, seconds: float) -> Iterator[None]:
        """Have `time.time` jump, for the gateway and all else in this process."""
        real = time.time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + seconds)
            yield

    # What is to be seen

    def statistics(self) -> SwitcherStatistics:
        return self.llm.switcher.statistics()

    def until_mode(self, mode: Mode) -> None:
        eventually(f"mode {mode.value}", lambda: self.statistics().mode is mode)

    def until_phase(self, phase: Phase) -> None:
        eventually(f"phase {phase.value}", lambda: self.statistics().phase is phase)

    def until_active(self, model: str) -> None:
        eventually(f"{model} is active", lambda: self.statistics().active_model == model)
        self.until_mode(Mode.ACTIVE)

    def until_waiting(self, model: str, count: int = 1) -> None:
        eventually(f"{count} wait for {model}", lambda: self.statistics().waiting[model] == count)

    def until_in_flight(self, model: str, count: int) -> None:
        eventually(f"{count} in flight at {model}", lambda: self.statistics().in_flight[model] == count)

    def until_frozen(self, model: str, count: int) -> None:
        eventually(f"{count} frozen of {model}", lambda: self.statistics().frozen[model] == count)

    def until_forgotten(self, model: str) -> None:
        """Wait until the server has no request any more: it has seen that its clients are gone."""
        url = self.address(model) + "/sim/state"
        eventually(f"nothing is left at {model}", lambda: self.client.get(url).json()["in_flight"] == 0)

    def logged(self, text: str, level: int = logging.WARNING) -> bool:
        """Whether a line at `level` has `text`."""
        return any(r.levelno == level and text in r.getMessage() for r in list(self._caplog.records))

    def spans(self, name: str) -> list[ReadableSpan]:
        """The finished spans of a name."""
        return [span for span in self._spans.get_finished_spans() if span.name == name]

    def failed_spans(self, name: str) -> int:
        return sum(not span.status.is_ok for span in self.spans(name))

    def until_failed_spans(self, name: str, count: int) -> None:
        """A client may have its last byte just before the span has ended."""
        eventually(f"{count} failed spans {name}", lambda: self.failed_spans(name) == count)

    def until_outcomes(self, *outcomes: str) -> None:
        """Wait until the switches have ended, as they should. A client may know before the servers have been asked again."""

        def seen() -> list[object]:
            return [(span.attributes or {}).get("llmux.switch.outcome") for span in self.spans("llmux.switch")]

        eventually(f"switches end as {outcomes}", lambda: len(seen()) >= len(outcomes))
        assert seen() == list(outcomes)

    def count_logged(self, text: str, level: int) -> int:
        return sum(r.levelno == level and text in r.getMessage() for r in list(self._caplog.records))

    def expect_requests_asleep(self, count: int) -> None:
        """At most so many requests may reach a sleeper: somebody else has put it to sleep behind the gateway's back."""
        self._requests_asleep = count

    def allow_two_awake(self) -> None:
        """There is room for it, and it is not the gateway that has woken them."""
        self._most_awake = 3

    def check(self) -> None:
        """Every model answers in full, nothing is counted any more, never were two in memory, none was asked in its sleep."""
        for model in self.checked:
            answer = self.ask(model)
            assert answer == Answer(200, expected(model)), answer
        eventually("all counts are zero", lambda: self.is_at_rest())
        events = self.ledger.events()
        assert max(len(event.awake) for event in events) <= self._most_awake, [e for e in events if len(e.awake) > 1]
        asleep = [event for event in events if event.event == "request_while_asleep"]
        assert len(asleep) <= self._requests_asleep, asleep

    def is_at_rest(self) -> bool:
        return is_at_rest(self.llm)


@contextmanager
def stage_for(setting: Setting, loop: EventLoop, folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Stage]:
    """Set the stage; afterwards no process of it may be left."""
    with Stage(setting, loop, folder, caplog) as stage:
        yield stage
    assert processes_of(os.getpid()) == []
