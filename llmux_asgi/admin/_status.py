"""The status of the gateway as operators see it: no URL, key, body or path of this machine is in it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal, TypeAlias, cast, overload

import msgspec

from .._statistics import ErrorRecord, Mode, Phase, SwitcherStatistics
from ..config import Config
from ._gateway import Gateway

__all__ = [
    "CostEstimates",
    "LastError",
    "LoggedError",
    "ModelList",
    "ModelStatus",
    "Status",
    "SwitchStatus",
    "TimeShares",
    "Totals",
    "model_statuses",
    "status_of",
    "without_clocks",
]

ServerState: TypeAlias = Literal["awake", "asleep", "stopped", "unreachable", "unknown"]

_VERSION = version("llmux-asgi")


class CostEstimates(msgspec.Struct, frozen=True):
    """What putting a model to sleep and waking it is estimated to take, in seconds; null: not known yet."""

    sleep: float | None
    wake: float | None


class LastError(msgspec.Struct, frozen=True):
    """What went wrong with a model last. `time` is in Unix seconds."""

    time: float
    kind: str
    message: str


class LoggedError(msgspec.Struct, frozen=True):
    """Something that went wrong. `time` is in Unix seconds."""

    time: float
    model: str | None
    kind: str
    message: str


class ModelStatus(msgspec.Struct, frozen=True):
    """One model. Counts are of requests; `oldest_wait` and `retry_in` (when it may be woken again) are in seconds."""

    name: str
    aliases: tuple[str, ...]
    server: str
    managed: bool
    state: ServerState
    active: bool
    pinned: bool
    sleep_level: int
    in_flight: int
    waiting: int
    frozen: int
    oldest_wait: float | None
    estimates: CostEstimates
    retry_in: float | None
    last_error: LastError | None


class ModelList(msgspec.Struct, frozen=True):
    """All models, in the order of the configuration."""

    models: tuple[ModelStatus, ...]


class SwitchStatus(msgspec.Struct, frozen=True, rename={"origin": "from", "target": "to"}):
    """The switch that is under way; `to` is null where a model is only put to sleep. Times are in Unix seconds."""

    switch: int
    origin: str | None
    target: str | None
    phase: Phase
    since: float
    phase_since: float


class Totals(msgspec.Struct, frozen=True):
    """Switches since the start."""

    switches: int
    abandoned: int
    failures: int


class TimeShares(msgspec.Struct, frozen=True):
    """How the time since the start was spent, in seconds."""

    serving: float
    switching: float
    idle: float


class Status(msgspec.Struct, frozen=True):
    """What the gateway is doing. `time` and `started` are in Unix seconds; `last_event` is the id of the newest event."""

    version: str
    time: float
    started: float
    epoch: str
    last_event: int
    policy: str
    mode: Mode
    active: str | None
    pinned: str | None
    draining: bool
    drained: bool
    in_flight: int
    waiting: int
    frozen: int
    switch: SwitchStatus | None
    totals: Totals
    shares: TimeShares
    models: tuple[ModelStatus, ...]
    errors: tuple[LoggedError, ...]


def status_of(gateway: Gateway) -> Status:
    """Return the status as it is now."""
    seen, journal = gateway.switcher.statistics(), gateway.switcher.journal
    switch = seen.switch
    return Status(
        version=_VERSION,
        time=journal.clock(),
        started=journal.started,
        epoch=journal.epoch,
        last_event=journal.last_id,
        policy=gateway.policy_name,
        mode=seen.mode,
        active=_active(seen),
        pinned=seen.pinned,
        draining=seen.draining,
        drained=seen.drained,
        in_flight=sum(seen.in_flight.values()),
        waiting=sum(seen.waiting.values()),
        frozen=sum(seen.frozen.values()),
        switch=None
        if switch is None
        else SwitchStatus(switch.number, switch.from_model, switch.to_model, switch.phase, switch.since, switch.phase_since),
        totals=Totals(seen.switches, seen.abandoned, seen.failures),
        shares=TimeShares(**{name: _rounded(seen.shares.get(name, 0.0)) for name in TimeShares.__struct_fields__}),
        models=_models(gateway.config, seen),
        errors=tuple(LoggedError(each.time, each.model, each.kind, each.message) for each in seen.errors),
    )


def model_statuses(gateway: Gateway) -> tuple[ModelStatus, ...]:
    """Return the models as they are now."""
    return _models(gateway.config, gateway.switcher.statistics())


def without_clocks(status: Status) -> Status:
    """Leave out of a status what changes by time alone; waits count in whole seconds."""
    models = [
        msgspec.structs.replace(each, oldest_wait=_whole(each.oldest_wait), retry_in=_whole(each.retry_in))
        for each in status.models
    ]
    return msgspec.structs.replace(status, time=0.0, shares=TimeShares(0.0, 0.0, 0.0), models=tuple(models))


def _active(seen: SwitcherStatistics) -> str | None:
    """The model that serves, as far as that is verified."""
    return None if seen.mode is Mode.UNKNOWN else seen.active_model


def _models(config: Config, seen: SwitcherStatistics) -> tuple[ModelStatus, ...]:
    found = []
    for name, model in config.models.items():
        if name not in seen.in_flight:
            continue  # a reload is adding it
        costs = seen.costs[name]
        found.append(
            ModelStatus(
                name=name,
                aliases=model.aliases,
                server="hooks" if model.hooks is not None else model.server,
                managed=model.command is not None,
                state=cast("ServerState", seen.servers[name]),
                active=name == _active(seen),
                pinned=name == seen.pinned,
                sleep_level=model.sleep_level or config.policy.sleep_level,
                in_flight=seen.in_flight[name],
                waiting=seen.waiting[name],
                frozen=seen.frozen[name],
                oldest_wait=_rounded(seen.oldest_waits.get(name)),
                estimates=CostEstimates(_rounded(costs.sleep), _rounded(costs.wake)),
                retry_in=_rounded(seen.retry_in.get(name)),
                last_error=_last_error(seen.last_errors.get(name)),
            )
        )
    return tuple(found)


def _last_error(record: ErrorRecord | None) -> LastError | None:
    return None if record is None else LastError(record.time, record.kind, record.message)


@overload
def _rounded(seconds: float) -> float: ...
@overload
def _rounded(seconds: float | None) -> float | None: ...
def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _whole(seconds: float | None) -> float | None:
    return None if seconds is None else float(int(seconds))
