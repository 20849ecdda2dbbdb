"""What a gateway's admin API tells, as far as the commands show it. Fields that are not known here are left out."""

from __future__ import annotations

import msgspec

__all__ = ["GatewayStatus", "ModelStatus", "Occurrence", "SwitchStatus"]


class Occurrence(msgspec.Struct, kw_only=True):
    """An error that the gateway remembers."""

    time: float
    kind: str
    message: str
    model: str | None = None


class Estimates(msgspec.Struct, kw_only=True):
    """What a model's sleep and wake are expected to take, seconds."""

    sleep: float | None = None
    wake: float | None = None


class ModelStatus(msgspec.Struct, kw_only=True):
    """One model. Times are in seconds."""

    name: str
    aliases: list[str] = []
    server: str = ""
    managed: bool = False
    state: str = "unknown"
    active: bool = False
    pinned: bool = False
    sleep_level: int | None = None
    in_flight: int = 0
    waiting: int = 0
    frozen: int = 0
    oldest_wait: float | None = None
    estimates: Estimates = msgspec.field(default_factory=Estimates)
    retry_in: float | None = None
    last_error: Occurrence | None = None


class SwitchStatus(msgspec.Struct, kw_only=True):
    """The switch under way. Times are in seconds since 1970."""

    switch: int
    phase: str
    since: float
    phase_since: float
    source: str | None = msgspec.field(name="from", default=None)
    target: str | None = msgspec.field(name="to", default=None)


class Totals(msgspec.Struct, kw_only=True):
    """How many switches there were."""

    switches: int = 0
    abandoned: int = 0
    failures: int = 0


class Shares(msgspec.Struct, kw_only=True):
    """What the time since the start went into, seconds."""

    serving: float = 0.0
    switching: float = 0.0
    idle: float = 0.0


class GatewayStatus(msgspec.Struct, kw_only=True):
    """The gateway. `time` and `started` are in seconds since 1970."""

    time: float
    mode: str
    models: list[ModelStatus]
    version: str = ""
    started: float = 0.0
    epoch: str = ""
    last_event: int = 0
    policy: str = ""
    active: str | None = None
    pinned: str | None = None
    draining: bool = False
    drained: bool = False
    in_flight: int = 0
    waiting: int = 0
    frozen: int = 0
    switch: SwitchStatus | None = None
    totals: Totals = msgspec.field(default_factory=Totals)
    shares: Shares = msgspec.field(default_factory=Shares)
    errors: list[Occurrence] = []
