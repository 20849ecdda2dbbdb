"""Passes models over from one server to another, after the configuration was read anew, and lets go of those that are gone.

What a new configuration says holds at once; this is about the servers. A model whose server is to be replaced is *shut*: its
new requests wait, and those that the old server has begun go on. When none is left, the old server is confirmed out of memory
and closed, and the new one takes its place. A model that was removed goes on serving those who run or wait, then its server
goes in the same way. A server comes in only when no other one is at its address any more, so models may take over each other's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import anyio

from ._driver import Driver
from ._journal import Journal
from ._orders import Order, OrderKind
from ._room import WaitingRoom
from ._servers import Servers
from ._spawn import only_own_cancellation, spawn
from ._state import Mode
from .backends import Backend, BackendState
from .exceptions import BackendError, UnknownModelError

__all__ = ["Server", "Turnover"]

logger = logging.getLogger("llmux_asgi.switcher")  # whose part this is

_LOOK_AGAIN = 0.5
"""Seconds until it is looked again whether a server may go, if no request has ended meanwhile."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds after which it is tried again to confirm that a server is out of memory: doubled each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Server:
    """One model's server as a configuration describes it."""

    backend: Backend
    identity: object
    """Differs from that of any other server."""
    url: str
    name: str
    """The model's name in a server that has several, else empty."""

    def is_at_the_place_of(self, other: Server) -> bool:
        """Say whether both are the same server, or would be."""
        return self.url == other.url and (self.name == other.name or not (self.name and other.name))


@dataclass(frozen=True, slots=True)
class _Failure:
    pause: float
    retry_at: float


