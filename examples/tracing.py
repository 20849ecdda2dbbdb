"""The gateway with its traces sent to Jaeger. Needs `pip install '.[server,yaml,otlp]'`.

    docker compose --file examples/compose.yaml up --detach
    uvicorn --app-dir examples tracing:app

Then open http://localhost:16686 and look for the service `llm-gateway`. The exporter sends to
http://localhost:4318 unless `OTEL_EXPORTER_OTLP_ENDPOINT` says otherwise.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.otlp import OTLPSpanExporter, TracerProvider

# --8<-- [start:provider]
provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "llm-gateway"}))
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
# --8<-- [end:provider]

llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"), tracer_provider=provider)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with llm.lifespan():
        yield
    provider.shutdown()  # sends what is still in the batch


app = Starlette(routes=[Mount("/llm", app=llm)], lifespan=lifespan)
