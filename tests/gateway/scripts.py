"""What the scripted servers answer, and where the gateway finds them."""

from __future__ import annotations

import dataclasses

from llmux_asgi.upstream import Origin
from tests.gateway.conftest import Gateway
from tests.support.eventually import eventually, is_at_rest
from tests.support.upstream import Exchange

__all__ = ["EVENTS", "counts_come_back_to_zero", "echo", "relay_to"]

EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(1000)] + [b"data: [DONE]\n\n"]


def counts_come_back_to_zero(served: Gateway) -> None:
    eventually("nothing is in flight and nobody waits", lambda: is_at_rest(served.app))


def relay_to(served: Gateway, url: str) -> None:
    """Have the requests for `a` sent elsewhere than its control calls, which go on working."""
    targets = served.app._proxy.targets
    targets["a"] = dataclasses.replace(targets["a"], origin=Origin(url))


async def echo(exchange: Exchange) -> None:
    await exchange.start("application/json")
    await exchange.chunk(exchange.body, last=True)
