"""The steps of a switch that change the servers, each in a span of its own, and what is done when one of them fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from . import _names as names
from ._estimates import Estimates
from ._record import SwitchRecords
from ._servers import Servers
from ._state import Phase, SwitcherState
from .backends import STOP_LEVEL
from .exceptions import (
    BackendDeadError,
    BackendError,
    BackendStartError,
    BackendTimeoutError,
    BackendUnreachableError,
    BackendUnsupportedError,
)

__all__ = ["Steps"]

logger = logging.getLogger(__name__)


class Steps:
    """Puts models to sleep and wakes one, as the state machine allows. `sleep_level` tells the level of a model."""

    def __init__(
        self,
        servers: Servers,
        state: SwitcherState,
        records: SwitchRecords,
        sleep_level: Callable[[str], int],
        estimates: Estimates,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._state = state
        self._records = records
        self._sleep_level = sleep_level
        self._estimates = estimates
        self._clock = clock

    def wake_level(self, model: str) -> int:
        """The level that `model` would be woken out of now: 3 if its process is gone."""
        return 3 if self._servers.says_stopped(model) else self._sleep_level(model)

    def costs(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The estimates of sleep and of wake by model, as things stand."""
        models = self._servers.models
        return (
            MappingProxyType(self._estimates.sleep_costs({model: self._sleep_level(model) for model in models})),
            MappingProxyType(self._estimates.wake_costs({model: self.wake_level(model) for model in models})),
        )

    async def make_room(
        self, to: str, origin: str | None, before_origin: Callable[[], None] = lambda: None, *, keep: bool = False
    ) -> None:
        """Put everything but `to` to sleep. Calls `before_origin` right before the outgoing model is.

        With `keep` the server of that keeps the requests that it is serving. A server never loses those that are frozen.
        """
        awake, doubtful = await self._servers.in_memory(to, origin)
        # The outgoing model comes after the others: if one of those turns out to be stuck, it has not been disturbed. The
        # doubtful come last: a half-woken one may have to be woken whole before it can sleep, and that takes memory.
        for model in (*awake, *([origin] if origin is not None else []), *doubtful):
            if model == origin:
                before_origin()
            await self.put_to_sleep(model, keep=(keep and model == origin) or self._state.frozen(model) > 0)
        await self._servers.confirm_vanished()

    async def put_to_sleep(self, model: str, *, keep: bool = False) -> None:
        """Put `model` to sleep at its level; with `keep` its server keeps the requests that it is serving."""
        level = self._sleep_level(model)
        with self._records.phase(Phase.SLEEP, model, {names.MODEL: model, names.SWITCH_SLEEP_LEVEL: level}):
            begun, sound = self._clock(), self._servers.is_sound(model)
            if await self._servers.sleep(model, level, keep=keep) and sound:
                self._estimates.sleep_took(model, level, self._clock() - begun)

    async def stop(self, model: str) -> None:
        """End the process of `model`, which is the gateway's own."""
        with self._records.phase(Phase.SLEEP, model, {names.MODEL: model, names.SWITCH_SLEEP_LEVEL: STOP_LEVEL}):
            await self._servers.end(model)

    async def bring_up(self, to: str) -> None:
        """Wake `to`, everything else being out of memory; return when it takes requests.

        A wake that failed is tried once more, memory being free: that is what a half-woken server needs. If that fails too,
        or would be of no use, the process is ended and started again where it is the gateway's own.
        """
        try:
            await self._wake(to)
            return
        except BackendError as exc:
            failure = exc
            if not self._is_worth_another_try(exc, to):
                raise
        if not isinstance(failure, (BackendDeadError, BackendTimeoutError, BackendUnreachableError)):
            logger.warning("waking the model %r failed, it is tried once more: %s", to, failure)
            await self.make_room(to, None)
            try:
                await self._wake(to)
                return
            except BackendError as exc:
                failure = exc
                if not self._is_worth_another_try(exc, to):
                    raise
        await self._servers.stop(to, failure)
        await self.make_room(to, None)
        await self._wake(to)

    def _is_worth_another_try(self, exc: BackendError, to: str) -> bool:
        """Not for a process that does not come up or cannot sleep, nor if nobody waits any more: perhaps the gateway stops."""
        return not isinstance(exc, (BackendStartError, BackendUnsupportedError)) and self._state.depth(to) > 0

    async def _wake(self, to: str) -> None:
        self._state.wake_up()
        level = self.wake_level(to)
        begun, sleeps = self._clock(), self._servers.is_sound(to) and not self._servers.says_awake(to)
        with self._records.phase(Phase.WAKE, to, {names.MODEL: to}):
            await self._servers.wake(to)
        self._state.ready()
        with self._records.phase(Phase.READY, to, {names.MODEL: to}):
            await self._servers.ready(to)
        if sleeps:
            self._estimates.wake_took(to, level, self._clock() - begun)
