"""Adopts what the servers say, whatever a failure, a restart or somebody else has made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from opentelemetry import trace

from . import _names as names
from ._backoff import Backoff
from ._journal import Journal
from ._lease import Activation
from ._room import WaitingRoom
from ._servers import Servers
from ._state import Mode
from .exceptions import BackendError

__all__ = ["Reconciler"]

logger = logging.getLogger("llmux_asgi.switcher")  # whose part this is


class Reconciler:
    """Brings the state machine and the leases in line with what is known of the servers."""

    def __init__(
        self,
        room: WaitingRoom,
        servers: Servers,
        backoff: Backoff,
        journal: Journal,
        sleep_level: Callable[[str], int],
    ) -> None:
        self._room = room
        self._state = room.state
        self._servers = servers
        self._backoff = backoff
        self._journal = journal
        self._sleep_level = sleep_level
        self.freeze_limit: float | None = None
        """For how long the requests of the outgoing model may be frozen in the present switch; `None`: they are not."""

    async def __call__(self) -> str | None:
        """Adopt what the servers say. Where several are awake, keep the one in use or most wanted and put the rest to sleep.

        Returns why things are still unknown, if there is no clear answer.
        """
        if self._state.mode is not Mode.UNKNOWN:
            return None  # somebody else has done it while the lock was awaited
        self._state.inquire()
        previous = self._state.active
        unclear = await self._servers.look_at(self._servers.models)
        for model, why in unclear.items():
            logger.warning("the state of the model %r is unknown: %s", model, why)
        if previous in unclear and not self._state.in_flight(previous):
            try:
                await self._servers.stop(previous, unclear.pop(previous))
            except BackendError as exc:  # it is not the gateway's own, or cannot be ended
                unclear[previous] = exc
        if previous in unclear:
            # It may be serving. Nothing is done about it, and nobody is served, before it is known.
            return self._remains_unknown(
                previous, f"the state of the active model {previous!r} is unknown: {unclear[previous]}"
            )
        awake = self._state.by_use(model for model in self._servers.models if self._servers.says_awake(model))
        sound = [model for model in awake if self._servers.is_sound(model)]
        keep = next((model for model in (previous, *self._state.waiting_models(), *sound) if model in sound), None)
        try:
            for model in reversed(awake):
                if model != keep:
                    logger.warning("putting the model %r to sleep: awake are %s, kept is %r", model, awake, keep)
                    # As the switch that has failed would have: what it was to freeze is not cut short either.
                    kept = self._state.frozen(model) > 0 or (model == previous and self.freeze_limit is not None)
                    await self._servers.sleep(model, self._sleep_level(model), keep=kept)
        except BackendError as exc:
            reason = f"the model {model!r} must not be awake and could not be put to sleep: {exc}"
            logger.error("%s", reason)
            return self._remains_unknown(model, reason)
        if keep != previous:
            self.leave(previous)
            self._room.begin(keep)
        elif self._room.activation.interrupted:
            self._room.activation = Activation(self._room.activation)
        if keep is not None:
            self._backoff.succeeded(keep)
        self._room.grant(self._state.adopt(keep))
        self.freeze_limit = None
        return None

    def _remains_unknown(self, model: str, reason: str) -> str:
        self._journal.error(model, BackendError.__name__, reason)
        self._room.refuse_queues(reason)
        return reason

    def leave(self, origin: str | None) -> None:
        """Freeze what `origin` was serving if its server has kept it, else void it: the model is confirmed out of memory."""
        if origin is not None and self.freeze_limit is not None and self._servers.says_asleep(origin):
            if frozen := self._state.in_flight(origin):
                trace.get_current_span().set_attribute(names.SWITCH_FROZEN, frozen)
                self._room.freeze(origin, self.freeze_limit)
        elif self._state.in_flight(origin) or self._room.activation.interrupted:
            self._room.activation.end()
