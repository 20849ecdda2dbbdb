"""Who may wait, and with which head start. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ._state import SwitcherState
from .exceptions import InvalidRequestError, QueueFullError, quoted

__all__ = ["Priorities", "QueueLimits"]


class Priorities:
    """The priority classes: `head_starts` in seconds by class, `defaults` is the class of a model's requests, by model."""

    def __init__(self, head_starts: Mapping[str, float], defaults: Mapping[str, str]) -> None:
        for model, name in defaults.items():
            if name not in head_starts:
                raise ValueError(f"the model {model!r} has the priority {name!r}, which is none of {sorted(head_starts)}")
        self._head_starts = dict(head_starts)
        self._defaults = dict(defaults)

    def choose(self, model: str, asked: str | None) -> str | None:
        """Return the class of a request for `model` that asks for the class `asked`; `None`: it has none.

        Raises `InvalidRequestError` if there is no such class.
        """
        if asked is None:
            return self._defaults.get(model)
        if asked not in self._head_starts:
            known = f"one of {', '.join(self._head_starts)}" if self._head_starts else "none: no priorities are configured"
            raise InvalidRequestError(
                f"The priority {quoted(asked)} does not exist. It must be {known}.", param="x-llmux-priority"
            )
        return asked

    def head_start(self, priority: str | None) -> float:
        """Return the head start of a class in seconds; it is 0.0 without a class."""
        return self._head_starts[priority] if priority is not None else 0.0


class QueueLimits:
    """How many requests may wait: `total` for all models together (`None`: no limit), and by model."""

    def __init__(self, total: int | None, by_model: Mapping[str, int]) -> None:
        self._total = total
        self._by_model = dict(by_model)

    def check(self, state: SwitcherState, model: str, retry_after: Callable[[], float]) -> None:
        """Raise `QueueFullError` if one more request must not wait for `model`. `retry_after`: in how many seconds it may."""
        limit = self._by_model.get(model)
        if limit is not None and state.queued(model) >= limit:
            raise QueueFullError(model, f"{limit} requests wait for it", retry_after=retry_after())
        if self._total is not None and state.all_queued >= self._total:
            raise QueueFullError(model, f"{self._total} requests wait for all models together", retry_after=retry_after())
