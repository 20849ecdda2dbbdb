"""What is known of the servers of one pool, and the steps that change it. Facts come from the servers only."""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress

import anyio

from ._memory import MemoryCheck
from .backends import Backend, BackendState, FreezingBackend, StoppableBackend
from .exceptions import BackendError, BackendStartError, BackendTimeoutError, BackendUnreachableError, BackendUnsupportedError

__all__ = ["Servers"]

logger = logging.getLogger(__name__)


class _Steps(enum.Flag):
    """Steps that were sent to a server and not confirmed: the state that it tells is not the whole truth."""

    NONE = 0
    SLEEP = enum.auto()
    """It may say that it is awake and fall asleep at any moment."""
    SLEEP_AGAIN = enum.auto()
    """More than one sleep: it may say that it sleeps, be woken, and then act on another one."""
    WAKE = enum.auto()
    """It may say that it sleeps and hold memory, or that it is awake and not be fit to serve."""


class Servers:
    """The backends of one pool by model, with the state that each was last confirmed to be in.

    `changed` is called with a model and what its server is now known to be, whenever that has become another.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        memory: MemoryCheck | None = None,
        changed: Callable[[str, str], None] = lambda model, state: None,
    ) -> None:
        self._backends = dict(backends)
        self._memory = memory
        self._known: dict[str, BackendState] = {}
        self._measured = False
        """Whether the memory was measured before the last wake."""
        self._unconfirmed = dict.fromkeys(backends, _Steps.NONE)
        self.closing = False
        """Nothing is woken while this is set: it would be ended right after it."""
        self._told = dict.fromkeys(backends, "unknown")
        self._changed = changed
        self._vanished: set[str] = set()
        """Servers that may have been in memory when nothing listened there any more: one that ends in order frees it last."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order of the configuration."""
        return tuple(self._backends)

    def add(self, model: str, backend: Backend) -> None:
        """Have one more server, of which nothing is known yet."""
        self._backends[model] = backend
        self._unconfirmed[model] = _Steps.NONE
        self._told[model] = "unknown"

    def remove(self, model: str) -> Backend:
        """Forget a server that `leave` has returned for. Whoever calls this closes it."""
        self._known.pop(model, None)
        del self._unconfirmed[model], self._told[model]
        self._vanished.discard(model)
        if self._memory is not None:
            self._memory.forget(model)
        return self._backends.pop(model)

    async def leave(self, model: str, level: int) -> None:
        """Return once `model`, which is not active, is confirmed out of memory; put it to sleep if it is not.

        Its process is ended if it is the gateway's own. Raises `BackendError` if it cannot be confirmed.
        """
        if self.can_stop(model):
            if not self.says_stopped(model):
                await self.end(model)
        else:
            asleep = self.says_asleep(model) and self.is_sound(model)
            try:
                await self.look(model)
            except BackendError as exc:
                if not asleep:
                    raise
                self._known[model] = BackendState.ASLEEP
                logger.warning("the model %r was put to sleep and is taken to be asleep still: %s", model, exc)
            if self.says_awake(model) or not self.is_sound(model):
                await self.sleep(model, level)
        await self.confirm_vanished()

    def says_awake(self, model: str) -> bool:
        """Say whether the server of `model` said that it is awake when it was last asked."""
        return self._known.get(model) is BackendState.AWAKE

    def says_asleep(self, model: str) -> bool:
        """Say whether the server of `model` was confirmed asleep, its process going on."""
        return self._known.get(model) is BackendState.ASLEEP

    def says_stopped(self, model: str) -> bool:
        """Say whether the process of `model` was gone when it was last looked for: to wake it is to start it."""
        return self._known.get(model) is BackendState.STOPPED

    def states(self) -> dict[str, str]:
        """What each server was last known to be; `unknown` if there is no clear answer."""
        return {model: self._state_of(model) for model in self.models}

    def _state_of(self, model: str) -> str:
        return state.value if (state := self._known.get(model)) else "unknown"

    def _tell(self, model: str) -> None:
        """Say what the server of `model` is, if that is news. Not in the middle of a step, when nobody knows it."""
        if (state := self._state_of(model)) != self._told[model]:
            self._told[model] = state
            self._changed(model, state)

    def is_sound(self, model: str) -> bool:
        """Say whether what the server of `model` tells of itself is the whole truth."""
        return not self._unconfirmed[model]

    async def look(self, model: str) -> BackendState:
        """Ask the server of `model` for its state. Raises `BackendError` if there is no clear answer."""
        before = self._known.pop(model, None)
        was_in_memory = before in (BackendState.AWAKE, None) or not self.is_sound(model)
        try:
            state = await self._backends[model].state()
            self._learn(model, state)
        finally:
            self._tell(model)
        if state is not BackendState.UNREACHABLE:
            self._vanished.discard(model)
        elif was_in_memory:
            self._vanished.add(model)
        return state

    async def look_at(self, models: Iterable[str]) -> dict[str, BackendError]:
        """Ask the servers of `models`, all at once. Returns why some gave no clear answer: their state is unknown now."""
        errors: dict[str, BackendError] = {}

        async def look(model: str) -> None:
            try:
                await self.look(model)
            except BackendError as exc:
                errors[model] = exc

        async with anyio.create_task_group() as tasks:
            for model in models:
                tasks.start_soon(look, model)
        return errors

    def can_stop(self, model: str) -> bool:
        """Say whether the process of `model` is the gateway's own."""
        return isinstance(self._backends[model], StoppableBackend)

    def require_stoppable(self, model: str) -> StoppableBackend:
        """Return the backend of `model`. Raises `BackendUnsupportedError` if its process is not the gateway's own."""
        backend = self._backends.get(model)
        if not isinstance(backend, StoppableBackend):
            raise BackendUnsupportedError(
                f"The process of the model {model!r} was not started by the gateway, which cannot stop it. Put the model to "
                "sleep, or end the process where it was started."
            )
        return backend

    async def require_reachable(self, model: str, *, has_failed: bool = False) -> None:
        """Raise `BackendError` unless the server of `model` answers: nothing is put to sleep for one that cannot wake.

        If it is the gateway's own and `has_failed` before, it may give no clear answer: `settle` then ends it.
        """
        try:
            state = await self.look(model)
        except BackendUnsupportedError:
            raise  # it would be no other when it is started again
        except BackendError as exc:
            if not (has_failed and self.can_stop(model)):
                raise
            logger.warning("the server of the model %r gives no clear answer again: %s", model, exc)
            return
        if state is BackendState.UNREACHABLE:
            raise BackendUnreachableError(f"{self._backends[model]}: nothing listens there. Is the server running?")

    async def settle(self, model: str) -> None:
        """End the process of `model` if `require_reachable` has got no clear answer: waking it then starts it anew."""
        if model not in self._known:
            await self.stop(model, BackendError(f"{self._backends[model]}: it gives no clear answer"))

    async def in_memory(self, target: str, origin: str | None) -> tuple[list[str], list[str]]:
        """Ask all servers but these two and return those that have to be put to sleep before `target` is woken.

        First the awake ones; second the half-woken ones, and the target if a sleep call of its own is still to come. A
        server that was put to sleep is asked as well: it may have been restarted meanwhile, and be awake. If it gives no
        clear answer, its confirmed sleep counts. Another one that gives none is ended, or `BackendError` is raised.
        """
        others = [model for model in self.models if model not in (target, origin)]
        asleep = {model for model in others if self._known.get(model) is BackendState.ASLEEP and self.is_sound(model)}
        for model, exc in (await self.look_at(others)).items():
            if model in asleep:
                self._known[model] = BackendState.ASLEEP
                self._tell(model)
                logger.warning("the model %r was put to sleep and is taken to be asleep still: %s", model, exc)
                continue
            unclear = BackendError(f"the model {model!r} may be in memory, its server gives no clear answer: {exc}")
            unclear.__cause__ = exc
            await self.stop(model, unclear)
        awake = [model for model in others if self.says_awake(model)]
        doubtful = [model for model in others if model not in awake and self._unconfirmed[model] & _Steps.WAKE]
        if self._unconfirmed[target] & _Steps.SLEEP:
            doubtful.append(target)
        return awake, doubtful

    async def confirm_vanished(self) -> None:
        """Confirm by the GPU's memory that those are out of it which were in it when they went. Raises `BackendError`."""
        vanished, self._vanished = self._vanished, set()
        try:
            for model in vanished:
                await self._confirm_freed(model)
        except BackendError:
            self._vanished |= vanished
            raise

    async def require_freezing(self, model: str) -> None:
        """Raise `BackendUnsupportedError` unless the server of `model` can keep its requests while it sleeps."""
        backend = self._backends[model]
        if not isinstance(backend, FreezingBackend):
            raise BackendUnsupportedError(f"{backend}: this kind of server cannot keep its requests while it sleeps")
        await backend.require_freezing()

    async def sleep(self, model: str, level: int, *, keep: bool = False) -> bool:
        """Put `model` to sleep. Returns once it is confirmed out of memory: asleep as it says, or its process gone.

        With `keep` the server keeps the requests that it is serving, and goes on with them when it is woken.

        If that fails it is tried once more; if that fails too, the process is ended where it is the gateway's own. Returns
        whether it went as it should: the first call succeeded.
        """
        try:
            return await self._put_to_sleep(model, level, keep=keep)
        except BackendError as exc:
            logger.warning("putting the model %r to sleep failed, it is tried once more: %s", model, exc)
            try:
                await self._put_to_sleep(model, level, keep=keep)
            except BackendError as again:
                await self.stop(model, again)
            return False

    async def stop(self, model: str, reason: BackendError) -> None:
        """End the process of `model`, because of `reason`; raise that if the process is not the gateway's own."""
        if not self.can_stop(model):
            raise reason
        logger.warning("ending the process of the model %r: %s", model, reason)
        await self.end(model)

    async def end(self, model: str) -> None:
        """End the process of `model`. Raises `BackendUnsupportedError` if it is not the gateway's own."""
        await self.require_stoppable(model).stop()
        self._learn(model, BackendState.STOPPED)
        self._tell(model)
        await self._confirm_freed(model)

    async def _put_to_sleep(self, model: str, level: int, *, keep: bool) -> bool:
        try:
            succeeded = await self._try_to_sleep(model, level, keep=keep)
        except BackendError:
            self._tell(model)
            raise
        try:
            await self._confirm_freed(model)
        except BackendError:
            self._known.pop(model, None)
            self._unconfirmed[model] |= _Steps.WAKE  # as one that a failed wake has left with a part of its memory
            raise
        finally:
            self._tell(model)
        return succeeded

    async def _confirm_freed(self, model: str) -> None:
        """Confirm by the GPU's memory that `model` is out of it, unless another model may be in it.

        It is not to be blamed for what that one holds. The last one that is put to sleep before a wake is always measured.
        """
        if self._memory is not None and not any(self._may_hold_memory(other) for other in self.models if other != model):
            await self._memory.confirm_freed(model)

    def _may_hold_memory(self, model: str) -> bool:
        known = self._known.get(model)
        return known in (BackendState.AWAKE, None) or bool(self._unconfirmed[model] & _Steps.WAKE) or model in self._vanished

    async def _try_to_sleep(self, model: str, level: int, *, keep: bool) -> bool:
        """Return whether the call succeeded; not if it failed and has left the model out of memory all the same."""
        self._known.pop(model, None)
        before = self._unconfirmed[model]
        self._unconfirmed[model] |= _Steps.SLEEP | (_Steps.SLEEP_AGAIN if before & _Steps.SLEEP else _Steps.NONE)
        try:
            backend = self._backends[model]
            if keep and isinstance(backend, FreezingBackend):
                await backend.freeze(level)
            else:
                await backend.sleep(level)
        except BackendUnreachableError:
            self._learn(model, BackendState.UNREACHABLE)
        except BackendError as exc:
            # The call failed; what counts is the state it left the server in.
            with suppress(BackendError):
                await self.look(model)
            if self.says_awake(model) and not isinstance(exc, BackendTimeoutError):
                self._unconfirmed[model] = before  # it has refused, and goes on as it was
            if model not in self._known or self.says_awake(model) or not self.is_sound(model):
                raise
            logger.warning("the model %r is out of memory although its sleep call failed: %s", model, exc)
        else:
            self._known[model] = BackendState.ASLEEP
            self._unconfirmed[model] = _Steps.NONE
            return True
        return False

    async def wake(self, model: str) -> None:
        """Wake `model`, unless it is awake already. It counts as half-woken until `ready` has returned."""
        if self.closing:
            raise BackendStartError(f"the model {model!r} is not woken any more: the gateway is shutting down")
        if self.says_awake(model) and self.is_sound(model) and await self.look(model) is BackendState.AWAKE:
            self._measured = False
            return
        self._known.pop(model, None)
        self._measured = self._memory is not None and self.is_sound(model)
        if self._memory is not None and self._measured:
            self._memory.before_wake()
        self._unconfirmed[model] |= _Steps.WAKE
        try:
            await self._backends[model].wake()
        except BackendError:
            self._tell(model)
            raise

    async def ready(self, model: str) -> None:
        """Return as soon as the woken `model` takes requests."""
        try:
            await self._backends[model].ready()
            self._known[model] = BackendState.AWAKE
        finally:
            self._tell(model)
        self._unconfirmed[model] = _Steps.NONE
        if self._memory is not None and self._measured:
            self._memory.after_wake(model)

    async def end_processes(self) -> None:
        """End the gateway's own processes, whatever they are doing."""
        async with anyio.create_task_group() as tasks:
            for model, backend in self._backends.items():
                if isinstance(backend, StoppableBackend):
                    tasks.start_soon(self._close, model, backend.stop)

    async def aclose(self) -> None:
        """Close the backends' connections and end the gateway's own processes."""
        async with anyio.create_task_group() as tasks:
            for model, backend in self._backends.items():
                tasks.start_soon(self._close, model, backend.aclose)

    @staticmethod
    async def _close(model: str, close: Callable[[], Awaitable[None]]) -> None:
        try:
            await close()
        except BackendError as exc:
            logger.error("closing the backend of the model %r: %s", model, exc)

    def _learn(self, model: str, state: BackendState) -> None:
        self._known[model] = state
        asleep = state is BackendState.ASLEEP and self._unconfirmed[model] is _Steps.SLEEP
        if asleep or state in (BackendState.UNREACHABLE, BackendState.STOPPED):
            self._unconfirmed[model] = _Steps.NONE  # nothing more can come of it
