"""The gateway with OpenTelemetry's SDK and exporter as they come: what a host has that uses none of `llmux_asgi.otlp`."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from llmux_asgi import LLMuxApp
from tests.benchmarks.relay.apps import gateway

__all__ = ["build"]


def build(upstream: str) -> LLMuxApp:
    """One model, at the URL `upstream`."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{upstream}/v1/traces")))
    return gateway.build(upstream, provider)