class Turnover:
    """Carries out what `want` says, in a task of its own that ends when there is nothing left to do.

    `settled` is called with a model when its new server has come in, or when it is gone for good.
    """

    def __init__(
        self,
        room: WaitingRoom,
        servers: Servers,
        driver: Driver,
        journal: Journal,
        sleep_level: Callable[[str], int],
        clock: Callable[[], float],
        settled: Callable[[str], None],
    ) -> None:
        self._room = room
        self._state = room.state
        self._servers = servers
        self._driver = driver
        self._journal = journal
        self._sleep_level = sleep_level
        self._clock = clock
        self._settled = settled
        self.present: dict[str, Server] = {}
        """The servers that are in use, by model."""
        self.next: dict[str, Server] = {}
        """Those that are to come in."""
        self._removed: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._running = False
        self._stopped = anyio.Event()

    @property
    def unsettled(self) -> tuple[str, ...]:
        """The models whose server is not the one that the configuration says, or that it does not have any more."""
        return tuple(model for model in self._state.models if model in self.next or model in self._removed)

    def want(self, servers: Mapping[str, Server]) -> None:
        """Have the models that there are, with these servers. A server that is in use stays if it is the same object."""
        self._failures.clear()
        for model in self._state.models:
            if model not in servers:
                self._remove(model)
        for model, server in servers.items():
            self._removed.discard(model)
            if model not in self._state.models:
                self._state.add(model)
            if self.present.get(model) is server:
                self._keep(model)
            else:
                self.next[model] = server
                self._state.shut(model)
                self._room.has_shut(model)
        for model in self._only_promised():
            if any(self.next[model].is_at_the_place_of(self.present[other]) for other in servers if self._has_its_own(other)):
                # The server that it was to have has gone back to another model: it will never come in.
                self._room.refuse_queue(model, partial(UnknownModelError, model))
                self._forget(model)
        self.wake()

    def wake(self) -> None:
        """Look what can be done, if there is anything to do."""
        self._room.look_again()
        if self.unsettled and not self._running and not self._servers.closing:
            self._running = True
            self._stopped = anyio.Event()
            spawn(self._run, "llmux_asgi turnover")

    def describe(self, model: str) -> str | None:
        """Say what those wait for who wait for the new server of `model`; `None`: there is none to wait for."""
        if model not in self.next:
            return None
        if model in self.present:
            return "its server is being replaced, and the old one is not out of memory yet"
        return "the server that was at the address of its new one is not out of memory yet"

    async def stop(self) -> None:
        """Wait for the end of the task, which comes when the servers are being closed."""
        if self._running:
            self._room.look_again()
            await self._stopped.wait()

    def _only_promised(self) -> list[str]:
        """The models that were removed again before their server has come in, and for which somebody waits."""
        return [model for model in self._removed if model not in self.present]

    def _has_its_own(self, model: str) -> bool:
        return model in self.present and model not in self.next

    def _remove(self, model: str) -> None:
        if model in self.present:
            self._keep(model)  # who waits for its next server is served by this one
            self._removed.add(model)
        elif self._state.queued(model):
            self._removed.add(model)  # its server has still to come in, and goes when they are served
        else:
            self._forget(model)

    def _keep(self, model: str) -> None:
        self.next.pop(model, None)
        self._room.grant(self._state.open(model))
        self._driver.wake()

    def _forget(self, model: str) -> None:
        self.next.pop(model, None)
        self._removed.discard(model)
        self._state.forget(model)
        self._settled(model)

    async def _run(self) -> None:
        try:
            with only_own_cancellation():
                while self.unsettled and not self._servers.closing:
                    for model in self._only_promised():
                        if not self._state.queued(model):
                            self._forget(model)
                    if (active := self._state.active) in self.unsettled and self._may_go(active):
                        await self._put_to_sleep(active)
                        continue
                    if any(map(self._may_go, self.unsettled)) or any(map(self._may_come, self.next)):
                        async with self._driver.exclusively():
                            await self._turn_over()
                        continue
                    with anyio.move_on_after(_LOOK_AGAIN):
                        await self._room.until_release()
        except Exception:
            logger.exception("replacing the servers met an unexpected error; it is tried again at the next request")
        finally:
            self._running = False
            self._stopped.set()

    def _may_go(self, model: str) -> bool:
        """Whether nothing needs the present server of a model that is unsettled, or what of it is left."""
        state = self._state
        if model not in self.present or state.in_flight(model) or state.frozen(model) or state.target == model:
            return False
        if model not in self.next and state.queued(model):
            return False
        failure = self._failures.get(model)
        return failure is None or failure.retry_at <= self._clock()

    def _may_come(self, model: str) -> bool:
        """Whether the place of a model's next server is free. Who waits for a model that is removed comes before others."""
        server, promised = self.next[model], self._only_promised()
        before = () if model in promised else (self.next[each] for each in promised)
        return model not in self.present and not any(map(server.is_at_the_place_of, (*self.present.values(), *before)))

    async def _turn_over(self) -> None:
        """Let go and bring in what can be. Nothing else changes who is awake meanwhile."""
        for model in self.unsettled:
            if self._servers.closing:
                return
            if self._may_go(model):
                try:
                    await self._let_go(model)
                except Exception as exc:  # noqa: BLE001 - whatever a backend raises: the others go on
                    self._note_failure(model, exc)
        for model in tuple(self.next):
            if model in self.next and self._may_come(model) and not self._servers.closing:
                await self._bring_in(model)

    async def _put_to_sleep(self, model: str) -> None:
        """Have the active model put to sleep by the driver, as an operator would."""
        order = Order(OrderKind.STOP if self._servers.can_stop(model) else OrderKind.SLEEP, model)
        self._driver.order(order)
        await order.done.wait()
        if order.error is not None:
            self._note_failure(model, order.error)

    async def _let_go(self, model: str) -> None:
        if self._state.mode is Mode.UNKNOWN:
            await self._driver.reconcile()
        if self._state.mode is Mode.UNKNOWN:
            raise BackendError("it is not known which servers are awake")
        if self._state.active == model:
            return  # it has become so a moment ago
        await self._servers.leave(model, self._sleep_level(model))
        if model not in self.unsettled or not self._may_go(model):
            return  # the configuration was read once more meanwhile
        del self.present[model]
        backend = self._servers.remove(model)
        self._failures.pop(model, None)
        try:
            await backend.aclose()
        except BackendError as exc:
            logger.error("closing the backend of the model %r: %s", model, exc)
        if model in self._removed and model not in self.next:
            self._forget(model)
            logger.info("the model %r is removed, and its server %s out of memory", model, backend)

    async def _bring_in(self, model: str) -> None:
        server = self.present[model] = self.next.pop(model)
        self._servers.add(model, server.backend)
        self._settled(model)
        self._room.grant(self._state.open(model))
        logger.info("the model %r has its new server: %s", model, server.backend)
        try:
            unclear = await self._servers.look(model) is BackendState.AWAKE
        except BackendError as exc:
            logger.warning("the state of the model %r is unknown: %s", model, exc)
            unclear = True
        if unclear:
            # It may be in memory beside another one.
            self._state.distrust()
            if self._state.mode is Mode.UNKNOWN:
                await self._driver.reconcile()
        self._driver.wake()

    def _note_failure(self, model: str, exc: Exception) -> None:
        before = self._failures.get(model)
        pause = min(2 * before.pause, _LONGEST_PAUSE) if before else _FIRST_PAUSE
        self._failures[model] = _Failure(pause, self._clock() + pause)
        what = "replaced" if model in self.next else "removed"
        text = "the old server of the %s model %r is not confirmed out of memory, it is tried again in %.0f s: %s"
        self._journal.error(model, type(exc).__name__, f"the old server is not confirmed out of memory: {exc}")
        logger.error(text, what, model, pause, exc, exc_info=None if isinstance(exc, BackendError) else exc)
