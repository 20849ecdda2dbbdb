"""The gateway as it is mounted: body read, name found, lease, span, relay with a watch for disconnects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmux_asgi import LLMuxApp
from tests.benchmarks.relay.wire import MODEL

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["build"]


def build(upstream: str, tracer_provider: TracerProvider | None = None) -> LLMuxApp:
    """One model, at the URL `upstream`."""
    return LLMuxApp({"models": {MODEL: {"url": upstream}}}, tracer_provider=tracer_provider)
