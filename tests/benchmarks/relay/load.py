"""The loads: `python -m tests.benchmarks.relay.load PORT SIZES KIND:CONNECTIONS…` prints a list of `Result` as JSON.

Plain requests and bursts are a closed loop: each connection sends its next request when it has the whole answer to the one
before. Of the slow streams each connection gets one. Every answer is compared with what it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections import Counter
from typing import cast

import msgspec
import uvloop

from tests.benchmarks.relay.processes import busy_seconds, cpu_seconds
from tests.benchmarks.relay.wire import BURST_EVENTS, END, EVENT_SECONDS, Kind, body_of, request

__all__ = ["Result", "Sizes", "main"]

_SPREAD_SECONDS = 1.0
"""The slow streams begin within this time."""
_GRACE_SECONDS = 10.0
"""So much later than due an answer may be complete."""
_QUIET = 0.1
"""Of so much of a core taken by others nothing is thought."""


class Result(msgspec.Struct, frozen=True):
    """What one load found. Times are in seconds."""

    connections: int
    seconds: float
    answers: int
    """Answers that were right."""
    events: int
    lost: int
    """Events of slow streams that did not come."""
    errors: dict[str, int]
    cpu: float
    """Of the candidate, while `seconds` went by."""
    p50: float
    p99: float
    first_p50: float
    """From the request to the first byte of the answer's body."""
    first_p99: float
    others: float
    """Seconds of CPU that processes took, meanwhile, which have no part in this."""

    @property
    def disturbance(self) -> float:
        """What others took, in cores."""
        return self.others / self.seconds


class Sizes(msgspec.Struct, frozen=True):
    """What all loads of one process have in common. Times are in seconds."""

    seconds: float
    warmup: float
    slow_events: int
    tries: int
    upstream_pid: int
    pid: int | None
    """Of the candidate, whose CPU time is measured."""


class Load:
    """What all connections share."""

    def __init__(self, port: int, kind: Kind, sizes: Sizes) -> None:
        self.kind = kind
        self.count = {"plain": 0, "burst": BURST_EVENTS, "slow": sizes.slow_events}[kind]
        self.request = request(kind, port)
        self.body = body_of(kind, self.count)
        self.right = b""
        """The last right body, in whichever transfer coding it came."""
        self.closed_loop = kind != "slow"
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.errors: Counter[str] = Counter()
        self.events = 0
        self.open = True
        self._pid = sizes.pid
        self._upstream_pid = sizes.upstream_pid

    def begin(self) -> None:
        """From now on it counts."""
        self.latencies.clear()
        self.firsts.clear()
        self.events = 0
        self.note_begin()

    def note_begin(self) -> None:
        """From now on time and CPU count."""
        self._begun, self._cpu_begun, self._others_begun = time.perf_counter(), self._cpu(), self._others()

    def end(self) -> None:
        """Up to now it counted."""
        self.seconds, self.cpu = time.perf_counter() - self._begun, self._cpu() - self._cpu_begun
        self.others = self._others() - self._others_begun

    def is_right(self, raw: bytes, chunked: bool) -> bool:
        """Whether a body is what it should be."""
        if not chunked:
            return raw == self.body
        if raw != self.right:
            if joined(raw) != self.body:
                return False
            self.right = raw
        return True

    def result(self, connections: int) -> Result:
        """What was found."""
        return Result(
            connections=connections,
            seconds=self.seconds,
            answers=len(self.latencies),
            events=self.events,
            lost=connections * self.count - self.events if self.kind == "slow" else 0,
            errors=dict(self.errors),
            cpu=self.cpu,
            p50=_quantile(self.latencies, 50),
            p99=_quantile(self.latencies, 99),
            first_p50=_quantile(self.firsts, 50),
            first_p99=_quantile(self.firsts, 99),
            others=self.others,
        )

    def _cpu(self) -> float:
        return cpu_seconds(self._pid) if self._pid is not None else 0.0

    def _others(self) -> float:
        upstream = cpu_seconds(self._upstream_pid) if self._upstream_pid is not None else 0.0
        return busy_seconds() - upstream - self._cpu() - time.process_time()


