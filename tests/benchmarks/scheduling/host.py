"""The gateway that is measured: `python -m tests.benchmarks.scheduling.host CONFIG.json LOOP`, as `tests.support.host` is run.

`GET /record` answers a `Record`: what the gateway's own spans tell of each request and of the switches.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llmux_asgi import LLMuxApp, PressurePolicy, load_config
from llmux_asgi import _names as names
from llmux_asgi.policy import build_policy
from tests.support.host import build, serve_on_asyncio

__all__ = ["FACTOR", "Record"]

FACTOR = "LLMUX_BENCH_FACTOR"
"""The environment variable with what all times of the configuration have been divided by."""


class Record(msgspec.Struct):
    """Seconds, as the gateway has measured them."""

    waits: dict[str, list[float]]
    """`llmux.queue_time` of each request, by model: from when it came until it was admitted to its awake model."""
    phases: dict[str, float]
    """How long all switches were in each phase."""
    switches: int
    failures: int


class Recorder(SpanProcessor):
    def __init__(self) -> None:
        self.waits: defaultdict[str, list[float]] = defaultdict(list)
        self.phases: defaultdict[str, float] = defaultdict(float)

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes or {}
        if span.name == names.SPAN_REQUEST:
            wait = attributes.get(names.QUEUE_TIME, 0.0)
            if isinstance(wait, float) and attributes.get(names.HTTP_RESPONSE_STATUS_CODE) == 200:
                self.waits[str(attributes[names.MODEL])].append(wait)
        elif span.name != names.SPAN_SWITCH:
            self.phases[span.name] += ((span.end_time or 0) - (span.start_time or 0)) / 1e9


def main() -> None:
    config = load_config(msgspec.json.decode(Path(sys.argv[1]).read_bytes()))
    policy = build_policy(config.policy)
    if isinstance(policy, PressurePolicy):
        policy.base /= float(os.environ[FACTOR])
    recorder, provider = Recorder(), TracerProvider()
    provider.add_span_processor(recorder)
    llm = LLMuxApp(config, policy=policy, tracer_provider=provider)

    async def record(request: Request) -> Response:
        seen = llm.switcher.statistics()
        answer = Record(dict(recorder.waits), dict(recorder.phases), seen.switches, seen.failures)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    app = build(llm)
    app.routes.append(Route("/record", record))
    serve_on_asyncio(app)


if __name__ == "__main__":
    main()
