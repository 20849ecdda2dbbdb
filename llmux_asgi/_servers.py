"""What is known of the servers of one pool, and the steps that change it. Facts come from the servers only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

import anyio

from .backends import Backend, BackendState
from .exceptions import BackendError, BackendUnreachableError

__all__ = ["Servers"]

logger = logging.getLogger(__name__)


class Servers:
    """The backends of one pool by model, with the state that each was last confirmed to be in."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = dict(backends)
        self._known: dict[str, BackendState] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order of the configuration."""
        return tuple(self._backends)

    def known(self, model: str) -> BackendState | None:
        """The state that the server of `model` last confirmed, `None` if it is not known."""
        return self._known.get(model)

    def forget(self) -> None:
        """Know nothing any more."""
        self._known.clear()

    async def look(self, model: str) -> BackendState:
        """Ask the server of `model` for its state. Raises `BackendError` if there is no clear answer."""
        self._known.pop(model, None)
        state = self._known[model] = await self._backends[model].state()
        return state

    async def look_at_all(self) -> list[str]:
        """Ask every server, all at once, and return the models that are awake. Servers without a clear answer stay unknown."""

        async def look(model: str) -> None:
            try:
                await self.look(model)
            except BackendError as exc:
                logger.warning("the state of the model %r is unknown: %s", model, exc)

        async with anyio.create_task_group() as tasks:
            for model in self._backends:
                tasks.start_soon(look, model)
        return [model for model in self._backends if self._known.get(model) is BackendState.AWAKE]

    async def require_reachable(self, model: str) -> None:
        """Raise `BackendError` unless the server of `model` answers: nothing is put to sleep for one that cannot wake."""
        if await self.look(model) is BackendState.UNREACHABLE:
            raise BackendUnreachableError(f"{self._backends[model]}: nothing listens there. Is the server running?")

    async def needs_sleep(self, model: str) -> bool:
        """Say whether `model` holds memory. Only a sleeper is taken at its last word: what was gone may have come back."""
        if self._known.get(model) is BackendState.ASLEEP:
            return False
        return await self.look(model) is BackendState.AWAKE

    async def sleep(self, model: str, level: int) -> None:
        """Put `model` to sleep. Returns once it is confirmed out of memory: asleep as it says, or its process gone."""
        self._known.pop(model, None)
        try:
            await self._backends[model].sleep(level)
        except BackendUnreachableError:
            self._known[model] = BackendState.UNREACHABLE
        except BackendError as exc:
            # The call failed; what counts is the state it left the server in.
            with suppress(BackendError):
                await self.look(model)
            if self._known.get(model) in (None, BackendState.AWAKE):
                raise
            logger.warning("the model %r is out of memory although its sleep call failed: %s", model, exc)
        else:
            self._known[model] = BackendState.ASLEEP

    async def wake(self, model: str) -> None:
        """Wake `model`, unless it is awake already. Nothing is known of it until `ready` has returned."""
        if self._known.pop(model, None) is BackendState.AWAKE and await self._backends[model].state() is BackendState.AWAKE:
            return
        await self._backends[model].wake()

    async def ready(self, model: str) -> None:
        """Return as soon as the woken `model` takes requests."""
        await self._backends[model].ready()
        self._known[model] = BackendState.AWAKE

    async def aclose(self) -> None:
        """Close the backends' connections."""
        for backend in self._backends.values():
            await backend.aclose()
