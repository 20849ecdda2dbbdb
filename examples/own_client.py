"""Requests that go to the servers over a transport of httpx. Run it with `uvicorn --app-dir examples own_client:app`."""

import ssl
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import HttpxUpstream, LLMuxApp

# --8<-- [start:client]
context = ssl.create_default_context()
# context.load_cert_chain("client.pem")  # what servers behind mutual TLS ask for
transport = httpx.AsyncHTTPTransport(verify=context, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"), upstream=HttpxUpstream(transport))
# --8<-- [end:client]

app = Starlette(routes=[Mount("/llm", app=llm)], lifespan=llm.lifespan)
