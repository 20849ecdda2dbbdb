"""What goes wrong in the soak, and when."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter

import httpx

from tests.soak.fleet import BY_URL, MODELS, Fleet
from tests.soak.proc import Identity, identity, marked_processes, send_signal

__all__ = ["Injector"]

_CALLS: dict[str, float] = {
    "sleep:1:fail": 3,
    "sleep:1:hang": 2,
    "sleep:1:delay=0.3": 2,
    "sleep:1:delay=1.4": 2,
    "sleep:1:lie": 2,
    "sleep:1:leak": 0.3,  # each costs the ten seconds that the gateway waits for the memory
    "sleep:1:die": 2,
    "sleep:1:crash": 2,
    "wake:1:fail": 3,
    "wake:1:hang": 2,
    "wake:1:delay=0.3": 2,
    "wake:1:delay=1.4": 2,
    "wake:1:lie": 2,
    "wake:1:oom": 3,
    "wake:1:die": 2,
    "wake:1:crash": 2,
    "reload:1:fail": 2,
    "is_sleeping:1:fail": 2,
    "is_sleeping:2:hang": 1,
    "is_sleeping:1:delay=0.5": 1,
    "is_sleeping:3:die": 1,
    "request:2:fail": 2,
    "request:3:503": 1,
    "request:1:break": 4,
    "request:4:break=0": 2,
    "request:2:stall": 2,
    "request:1:hang": 2,
    "request:2:delay=0.3": 1,
    "request:3:die": 3,
    "request:2:crash": 3,
}
_OTHERS: dict[str, float] = {
    "kill the server": 6,
    "kill the guardian": 4,
    "stop the server": 5,
    "stop the guardian": 2,
    "sleep by hand": 4,
    "wake by hand": 3,
    "end the server in order": 2,
}
_MENDING_SECONDS = 3.0
"""Until the soak, as whoever runs it, restarts a server by URL that keeps its memory."""


class Injector:
    """Commits faults drawn from a seed."""

    def __init__(self, seed: int, fleet: Fleet, gateway: int) -> None:
        self._random = random.Random(f"faults {seed}")
        self._fleet = fleet
        self._gateway = gateway
        self._client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._later: set[asyncio.Task[None]] = set()
        self.committed: Counter[str] = Counter()

    async def commit(self) -> None:
        """Commit one fault, at the first model of a random order whose server runs."""
        kinds = {**_CALLS, **_OTHERS}
        kind = self._random.choices(list(kinds), list(kinds.values()))[0]
        models = [model.name for model in MODELS]
        self._random.shuffle(models)
        seconds = self._random.uniform(0.1, 2.5)
        for model in models:
            if await self._commit(kind, model, seconds):
                self.committed[kind] += 1
                return
        self.committed["(nothing to do it to)"] += 1

    async def _commit(self, kind: str, model: str, seconds: float) -> bool:
        if kind in _CALLS:
            if kind.startswith("reload") and model not in ("deep", BY_URL):
                return False
            done = await self._fleet.add_fault(self._client, model, kind)
            if done and model == BY_URL and kind.endswith("leak"):
                self._do_later(_MENDING_SECONDS, self._fleet.server.pid, signal.SIGKILL)
            return done
        if kind.endswith("by hand"):
            # From level 2 a server that is told to sleep again by hand would hide its level: see the README.
            if model not in ("light", "plain"):
                return False
            path = "/sleep?level=1" if kind.startswith("sleep") else "/wake_up"
            return await self._fleet.call_by_hand(self._client, model, path)
        action, _, role = kind.partition(" the ")
        who = self._find(model, role.partition(" ")[0])
        if who is None:
            return False
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}[action]
        if number is signal.SIGSTOP:
            self._do_later(seconds, who[0], signal.SIGCONT)
        return send_signal(who, number)

    def _find(self, model: str, role: str) -> Identity | None:
        if model == BY_URL:
            return identity(self._fleet.server.pid) if role == "server" else None
        for process in marked_processes(self._gateway):
            if process.role == role and self._fleet.is_server_of(model, process.command):
                return process.identity
        return None

    def _do_later(self, seconds: float, pid: int, number: signal.Signals) -> None:
        who = identity(pid)

        async def run() -> None:
            await asyncio.sleep(seconds)
            if who is not None:
                send_signal(who, number)

        task = asyncio.create_task(run())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def end(self) -> None:
        """Let the last fault pass, and have all servers behave."""
        await asyncio.gather(*self._later)
        await self._fleet.clear_faults(self._client)
        await self._client.aclose()
