"""Reads the metrics of the models' servers, all at once and for a limited time. Starts and wakes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio

from .._openai import Headers
from .._target import Target
from ..upstream import Upstream, UpstreamFault

__all__ = ["Scraper"]

logger = logging.getLogger("llmux_asgi.metrics")

_LARGEST = 8 * 1024 * 1024
"""Bytes of one server's answer. vLLM's are some hundred thousand at most."""


class Scraper:
    """Asks the servers that `targets` returns, by model, over `upstream`; each for `timeout` seconds at the longest."""

    def __init__(self, targets: Callable[[], Mapping[str, Target]], upstream: Upstream, timeout: float) -> None:
        self._targets = targets
        self._upstream = upstream
        self._timeout = timeout

    async def scrape(self) -> dict[str, bytes | None]:
        """Return what each server has answered; `None`: it did not, or not in time."""
        targets = self._targets()
        answers: dict[str, bytes | None] = dict.fromkeys(targets)

        async def ask(model: str, target: Target) -> None:
            try:
                with anyio.move_on_after(self._timeout):
                    answers[model] = await self._ask(target)
            except UpstreamFault as exc:
                logger.debug("the server of the model %r does not tell its metrics: it %s", model, exc)

        async with anyio.create_task_group() as tasks:
            for model, target in targets.items():
                tasks.start_soon(ask, model, target)
        return answers

    async def _ask(self, target: Target) -> bytes:
        headers: Headers = [(b"accept", b"text/plain;version=0.0.4"), (b"accept-encoding", b"identity")]
        if target.authorization is not None:
            headers.append((b"authorization", target.authorization))
        path = target.prefix + b"/metrics"
        response = await self._upstream.request(b"GET", target.origin, path, headers, b"", target.timeouts)
        try:
            if response.status != 200:
                raise UpstreamFault(f"answered {response.status}.")
            body = bytearray()
            async for chunk in response:
                body += chunk
                if len(body) > _LARGEST:
                    raise UpstreamFault(f"answered more than {_LARGEST} bytes.")
            return bytes(body)
        finally:
            await response.aclose()
