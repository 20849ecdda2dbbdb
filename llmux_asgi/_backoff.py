"""How long a model that failed to wake is left alone."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Backoff", "Failure"]


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failed switch to a model."""

    in_a_row: int
    pause: float
    retry_at: float
    reason: str


class Backoff:
    """Failures by model. The pause starts at `initial` seconds and doubles with each failure in a row, up to `longest`."""

    def __init__(self, initial: float, longest: float) -> None:
        self._initial = initial
        self._longest = longest
        self._failures: dict[str, Failure] = {}

    def set_pauses(self, initial: float, longest: float) -> None:
        """Go by other pauses from the next failure on, in seconds."""
        self._initial, self._longest = initial, longest

    def failed(self, model: str, reason: str, now: float) -> Failure:
        """Note a failed switch to `model`."""
        before = self._failures.get(model)
        in_a_row = before.in_a_row + 1 if before else 1
        pause = min(before.pause * 2 if before else self._initial, self._longest)
        failure = self._failures[model] = Failure(in_a_row, pause, now + pause, reason)
        return failure

    def succeeded(self, model: str) -> None:
        """Forget the failures of `model`."""
        self._failures.pop(model, None)

    def has_failed(self, model: str) -> bool:
        """Say whether the last switch to `model` failed."""
        return model in self._failures

    def retry_in(self, now: float) -> dict[str, float]:
        """In how many seconds those may be tried again that are to be left alone now, by model."""
        return {model: each.retry_at - now for model, each in self._failures.items() if each.retry_at > now}

    def pausing(self, model: str, now: float) -> Failure | None:
        """Return the failure because of which `model` is to be left alone now, if there is one."""
        failure = self._failures.get(model)
        return failure if failure and failure.retry_at > now else None
