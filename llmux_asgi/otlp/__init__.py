"""What records and sends spans, and costs a gateway less. Needs the extra `otlp`.

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
"""

from __future__ import annotations

try:
    from ._exporter import OTLPSpanExporter, encode
    from ._provider import TracerProvider
except ImportError as error:
    raise ImportError(f"llmux_asgi.otlp needs the extra otlp: pip install 'llmux-asgi[otlp]' ({error})") from error

__all__ = ["OTLPSpanExporter", "TracerProvider", "encode"]
