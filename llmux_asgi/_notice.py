"""Signs of life in the stream of a request that waits for its model, so that nothing on the way takes it for dead.

The first one commits the answer to status 200 and server-sent events. So it comes only when the request has waited for a while,
and what turns out later to be another answer is told in the stream, as an error event of the client's API.

Events are of a shape that OpenAI's and Anthropic's own clients pass over or show: comments, `ping` of Anthropic's Messages, and
on chat the field that carries a model's reasoning, which llama-swap uses for it too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import msgspec
from starlette.types import Message, Send

from ._errors import describe
from ._forecast import Progress
from ._openai import AnswerHead, Headers
from ._routes import RESPONSES, ErrorShape, Route
from ._spawn import Later
from .config import LoadingNotice
from .exceptions import UpstreamError

__all__ = ["Notice", "Notices"]

logger = logging.getLogger(__name__)

_CHAT = "/v1/chat/completions"
_MESSAGES = "/v1/messages"
_ROUTES = frozenset({_CHAT, "/v1/completions", RESPONSES, _MESSAGES})
"""Those that answer by server-sent events if they are asked to."""
_HEAD: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the notices to itself
]
_LONGEST_REFUSAL = 64 * 1024
"""Bytes of an answer that are looked at to find the error in it."""
_IN_WORDS = {
    "queued": "other models are being served",
    "cooldown": "its turn is next",
    "drain": "running requests of another model finish",
    "sleep": "another model is put to sleep",
    "wake": "it is being loaded",
    "ready": "it is being checked",
}


@dataclass(frozen=True, slots=True)
class Notices:
    """Which requests get notices, and how."""

    kind: LoadingNotice
    interval: float
    """Seconds until the first one, and between two."""

    def fit(self, route: Route) -> bool:
        """Whether the requests of a route get them, those that ask for a stream."""
        return self.kind != "none" and route.path in _ROUTES


class Notice:
    """The notices of one request. `start` when it begins to wait, `stop` when it is over.

    `send` takes the place of `wire` for the request's answer, whatever that is. `progress` says how far things are,
    `more_headers` what else belongs into the answer's head.
    """

    __slots__ = (
        "_began",
        "_beginning",
        "_head",
        "_later",
        "_model",
        "_notices",
        "_on_its_way",
        "_passes",
        "_progress",
        "_refusal",
        "_route",
        "_status",
        "_stopped",
        "_wire",
    )

    def __init__(
        self,
        notices: Notices,
        route: Route,
        model: str,
        wire: Send,
        progress: Callable[[], Progress],
        more_headers: Callable[[], Headers] = list,
    ) -> None:
        self._notices = notices
        self._route = route
        self._model = model
        self._wire = wire
        self._progress = progress
        self._head = more_headers
        self._beginning = time.monotonic()
        self._began = False
        """Whether the client has the head of an answer."""
        self._stopped = False
        self._later: Later | None = None
        self._on_its_way: anyio.Event | None = None
        """Set when the notice that is being sent is out."""
        self._passes = True
        """Whether the answer goes on as it comes."""
        self._status = 0
        self._refusal = b""

    def start(self) -> None:
        """The request waits from now on."""
        if self._later is None:
            self._stopped = False
            self._later = Later(self._run, self._notices.interval)

    def admitted(self) -> None:
        """It waits no more. If notices were sent they go on until its answer begins: a prompt may take its time."""
        if not self._began:
            self.stop()

    def stop(self) -> None:
        """Send no more of them. Never waits, and may be called again."""
        self._stopped = True
        if self._later is not None:
            self._later.stop()
            self._later = None

    def send(self, message: Message) -> Awaitable[None]:
        """Send a message of the request's answer."""
        if self._later is None and not self._began:
            return self._wire(message)
        return self._wire(message) if self._passes and self._later is None else self._translate(message)

    async def _run(self) -> None:
        """Send notices, each whole: the answer waits for one that is on its way."""
        while not self._stopped:
            self._on_its_way = on_its_way = anyio.Event()
            try:
                if not self._began:
                    self._began = True
                    await self._wire({"type": "http.response.start", "status": 200, "headers": [*_HEAD, *self._head()]})
                await self._wire({"type": "http.response.body", "body": self._text(), "more_body": True})
            except Exception as exc:  # noqa: BLE001 - whatever a server raises for a client that has left: its `receive` tells
                logger.debug("a notice could not be sent: %r", exc)
                return
            finally:
                self._on_its_way = None
                on_its_way.set()
            await anyio.sleep(self._notices.interval)

    async def _translate(self, message: Message) -> None:
        while self._on_its_way is not None:
            await self._on_its_way.wait()
        self.stop()
        if not self._began:
            await self._wire(message)
        elif message["type"] == "http.response.start":
            self._status = message["status"]
            self._passes = self._status == 200 and _is_stream(message.get("headers", []))
        elif message["type"] != "http.response.body" or self._passes:
            await self._wire(message)
        else:
            self._refusal = (self._refusal + message.get("body", b""))[: _LONGEST_REFUSAL + 1]
            if not message.get("more_body", False):
                if self._status < 400:
                    logger.warning("the server of the model %r was asked for a stream and answered without one", self._model)
                event = _error_event(self._refusal, self._status, self._model, self._route.errors)
                await self._wire({"type": "http.response.body", "body": event, "more_body": False})

    def _text(self) -> bytes:
        progress, waited = self._progress(), round(time.monotonic() - self._beginning, 1)
        facts = {"model": self._model, "waited": waited, "state": progress.state, "expected": round(progress.expected, 1)}
        if self._notices.kind == "events" and self._route.path == _MESSAGES:
            return b"event: ping\ndata: " + msgspec.json.encode({"type": "ping", "llmux": facts}) + b"\n\n"
        if self._notices.kind == "events" and self._route.path == _CHAT:
            words = _IN_WORDS.get(progress.state, progress.state)
            text = f"Waiting for {self._model} ({waited:.0f} s so far): {words}. About {progress.expected:.0f} s to go.\n"
            chunk = {
                "id": "llmux-notice",
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": self._model,
                "choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}],
                "llmux": facts,
            }
            return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        return b": llmux " + msgspec.json.encode(facts) + b"\n\n"


def _is_stream(headers: Headers) -> bool:
    return AnswerHead.of(headers).is_events


def _error_event(body: bytes, status: int, model: str, shape: ErrorShape) -> bytes:
    """Return the event that tells of an answer which is no stream: the error in it, or that there is none."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict) or status < 400:
        content = {}
    # Old versions of vLLM have the fields of the error where others have the error.
    error = content.get("error", content if content.get("object") == "error" else None)
    if isinstance(error, dict):
        data = msgspec.json.encode({"type": "error", "error": error} if shape == "anthropic" else {"error": error})
    else:
        data = describe(UpstreamError(model, f"answered {status}, and not by a stream of events."), shape).body
    return (b"event: error\n" if shape == "anthropic" else b"") + b"data: " + data + b"\n\n"
