"""What another thread or process will have done in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmux_asgi import LLMuxApp

__all__ = ["eventually", "is_at_rest"]


def eventually(what: str, condition: Callable[[], bool], limit: float = 30.0) -> None:
    """Poll until `condition` holds; fail with `what` after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)  # lets the other thread have the interpreter


def is_at_rest(llm: LLMuxApp) -> bool:
    """Say whether every count is zero; a client may see the last byte just before the gateway has returned from sending it."""
    statistics = llm.switcher.statistics()
    counts = (statistics.in_flight, statistics.waiting, statistics.frozen)
    return not any(any(count.values()) for count in counts)
