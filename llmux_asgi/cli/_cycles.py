"""Sleep and wake cycles of one server: how long they take, what memory they free, and whether the model stays itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import anyio
import msgspec

from .._memory import MemoryGauge
from ..backends import BackendState, StoppableBackend, api_key_of, build_backend
from ..backends._http import ControlClient
from ..backends._protocol import Backend
from ..backends.probe import FINGERPRINT_TOKENS, say
from ..config import Config
from ..exceptions import BackendError

__all__ = ["Cycle", "Validation", "validate_model"]

_POLL = 0.02
"""Seconds between two looks at the GPU's memory."""


class Cycle(msgspec.Struct, kw_only=True):
    """One sleep and the wake after it. Times are in seconds, memory in MiB; `None`: not known, or not reached."""

    level: int
    cycle: int
    sleep: float | None = None
    wake: float | None = None
    memory_awake: int | None = None
    """In use on the GPU before the sleep, whoever uses it."""
    memory_asleep: int | None = None
    same_answer: bool | None = None
    error: str | None = None


class Validation(msgspec.Struct, kw_only=True):
    """What came of it. `found` and `left` are states as in `BackendState`; `unknown` if there was no clear answer."""

    model: str
    server: str
    passed: bool
    found: str
    left: str
    error: str | None = None
    """Of what came before the cycles, or after them."""
    cycles: list[Cycle] = []


async def validate_model(
    config: Config,
    name: str,
    levels: Sequence[int],
    cycles: int,
    gauge: MemoryGauge | None,
    begun: Callable[[str], None] = lambda step: None,
) -> Validation:
    """Put the server of the model `name` to sleep and wake it, `cycles` times for each level, and leave it as it was found.

    `gauge` reads the GPU, if anything does; `begun` is told each step. The port of a command must be chosen. Raises nothing
    that a server does: the first failure ends the cycles, and is in what is returned. If it is cancelled, the server is left as
    it was found all the same.
    """
    bench = _Bench(config, name, gauge, begun)
    done = Validation(model=name, server=str(bench.backend), passed=False, found="unknown", left="unknown")
    try:
        begun("asking the servers")
        found = await _find(config, name, bench.backend, done)
        if found is None:
            return done
        try:
            if found is not BackendState.AWAKE:
                begun("waking the model")
                await bench.wake()
            done.passed = await _run(bench, done, levels, cycles)
        except BackendError as error:
            done.error = str(error)
        finally:
            begun("leaving the server as it was found")
            with anyio.CancelScope(shield=True):
                await _restore(bench, found, done)
    finally:
        with anyio.CancelScope(shield=True):
            await bench.aclose()
    return done


async def _find(config: Config, name: str, backend: Backend, done: Validation) -> BackendState | None:
    """Ask for the state; `None` if the cycles must not begin, for which the reason is written down."""
    try:
        found = await backend.state()
    except BackendError as error:
        done.error = str(error)
        return None
    done.found = done.left = found.value
    if found is BackendState.UNREACHABLE:
        done.error = f"{backend}: nothing listens there. Is the server running?"
        return None
    if found is not BackendState.AWAKE and (others := await _awake_beside(config, name)):
        done.error = (
            f"{', '.join(others)} may be in the GPU's memory, where {name} would be woken beside it: put that to sleep first"
        )
        return None
    return found


async def _awake_beside(config: Config, name: str) -> list[str]:
    """The other models that are awake, or do not tell. Those that the gateway itself starts do not run."""
    found = []
    for other, model in config.models.items():
        if other == name or model.command is not None:
            continue
        backend = build_backend(other, msgspec.structs.replace(model, probe="none", warm_up=None), sleep_level=1)
        try:
            if await backend.state() is BackendState.AWAKE:
                found.append(other)
        except BackendError:
            found.append(other)
        finally:
            await backend.aclose()
    return found


