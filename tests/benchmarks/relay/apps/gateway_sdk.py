"""The gateway with OpenTelemetry's SDK: all spans recorded, sent in batches over OTLP/HTTP to the upstream, as `serve` does."""

from __future__ import annotations

from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmux_asgi import LLMuxApp
from llmux_asgi.otlp import OTLPSpanExporter, TracerProvider
from tests.benchmarks.relay.apps import gateway

__all__ = ["build"]


def build(upstream: str) -> LLMuxApp:
    """One model, at the URL `upstream`."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{upstream}/v1/traces")))
    return gateway.build(upstream, provider)
