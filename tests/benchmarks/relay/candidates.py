"""Who is compared: a small table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.relay.environment import ROUTER_VERSION, nginx, users_python, vllm_router
from tests.benchmarks.relay.processes import free_port

__all__ = ["CANDIDATES", "Candidate", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a candidate runs: its port, the upstream's, and a folder for its files."""

    port: int
    upstream: int
    folder: Path


@dataclass(frozen=True)
class Candidate:
    """`command` raises `Unavailable`. Without one the load goes to the upstream itself."""

    name: str
    what: str
    command: Callable[[Place], list[str]] | None


_NGINX = """\
daemon off;
pid {folder}/pid;
error_log stderr error;
worker_processes 1;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000;
  upstream vllm {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://vllm;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def _nginx(place: Place) -> list[str]:
    program = nginx()
    path = place.folder / "nginx.conf"
    path.write_text(_NGINX.format(folder=place.folder, port=place.port, upstream=place.upstream))
    return [program, "-e", "stderr", "-p", str(place.folder), "-c", str(path)]


def _router(place: Place) -> list[str]:
    # Retries and circuit breaker off, health checks out of the way: it relays, and no more.
    return [
        *(vllm_router(), "--port", str(place.port), "--worker-urls", f"http://127.0.0.1:{place.upstream}"),
        *("--policy", "round_robin", "--log-level", "error", "--disable-retries", "--disable-circuit-breaker"),
        *("--health-check-interval-secs", "3600", "--worker-startup-check-interval", "1"),
        *("--prometheus-port", str(free_port())),
    ]


def _app(name: str) -> Callable[[Place], list[str]]:
    module = "tests.benchmarks.relay.serve"
    return lambda place: [users_python(), "-m", module, name, str(place.port), str(place.upstream)]


_ALL = (
    Candidate("direct", "the load straight to the upstream", None),
    Candidate("nginx", "one worker, keep-alive to the upstream, `proxy_buffering off`", _nginx),
    Candidate("vllm-router", f"{ROUTER_VERSION}, in Rust: round robin, no retries, no circuit breaker", _router),
    Candidate("gateway", "this gateway in full, OpenTelemetry's API without an SDK", _app("gateway")),
    Candidate("gateway-sdk", "the same with the SDK: every span, in batches, by `llmux_asgi.otlp`", _app("gateway_sdk")),
    Candidate("gateway-otel", "the same with OpenTelemetry's SDK and exporter as they come", _app("gateway_otel")),
    Candidate("httpx", "Starlette and `httpx.AsyncClient` as they come", _app("plain_httpx")),
)
CANDIDATES: Mapping[str, Candidate] = {candidate.name: candidate for candidate in _ALL}