class _Bench:
    """The server, and what a cycle needs."""

    def __init__(self, config: Config, name: str, gauge: MemoryGauge | None, begun: Callable[[str], None]) -> None:
        model = config.models[name]
        self.begun = begun
        self.level = model.sleep_level or config.policy.sleep_level
        self.backend = build_backend(name, msgspec.structs.replace(model, probe="none", warm_up=None), sleep_level=self.level)
        self.first_answer: str | None = None
        self._served = model.served_name or name
        self._timeouts = model.timeouts
        self._client = ControlClient(
            model.address,
            model.timeouts,
            hint=f"Does it know the model as {self._served!r}, and have /v1/completions? Other models cannot be validated.",
            api_key=api_key_of(name, model),
        )
        self._gauge, self._settle = gauge, config.memory.settle

    async def wake(self) -> None:
        """Wake the server, and return when it takes requests."""
        await self.backend.wake()
        await self.backend.ready()

    async def answer(self) -> str:
        """What the model says to a fixed prompt."""
        said = await say(self._client, self._served, FINGERPRINT_TOKENS, self._timeouts.wake)
        self.first_answer = self.first_answer or said
        return said

    def used(self) -> int | None:
        """Memory in use on the GPU, MiB."""
        return None if self._gauge is None else self._gauge.used_mib()

    async def used_below(self, most: int | None) -> int | None:
        """The same as soon as it is below `most`: the driver may give memory back late. Waits for `memory.settle` at most."""
        with anyio.move_on_after(self._settle):
            while most is not None and (used := self.used()) is not None and used >= most:  # noqa: ASYNC110 (it gives no event)
                await anyio.sleep(_POLL)
        return self.used()

    async def aclose(self) -> None:
        """Close connections, and end a server that the bench has started."""
        await self._client.aclose()
        await self.backend.aclose()


async def _run(bench: _Bench, done: Validation, levels: Sequence[int], cycles: int) -> bool:
    """Run the cycles until one fails. Returns whether none did."""
    for level in levels:
        for number in range(1, cycles + 1):
            cycle = Cycle(level=level, cycle=number)
            done.cycles.append(cycle)
            try:
                await _one(bench, cycle)
            except BackendError as error:
                cycle.error = str(error)
            if cycle.error is not None:
                return False
    return True


async def _one(bench: _Bench, cycle: Cycle) -> None:
    step = f"level {cycle.level}, cycle {cycle.cycle}"
    bench.begun(f"{step}: asking for an answer")
    before = await bench.answer()
    cycle.memory_awake = bench.used()
    bench.begun(f"{step}: putting it to sleep")
    began = time.monotonic()
    await bench.backend.sleep(cycle.level)
    cycle.sleep = time.monotonic() - began
    cycle.memory_asleep = await bench.used_below(cycle.memory_awake)
    bench.begun(f"{step}: waking it")
    began = time.monotonic()
    await bench.wake()
    cycle.wake = time.monotonic() - began
    after = await bench.answer()
    cycle.same_answer = before == after
    if not cycle.same_answer:
        cycle.error = f"the model answers {after[:60]!r} where it answered {before[:60]!r}: its weights have not come back"
    elif cycle.memory_awake is not None and cycle.memory_asleep is not None and cycle.memory_asleep >= cycle.memory_awake:
        cycle.error = f"it frees nothing: {cycle.memory_asleep} MiB of the GPU in use asleep, {cycle.memory_awake} MiB awake"


async def _restore(bench: _Bench, found: BackendState, done: Validation) -> None:
    """Bring the server back to how it was found, with the weights that it had."""
    backend = bench.backend
    broken = any(cycle.same_answer is False for cycle in done.cycles)
    try:
        if found is BackendState.STOPPED and isinstance(backend, StoppableBackend):
            await backend.stop()
        elif broken:
            await backend.sleep(2)  # so that the next wake reads the weights again
        if found is BackendState.AWAKE:
            if await backend.state() is not found:
                await bench.wake()
            if broken and await bench.answer() != bench.first_answer:
                raise BackendError(f"{backend}: its weights have not come back. Start it again")
        elif found is BackendState.ASLEEP and await backend.state() is not found:
            await backend.sleep(bench.level)
        done.left = (await backend.state()).value
    except BackendError as error:
        done.left = "unknown"
        done.error = "; ".join([*([done.error] if done.error else []), f"the server is not as it was found: {error}"])
