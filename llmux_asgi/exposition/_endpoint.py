"""What Prometheus asks for: `GET /metrics`.

The gateway's own metrics come from a meter provider of its own, whose one reader is the official exporter. Nothing else of
the host's is in there, and nothing of it has to be set up; a meter provider of the host's gets the same metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from anyio import to_thread
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import Receive, Scope, Send

from .._errors import describe, headers_before_the_body
from .._instruments import FirstByteTimes
from .._target import Target
from ..access import ANY_MODEL, SCOPE_GRANT, Grant, KeyRing, find_credential
from ..config import MetricsConfig
from ..exceptions import AuthenticationError, LLMuxError, PermissionDeniedError
from ..middleware import route_path
from ..upstream import Upstream
from ._first_bytes import first_byte_family
from ._merge import merged
from ._scrape import Scraper

if TYPE_CHECKING:
    from .._openai import Headers

__all__ = ["MetricsEndpoint"]


class MetricsEndpoint:
    """The ASGI app that answers with the metrics. Who asks needs the key, if there is one. Raises `ConfigError`."""

    def __init__(self, config: MetricsConfig) -> None:
        self._config = config
        self._ring = KeyRing("metrics", {"key": config.key}) if config.key is not None else None
        self._registry = CollectorRegistry(auto_describe=False)
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._registry)
        self.provider = MeterProvider([reader], shutdown_on_exit=False, exemplar_filter=AlwaysOffExemplarFilter())
        """What the gateway has to record into."""
        self.first_bytes = FirstByteTimes()
        """The times to first byte, which the provider does not get."""
        self._scraper: Scraper | None = None

    @property
    def has_key(self) -> bool:
        """Whether it guards itself. If not, it is for the access control to say who may ask, if there is one."""
        return self._ring is not None

    def reload_keys(self) -> None:
        """Read the key anew. Raises `ConfigError`, and goes on with the one it had."""
        if self._ring is not None:
            self._ring.reload()

    def scrape(self, targets: Callable[[], Mapping[str, Target]], upstream: Upstream) -> None:
        """Let the metrics of the servers that `targets` returns, by model, be among them, if that is configured."""
        if self._config.backends:
            self._scraper = Scraper(targets, upstream, self._config.timeout)

    def is_asked_for(self, scope: Scope) -> bool:
        """Say whether a connection asks for the metrics."""
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and route_path(scope) == self._config.path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD request."""
        try:
            self._authorize(scope)
        except LLMuxError as exc:
            answer = describe(exc)
            await _send(send, answer.status, headers_before_the_body(answer, scope), answer.body)
            return
        families = [*self._registry.collect(), first_byte_family(self.first_bytes)]
        wanted = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("backends") != ["0"]
        answers = await self._scraper.scrape() if self._scraper is not None and wanted else None
        # Servers write the plain format, and not all that it allows is allowed in OpenMetrics, whose encoder moreover writes
        # the colons of vLLM's names as underscores.
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept") if answers is None else b""
        encode, content_type = choose_encoder(accept.decode("latin-1"))

        def render() -> bytes:
            return encode(_Families([*families, *(merged(answers) if answers is not None else ())]))

        # Those of a server take long to read: the event loop has requests to relay meanwhile.
        body = render() if answers is None else await to_thread.run_sync(render)
        headers = [(b"content-type", content_type.encode("ascii")), (b"content-length", str(len(body)).encode("ascii"))]
        await _send(send, 200, headers, body if scope["method"] == "GET" else b"")

    def _authorize(self, scope: Scope) -> None:
        grant: Grant | None = scope.get(SCOPE_GRANT)
        if self._ring is not None:
            key = find_credential(scope["headers"])
            if key is None:
                raise AuthenticationError("The metrics need a key. Send it as authorization: Bearer KEY, or as x-api-key: KEY.")
            self._ring.refresh(time.monotonic())
            if self._ring.find(key) is None:
                raise AuthenticationError("The key is not the one for the metrics.")
        elif grant is not None and ANY_MODEL not in grant.identity.models:
            message = f"The key {grant.identity.name!r} may not read the metrics: they tell of all models, and it may use some."
            raise PermissionDeniedError(message, code="metrics_not_allowed", param="authorization")


class _Families(Collector):
    """What is to be written down."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


async def _send(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
