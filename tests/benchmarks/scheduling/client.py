"""The load's clients: they send by the clock, whatever has become of the requests before, and tell how late they were.

They speak plain HTTP/1.1, one connection a request, for the machine's two cores belong to the gateway.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from llmux_asgi.simulate import Arrival, Script, Workload

__all__ = ["Observed", "play"]

LIMIT = 300.0
"""Real seconds within which a run has to end."""


@dataclass
class Observed:
    """What the clients saw of a run, in real seconds."""

    answered: int = 0
    late: float = 0.0
    """The most that a request was sent after its time."""
    seconds: float = 0.0
    """From the first request to the last answer."""


async def play(workload: Workload, url: str, factor: float, tokens_per_second: float) -> Observed:
    """Send the load to the gateway at `url`, all its times divided by `factor`.

    Raises `RuntimeError` for an answer other than 200, `TimeoutError` if it does not end.
    """
    observed = Observed()
    address = urlsplit(url)
    begun = time.perf_counter()

    async def one(arrival: Arrival, due: float) -> None:
        tokens = max(1, round(arrival.service / factor * tokens_per_second))
        body = json.dumps({"model": arrival.model, "prompt": "x", "max_tokens": tokens}).encode()
        head = f"POST {address.path}/v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        await asyncio.sleep(due - time.perf_counter())
        observed.late = max(observed.late, time.perf_counter() - due)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(head.encode() + body)
            answer = await reader.read()
        finally:
            writer.close()
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"{workload.name}: {answer[:500]!r}")
        observed.answered += 1

    async def follow(script: Script) -> None:
        start = begun + script.start / factor
        for arrivals in script.rounds:
            async with asyncio.TaskGroup() as tasks:
                for arrival in arrivals:
                    tasks.create_task(one(arrival, start + arrival.offset / factor))
            start = time.perf_counter() + script.pause / factor

    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as tasks:
        for script in workload.scripts:
            tasks.create_task(follow(script))
    observed.seconds = time.perf_counter() - begun
    return observed