class Connection(asyncio.Protocol):
    """One connection: sends a request, takes its answer, and again."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._data = b""
        self._parts: list[bytes] = []
        self._first = self._sent = 0.0
        self._head_end = 0
        self._length = self._left = -1
        self._status = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it
        self._send()

    def _send(self) -> None:
        self._data = b""
        self._head_end = 0
        self._sent = time.perf_counter()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        if not self._head_end:
            self._data = data = self._data + data if self._data else data
            if not self._read_head(data):
                return
            data = data[self._head_end :]
            self._data = b""
            self._parts = []
            if not data:
                return
        if not self._parts:
            self._first = time.perf_counter()
        self._parts.append(data)
        if self._length >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._finish(chunked=False)
        elif data.endswith(END) or (len(data) < len(END) and b"".join(self._parts[-6:]).endswith(END)):
            self._finish(chunked=True)

    def _read_head(self, data: bytes) -> bool:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._head_end = end + 4
        head = data[:end].lower()
        self._status = head[9:12]
        place = head.find(b"\r\ncontent-length:")
        self._length = self._left = int(head[place + 17 :].split(b"\r", 1)[0]) if place >= 0 else -1
        return True

    def _finish(self, *, chunked: bool) -> None:
        load = self._load
        raw = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        if load.open:
            if self._status != b"200":
                load.errors[f"status {self._status.decode()}"] += 1
            elif not load.is_right(raw, chunked):
                load.errors["wrong body"] += 1
                load.events += raw.count(b"data: ")
            else:
                load.latencies.append(time.perf_counter() - self._sent)
                load.firsts.append(self._first - self._sent)
                load.events += load.count
        if load.closed_loop and load.open:
            self._send()
        elif not self.done.done():
            self._sent = 0.0
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done.done():
            return
        self.note_unfinished("connection lost")
        self.done.set_result(None)

    def note_unfinished(self, why: str) -> None:
        """An answer that will not become complete."""
        if self._load.open and self._sent:
            self._load.errors[why] += 1
            self._load.events += b"".join(self._parts).count(b"data: ")

    def abort(self) -> None:
        self._transport.abort()


def joined(raw: bytes) -> bytes:
    """A chunked body without its coding; what comes before a fault, if there is one."""
    parts, place = [], 0
    while (end := raw.find(b"\r\n", place)) >= 0:
        try:
            size = int(raw[place:end].split(b";", 1)[0], 16)
        except ValueError:
            break
        parts.append(raw[end + 2 : end + 2 + size])
        place = end + 4 + size
        if size == 0:
            return b"".join(parts)
    return b"".join(parts) + b" (cut)"


def _quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def closed_loop(load: Load, port: int, connections: int, warmup: float, seconds: float) -> None:
    """Keep all connections busy; one that is lost is opened anew."""
    loop = asyncio.get_running_loop()

    async def keep_busy() -> None:
        while load.open:
            try:
                _, connection = await loop.create_connection(lambda: Connection(load), "127.0.0.1", port)
            except OSError:
                load.errors["not connected"] += 1
                await asyncio.sleep(0.1)
                continue
            await connection.done

    tasks = [asyncio.create_task(keep_busy()) for _ in range(connections)]
    await asyncio.sleep(warmup)
    load.begin()
    await asyncio.sleep(seconds)
    load.end()
    load.open = False
    for task in tasks:
        task.cancel()


async def slow_streams(load: Load, port: int, connections: int) -> None:
    """Open all streams within a second and wait for their ends. Time and CPU count from the last beginning to the first end."""
    loop = asyncio.get_running_loop()
    due = EVENT_SECONDS * load.count

    async def one(index: int) -> None:
        await asyncio.sleep(index / connections * _SPREAD_SECONDS)
        try:
            _, connection = await loop.create_connection(lambda: Connection(load), "127.0.0.1", port)
        except OSError:
            load.errors["not connected"] += 1
            return
        try:
            async with asyncio.timeout(due + _GRACE_SECONDS):
                await connection.done
        except TimeoutError:
            connection.note_unfinished("not complete in time")
            connection.abort()

    load.begin()
    tasks = [asyncio.create_task(one(index)) for index in range(connections)]
    await asyncio.sleep(_SPREAD_SECONDS)
    load.note_begin()
    await asyncio.sleep(max(0.1, due - _SPREAD_SECONDS))
    load.end()
    await asyncio.gather(*tasks)
    load.open = False


def run(job: str, port: int, sizes: Sizes) -> Result:
    """Run one load, again if others had too much of the machine; of several tries the least disturbed one counts."""
    kind, _, connections = job.partition(":")
    results = []
    for _ in range(sizes.tries):
        load = Load(port, cast("Kind", kind), sizes)
        if load.closed_loop:
            uvloop.run(closed_loop(load, port, int(connections), sizes.warmup, sizes.seconds))
        else:
            uvloop.run(slow_streams(load, port, int(connections)))
        results.append(load.result(int(connections)))
        gc.collect()
        if results[-1].disturbance <= _QUIET:
            break
    return min(results, key=lambda result: result.disturbance)


def main() -> None:
    """Run some loads, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.load")
    parser.add_argument("port", type=int)
    parser.add_argument("sizes", help="`Sizes` as JSON")
    parser.add_argument("jobs", nargs="+", help="KIND:CONNECTIONS")
    given = parser.parse_args()
    sizes = msgspec.json.decode(given.sizes, type=Sizes)
    gc.disable()  # its pauses would be measured
    results = [run(job, given.port, sizes) for job in given.jobs]
    sys.stdout.buffer.write(msgspec.json.encode(results) + b"\n")


if __name__ == "__main__":
    main()
