"""The requests of the soak, and what is thought of their answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from llmux_asgi.sim import text
from tests.soak.fleet import MODELS, Fleet

__all__ = ["LIMIT", "Judge", "Order", "Outcome", "Plan", "send"]

LIMIT = 30.0
"""Seconds in which every request must be over: twice `request_timeout`, for one that is sent again, and what it takes."""

Outcome = str


@dataclass(frozen=True)
class Order:
    """One request, and the client behind it."""

    number: int
    model: str
    """The name that is asked for: a model, an alias, or something unknown."""
    target: str | None
    """The model that it stands for."""
    chat: bool
    stream: bool
    prompt: str
    tokens: int
    patience: float | None = None
    """Seconds until the client leaves; `None`: it stays."""
    events: int | None = None
    """Chunks of a stream after which the client leaves; `None`: it stays."""
    padding: int = 0
    """Bytes that make the body too large."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.tokens, "stream": self.stream}
        body |= {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return body | {"user": "x" * self.padding} if self.padding else body

    def expected(self) -> str:
        """The whole answer: the simulated server's depends on model and prompt only."""
        prompt = f"user: {self.prompt}\n" if self.chat else self.prompt
        return "".join(text.TOKENS[token] for token in text.sample(str(self.target), prompt, self.tokens))

    def __str__(self) -> str:
        kind = ("chat" if self.chat else "completion") + (", stream" if self.stream else "")
        leaves = ""
        if self.patience is not None:
            leaves = f", leaves after {self.patience:.3f} s"
        elif self.events is not None:
            leaves = f", leaves after {self.events} chunks"
        return f"request {self.number} to {self.model!r} ({kind}, {self.tokens} tokens{leaves})"


class Plan:
    """Draws requests in runs of one model, so long that both numbers are reached together."""

    def __init__(self, seed: int, requests: int, switches: int, switched: Callable[[], int]) -> None:
        self._random = random.Random(seed)
        self._requests, self._switches = requests, switches
        self._switched = switched
        self.issued = 0
        self._run: list[str] = []
        self._last: list[str] = []

    def next(self) -> Order | None:
        """The next request, `None` when both numbers are reached."""
        if self.issued >= self._requests and self._switched() >= self._switches:
            return None
        self.issued += 1
        dice = self._random
        model = target = self._next_model()
        kind, padding, unknown = dice.random(), 0, False
        if kind < 0.01:
            model, target, unknown = f"unknown-{self.issued}", "", True
        elif kind < 0.02:
            padding = 70_000
        elif target == "light" and kind < 0.3:
            model = "lite"
        stream = dice.random() < 0.5
        client, patience, events = dice.random(), None, None
        if not unknown and not padding:
            if client < 0.04:
                patience = dice.uniform(0.005, 0.3)
            elif client < 0.08 and stream:
                events = dice.randint(1, 3)
        tokens = dice.choice((1, 8, 8, 24, 24, 64)) if dice.random() < 0.98 else 400
        return Order(
            self.issued,
            model,
            target or None,
            dice.random() < 0.5,
            stream,
            f"question {dice.randrange(10_000)}: naïve 模型?",
            tokens,
            patience,
            events,
            padding,
        )

    def _next_model(self) -> str:
        if not self._run:
            names = [model.name for model in MODELS if model.name not in self._last]
            shares = [model.share for model in MODELS if model.name not in self._last]
            model = self._random.choices(names, shares)[0]
            self._last = [*self._last[-1:], model]  # two others come before it again, so that each run asks for a switch
            left = max(0, self._requests - self.issued) / max(1, self._switches - self._switched())
            self._run = [model] * max(1, min(50, round(left * self._random.uniform(0.6, 1.4))))
        return self._run.pop()


@dataclass
class Judge:
    """Counts outcomes and collects what must not be."""

    fleet: Fleet
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    paused: int = 0
    """Streams with a comment in them: they were frozen."""

    def note(self, outcome: Outcome, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds.append(seconds)

    def blame(self, order: Order, what: str) -> Outcome:
        self.violations.append(f"{order}: {what}")
        return "VIOLATION"

    def error(self, order: Order, status: int, headers: httpx.Headers, content: bytes) -> Outcome:
        """Judge an answer with an error status."""
        try:
            error = json.loads(content)["error"]
            code = error["code"]
            assert isinstance(error["message"], str)
            assert isinstance(error["type"], str)
            assert "param" in error
        except (ValueError, KeyError, TypeError, AssertionError):
            return self.blame(order, f"{status} without OpenAI's error object: {content[:300]!r}")
        if isinstance(code, int):  # vLLM's own errors have their status as their code
            if (status, code) not in ((500, 500), (503, 503)):
                return self.blame(order, f"a {status} of the server that no fault causes: {content[:300]!r}")
            return f"{status} of the server's own"
        wanted = {404} if order.target is None else {413} if order.padding else {502, 503, 504}
        if status not in wanted:
            return self.blame(order, f"answered {status}: {content[:300]!r}")
        if status in (503, 504) and "retry-after" not in headers:
            return self.blame(order, f"{status} without Retry-After: {content[:300]!r}")
        return f"{status} {code}"

    def whole(self, order: Order, begun: float, content: bytes) -> Outcome:
        """Judge a plain answer with status 200."""
        try:
            choice = json.loads(content)["choices"][0]
            said = choice["message"]["content"] if order.chat else choice["text"]
            reason = choice["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError):
            return self.blame(order, f"200 with something else than an answer: {content[:300]!r}")
        return self._compare(order, begun, said, reason, "whole answer")

    def stream(self, order: Order, begun: float, content: bytes, *, left: bool) -> Outcome:
        """Judge a stream that has ended properly, or that its client has left."""
        said, reason, done = "", None, False
        *parts, rest = content.decode(errors="replace").split("\n\n")
        events = [event for event in parts if not event.startswith(":")]
        self.paused += len(events) < len(parts)
        if rest and not left:
            return self.blame(order, f"the stream ends in the middle of an event: {rest[:300]!r}")
        for event in events:
            data = event.removeprefix("data: ")
            if done:
                return self.blame(order, f"something follows [DONE]: {event[:300]!r}")
            if data == "[DONE]":
                done = True
                continue
            try:
                parsed = json.loads(data)
                if "error" in parsed:
                    if not isinstance(parsed["error"]["message"], str) or not order.expected().startswith(said):
                        return self.blame(order, f"garbage before an error, or no message in it: {said!r} {event[:300]!r}")
                    return "stream ended by an error event"
                choice = parsed["choices"][0]
                said += (choice["delta"].get("content") or "") if order.chat else choice["text"]
                reason = choice["finish_reason"] or reason
            except (ValueError, KeyError, IndexError, TypeError):
                return self.blame(order, f"an event that is none of OpenAI's: {event[:300]!r}")
        if left:
            return "client left" if order.expected().startswith(said) else self.blame(order, f"garbage: {said!r}")
        if not done:
            return self.blame(order, f"the stream ends without [DONE] and without an error: {content[-300:]!r}")
        return self._compare(order, begun, said, reason, "whole stream")

    def _compare(self, order: Order, begun: float, said: str, reason: object, good: Outcome) -> Outcome:
        expected = order.expected()
        if said == expected and reason == "length":
            return good
        if reason in ("abort", None) and expected.startswith(said) and self._was_put_to_sleep_by_hand(order, begun):
            return "aborted by a sleep by hand"
        return self.blame(order, f"200, finish_reason {reason!r}, not the whole answer: {said[:200]!r}, not {expected[:200]!r}")

    def _was_put_to_sleep_by_hand(self, order: Order, begun: float) -> bool:
        return any(
            call.model == order.target and call.path.startswith("/sleep") and call.ended >= begun for call in self.fleet.by_hand
        )


async def send(client: httpx.AsyncClient, order: Order, judge: Judge) -> None:
    """Send one request as its client would, and judge what comes of it."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(LIMIT):
            outcome = await _as_client(client, order, judge, begun)
    except TimeoutError:
        outcome = judge.blame(order, f"was not over in {LIMIT} s")
    judge.note(outcome, time.monotonic() - begun)


async def _as_client(client: httpx.AsyncClient, order: Order, judge: Judge, begun: float) -> Outcome:
    try:
        async with asyncio.timeout(order.patience):
            return await _exchange(client, order, judge, begun)
    except TimeoutError:
        if order.patience is None:
            raise
        return "client left"


async def _exchange(client: httpx.AsyncClient, order: Order, judge: Judge, begun: float) -> Outcome:
    answered = False
    try:
        async with client.stream("POST", order.path, json=order.body()) as response:
            answered = response.status_code == 200
            content, chunks = b"", 0
            async for chunk in response.aiter_raw():
                content += chunk
                chunks += 1
                if answered and order.events is not None and chunks >= order.events:
                    return judge.stream(order, begun, content, left=True)
    except httpx.TransportError as exc:
        if answered and not order.stream:
            return "broken transfer"  # that is how a plain answer which has begun tells of an error
        return judge.blame(order, f"the connection broke after {time.monotonic() - begun:.3f} s: {exc!r}")
    if not answered:
        return judge.error(order, response.status_code, response.headers, content)
    if order.target is None or order.padding:
        return judge.blame(order, f"answered 200: {content[:300]!r}")
    return judge.stream(order, begun, content, left=False) if order.stream else judge.whole(order, begun, content)
