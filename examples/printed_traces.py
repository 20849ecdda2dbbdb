"""The gateway, mounted at /llm, with a line on standard output for each span. Needs `pip install '.[cli,otlp]'`.

uvicorn --app-dir examples printed_traces:app

It reads `llmux.yaml` in the working folder. Real hosts send their spans to a collector: see tracing.py.
"""

import os
import sys

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp


def line(span: ReadableSpan) -> str:
    """One span: its name, how long it took, and what is known of it."""
    seconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e9
    known = span.attributes or {}
    keys = ("llmux.switch.from", "llmux.switch.to", "llmux.switch.waiting", "llmux.switch.outcome", "llmux.model")
    told = [f"{key.rpartition('.')[2]}={known[key]!s}" for key in keys if key in known]
    return f"{span.name:13} {seconds:6.2f} s  {' '.join(told)}".rstrip() + os.linesep


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stdout, formatter=line)))

llm = LLMuxApp("llmux.yaml", tracer_provider=provider)
app = Starlette(routes=[Mount("/llm", app=llm)], lifespan=llm.lifespan)
