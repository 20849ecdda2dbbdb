"""A synchronous client for one vLLM server, real or simulated: control calls, and streams read by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
import msgspec

from tests.support.eventually import eventually

LONG = 900
"""Tokens of a request that is still running when the next control call arrives (the real server's limit is 1024)."""


class Call(threading.Thread):
    """A request sent from a thread of its own, because its answer may not come soon."""

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        super().__init__(daemon=True)
        self._send = send
        self._response: httpx.Response | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._response = self._send()
        except httpx.HTTPError as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self.is_alive()

    def response(self, timeout: float = 30.0) -> httpx.Response:
        self.join(timeout)
        assert not self.is_alive(), "no answer"
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response


class Stream(threading.Thread):
    """One streaming request; `events` grows while it runs. A context manager that hangs up at the end."""

    def __init__(self, client: httpx.Client, path: str, payload: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._client, self._path, self._payload = client, path, payload
        self._changed = threading.Condition()
        self._response: httpx.Response | None = None
        self.status = 0
        self.events: list[dict[str, Any]] = []
        self.closed_with_done = False
        self.error: Exception | None = None
        self.finished = False
        self.start()

    def run(self) -> None:
        try:
            with self._client.stream("POST", self._path, json=self._payload) as response:
                self._response = response
                self.status = response.status_code
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.closed_with_done = True
                    elif line.startswith("data: "):
                        with self._changed:
                            self.events.append(msgspec.json.decode(line[6:]))
                            self._changed.notify_all()
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            self.error = error
        finally:
            with self._changed:
                self.finished = True
                self._changed.notify_all()

    def wait_for_events(self, count: int, timeout: float = 30.0) -> bool:
        """Wait until there are `count` events or the stream has ended; tell whether there are."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.events) >= count or self.finished, timeout)
            return len(self.events) >= count

    def wait_until_quiet(self, quiet: float = 0.2) -> None:
        """Wait until no event comes for `quiet` seconds."""
        while self.wait_for_events(len(self.events) + 1, quiet):
            pass

    def end(self, timeout: float = 30.0) -> Stream:
        self.join(timeout)
        assert not self.is_alive(), "the stream does not end"
        return self

    @property
    def finish_reason(self) -> str | None:
        reasons = [choice.get("finish_reason") for event in self.events for choice in event.get("choices", [])]
        return next((reason for reason in reasons if reason), None)

    @property
    def text(self) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def completion_tokens(self) -> int:
        """As the usage event tells; asks for `usage=True`."""
        return next(int(event["usage"]["completion_tokens"]) for event in self.events if event.get("usage"))


class Driver:
    """Talks to the server at `url` that serves `name`."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # vLLM closes idle ones
        self.client = httpx.Client(base_url=url, timeout=60, limits=limits, trust_env=False)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.client.close()

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, body: object = None, timeout: float = 60) -> httpx.Response:
        return self.client.post(path, json=body, timeout=timeout)

    def post_later(self, path: str, body: object = None) -> Call:
        return Call(lambda: self.post(path, body))

    def sleep(self, query: str = "level=1&mode=abort") -> httpx.Response:
        return self.post(f"/sleep?{query}")

    def wake(self, *tags: str) -> httpx.Response:
        return self.post("/wake_up?" + "&".join(f"tags={tag}" for tag in tags))

    def reload_weights(self) -> httpx.Response:
        return self.post("/collective_rpc", {"method": "reload_weights"})

    def is_sleeping(self) -> bool:
        return bool(self.get("/is_sleeping").json()["is_sleeping"])

    def metric(self, name: str, labels: str = "") -> float | None:
        """The first sample of `name` whose line contains `labels`."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name}{{") and labels in line:
                return float(line.rpartition(" ")[2])
        return None

    def sleep_states(self) -> dict[str, float | None]:
        states = ("awake", "weights_offloaded", "discard_all")
        return {state: self.metric("vllm:engine_sleep_state", f'sleep_state="{state}"') for state in states}

    def payload(self, max_tokens: int, *, prompt: str = "the quick brown fox", chat: bool = False) -> dict[str, Any]:
        source = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return {"model": self.name, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **source}

    def complete(self, max_tokens: int = 12) -> str:
        """The text of a short greedy completion: the same each time while the weights are."""
        response = self.post("/v1/completions", self.payload(max_tokens))
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def stream(self, max_tokens: int = LONG, *, chat: bool = False) -> Stream:
        payload = {**self.payload(max_tokens, chat=chat), "stream": True, "stream_options": {"include_usage": True}}
        return Stream(self.client, "/v1/chat/completions" if chat else "/v1/completions", payload)

    def reset(self) -> None:
        """Awake and idle, whatever was called before: the abort also ends a stuck `mode=wait`, and what it left."""
        self.sleep("level=1&mode=abort")
        self.wake()
        eventually("awake after reset", lambda: not self.is_sleeping())
