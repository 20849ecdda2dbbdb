"""What putting a model to sleep and waking it take: exponential moving averages, by model and sleep level. Pure.

A new measurement x moves an estimate e to e + w·(x - e), with the weight w = 0.3: the last five measurements make up five
sixths of it. Sleep and wake are kept apart and per model, so that N models need 2·N numbers and not N², and a switch from i
to j is estimated as sleep_i + wake_j. Drain, cooldown and back-off are not part of it, nor is a call that failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

__all__ = ["Estimates", "ModelCosts"]

WEIGHT = 0.3

_Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=31_536_000)]


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The estimates of one model at one sleep level, in seconds; `None`: not known yet."""

    sleep: float | None = None
    wake: float | None = None


class _Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model at one level, in the file."""

    sleep: _Seconds | None = None
    wake: _Seconds | None = None


class _File(msgspec.Struct, frozen=True):
    """What is kept over restarts: the estimates by model and level."""

    costs: dict[str, dict[int, _Stored]]


class Estimates:
    """The estimates of all models."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = tuple(models)
        self._sleep: dict[tuple[str, int], float] = {}
        self._wake: dict[tuple[str, int], float] = {}

    def seed(self, model: str, level: int, costs: ModelCosts) -> None:
        """Begin with `costs`, as if they had been measured."""
        if costs.sleep is not None:
            self._sleep[model, level] = costs.sleep
        if costs.wake is not None:
            self._wake[model, level] = costs.wake

    def forget(self, model: str) -> None:
        """Know nothing of `model` any more: it has another server, or is gone."""
        for averages in (self._sleep, self._wake):
            for key in [key for key in averages if key[0] == model]:
                del averages[key]

    def sleep_took(self, model: str, level: int, seconds: float) -> None:
        """Take in a measurement. The first one is the estimate."""
        _move(self._sleep, (model, level), seconds)

    def wake_took(self, model: str, level: int, seconds: float) -> None:
        """Take in a measurement, of waking a model out of `level`. The first one is the estimate."""
        _move(self._wake, (model, level), seconds)

    def of(self, model: str, level: int) -> ModelCosts:
        """What is known of the model itself."""
        return ModelCosts(self._sleep.get((model, level)), self._wake.get((model, level)))

    def sleep_costs(self, levels: Mapping[str, int]) -> dict[str, float]:
        """The estimates of all models at their `levels`. One that was never measured is taken to be as the mean of the others.

        It is empty while nothing is known at all.
        """
        return _complete(self._sleep, levels)

    def wake_costs(self, levels: Mapping[str, int]) -> dict[str, float]:
        """As `sleep_costs`, for waking them out of their `levels`."""
        return _complete(self._wake, levels)

    def dump(self) -> bytes:
        """Write all of it down, as JSON."""
        costs: dict[str, dict[int, _Stored]] = {}
        for model, level in sorted({*self._sleep, *self._wake}):
            costs.setdefault(model, {})[level] = _Stored(self._sleep.get((model, level)), self._wake.get((model, level)))
        return msgspec.json.format(msgspec.json.encode(_File(costs)), indent=2) + b"\n"

    def restore(self, data: bytes) -> None:
        """Take over what `dump` has written, of those models that there are. Raises `ValueError` if it is something else."""
        try:
            stored = msgspec.json.decode(data, type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ValueError(str(exc)) from None
        for model in self._models:
            for level, costs in stored.costs.get(model, {}).items():
                self.seed(model, level, ModelCosts(costs.sleep, costs.wake))


def _move(averages: dict[tuple[str, int], float], key: tuple[str, int], seconds: float) -> None:
    before = averages.get(key, seconds)
    averages[key] = before + WEIGHT * (seconds - before)


def _complete(averages: Mapping[tuple[str, int], float], levels: Mapping[str, int]) -> dict[str, float]:
    known = {model: averages[model, level] for model, level in levels.items() if (model, level) in averages}
    if not known:
        return {}
    mean = sum(known.values()) / len(known)
    return {model: known.get(model, mean) for model in levels}
