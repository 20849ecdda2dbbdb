"""Where `llmux-asgi serve` sends its spans: what OpenTelemetry's environment variables say."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from opentelemetry import trace

if TYPE_CHECKING:
    from ..otlp import TracerProvider

__all__ = ["tracer_provider"]

logger = logging.getLogger(__name__)

_SERVICE = "llmux-asgi"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_BY_ITSELF = "serve does that by itself only over OTLP/HTTP; `opentelemetry-instrument llmux-asgi serve` can do more"


def tracer_provider() -> TracerProvider | None:
    """Return what records the spans and sends them, `None` if nobody asks for it or somebody else does it.

    What cannot be done is logged, and the gateway serves all the same. The provider sends what is left when the process ends.
    Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
    """
    exporter = _variable("OTEL_TRACES_EXPORTER")
    if _variable("OTEL_SDK_DISABLED").lower() == "true" or exporter == "none":
        return None
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None  # of `opentelemetry-instrument`, for one; the gateway uses it
    endpoint = next((name for name in _ENDPOINTS if _variable(name)), None)
    if not (exporter or endpoint):
        return None
    protocol = next((value for name in _PROTOCOLS if (value := _variable(name))), "http/protobuf")
    if exporter not in ("", "otlp"):
        logger.warning("spans are not sent: OTEL_TRACES_EXPORTER is %s; %s", exporter, _BY_ITSELF)
    elif protocol != "http/protobuf":
        logger.warning("spans are not sent: the protocol is to be %s; %s", protocol, _BY_ITSELF)
    else:
        try:
            return _provider()
        except ImportError:
            asked = endpoint or "OTEL_TRACES_EXPORTER"
            logger.warning("spans are not sent, although %s is set: pip install 'llmux-asgi[otlp]'", asked)
    return None


def _provider() -> TracerProvider:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from ..otlp import OTLPSpanExporter, TracerProvider

    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):  # the environment names none
        resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()
