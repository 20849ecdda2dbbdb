"""From a configuration to what a switcher is made of: at its start, and again when the configuration was read anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._admission import Priorities, QueueLimits
from ._estimates import ModelCosts
from ._memory import MemoryGauge, NvmlGauge
from ._turnover import Server
from .backends import FreezingBackend, TunableBackend, api_key_of, build_backend, with_ports
from .config import Config, ModelConfig, ReloadReport, changes, server_part, server_place
from .exceptions import BackendTimeoutError, BackendUnreachableError, ConfigError
from .policy import SwitchPolicy, build_policy

if TYPE_CHECKING:
    from .switcher import ModelSwitcher
    from .telemetry import Telemetry

__all__ = ["Plan", "Reloader", "Settings", "build_servers", "build_switcher"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a switcher goes by that can change at any moment. By model where it says so; see `ModelSwitcher`."""

    names: Mapping[str, str]
    """The model that each name and each alias stands for."""
    sleep_levels: Mapping[str, int]
    request_timeouts: Mapping[str, float]
    priorities: Priorities
    limits: QueueLimits
    backoff: tuple[float, float]
    ttls: Mapping[str, float]

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Take them from a configuration."""
        models = config.models.items()
        return cls(
            names={**config.aliases, **{name: name for name in config.models}},
            sleep_levels={name: model.sleep_level for name, model in models if model.sleep_level is not None},
            request_timeouts={name: model.timeouts.request for name, model in models if model.timeouts.request is not None},
            priorities=Priorities(
                config.priorities, {name: model.priority for name, model in models if model.priority is not None}
            ),
            limits=QueueLimits(
                config.limits.max_waiting,
                {name: model.max_waiting for name, model in models if model.max_waiting is not None},
            ),
            backoff=(config.limits.backoff_initial, config.limits.backoff_max),
            ttls={name: model.ttl for name, model in models if model.ttl is not None},
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A new configuration, with all that can be wrong with it behind it."""

    given: Config
    config: Config
    """With the ports that were chosen."""
    report: ReloadReport
    servers: Mapping[str, Server]
    built: frozenset[str]
    """The models whose server is a new one."""
    policy: SwitchPolicy | None
    """`None`: the present one stays."""


def build_servers(config: Config, policy: SwitchPolicy, *known: Mapping[str, Server]) -> dict[str, Server]:
    """Return the server of each model; one of the `known` ones if it is among them. Raises `ConfigError`."""
    servers: dict[str, Server] = {}
    for name, model in config.models.items():
        identity = (server_part(name, model), api_key_of(name, model))
        found = [each[name] for each in known if name in each and each[name].identity == identity]
        if found:
            servers[name] = found[0]
            continue
        level = policy.sleep_level if model.sleep_level is None else model.sleep_level
        backend = build_backend(name, model, sleep_level=level, freezes=config.policy.drain == "preempt")
        servers[name] = Server(backend, identity, *server_place(name, model))
    return servers


def build_switcher(
    kind: type[ModelSwitcher],
    given: Config,
    policy: SwitchPolicy | None,
    memory: MemoryGauge | None,
    telemetry: Telemetry | None,
) -> ModelSwitcher:
    """Return the switcher of a configuration; `policy` and `memory` replace those of it. Raises `ConfigError`."""
    config = with_ports(given)
    if memory is None and config.memory.check == "nvml":
        memory = NvmlGauge(config.memory.device)
    keeps_policy = policy is not None
    if policy is None:
        policy = build_policy(config.policy)
    servers = build_servers(config, policy)
    switcher = kind(
        {name: server.backend for name, server in servers.items()},
        policy,
        sleep_levels=Settings.of(config).sleep_levels,
        memory=memory,
        memory_settle=config.memory.settle,
        costs={name: ModelCosts(model.costs.sleep, model.costs.wake) for name, model in config.models.items()},
        estimates=config.policy.estimates,
        telemetry=telemetry,
    )
    switcher.reloader.begin(given, config, servers, keeps_policy=keeps_policy)
    return switcher


class Reloader:
    """Takes another configuration over into a switcher: `plan` may fail, `check` asks the servers, `adopt` does neither."""

    def __init__(self, switcher: ModelSwitcher) -> None:
        self._switcher = switcher
        self.config: Config | None = None
        """The configuration that it goes by, with the ports that were chosen; `None`: it was built from backends."""
        self._given: Config | None = None
        self._keeps_policy = True
        self.settled: Callable[[str], None] = lambda model: None
        """Called when a model has its new server after a reload, or is gone."""

    def begin(self, given: Config, config: Config, servers: Mapping[str, Server], *, keeps_policy: bool) -> None:
        """The switcher was built from what is `given`; `config` is that with its ports. Its policy may be another one."""
        self.config, self._given, self._keeps_policy = config, given, keeps_policy
        self._switcher._turnover.present.update(servers)
        self._go_by(Settings.of(config))

    def plan(self, given: Config) -> Plan:
        """Prepare for another configuration, and change nothing yet. Raises `ConfigError`."""
        if self.config is None or self._given is None:
            raise ConfigError("$: the switcher was built from backends, and not from a configuration that could be replaced")
        report = changes(self._given, given)
        config = with_ports(given, self.config)
        policy = build_policy(config.policy) if "policy" in report.settings and not self._keeps_policy else None
        turnover = self._switcher._turnover
        known = (turnover.present, turnover.next)
        servers = build_servers(config, policy or self._switcher._policy, *known)
        built = frozenset(name for name, server in servers.items() if not any(each.get(name) is server for each in known))
        # The value of a server's API key may have changed, which no configuration shows.
        changed = tuple(
            name for name in config.models if name in report.changed or (name in built and name not in report.added)
        )
        return Plan(given, config, replace(report, changed=changed), servers, built, policy)

    async def check(self, plan: Plan) -> None:
        """Raise `BackendUnsupportedError` if a server of `plan` that answers should freeze requests and cannot."""
        if plan.config.policy.drain != "preempt" or not (plan.built or "policy" in plan.report.settings):
            return
        for name, server in plan.servers.items():
            try:
                if isinstance(server.backend, FreezingBackend):
                    with suppress(BackendUnreachableError, BackendTimeoutError):
                        await server.backend.require_freezing()
            finally:
                if name in plan.built:
                    await server.backend.aclose()  # perhaps it is never used

    def adopt(self, plan: Plan) -> ReloadReport:
        """Go by a prepared configuration from now on. Does not wait and does not fail."""
        switcher, before = self._switcher, self.config
        levels = {model: switcher._sleep_level(model) for model in switcher._state.models}
        self.config, self._given = plan.config, plan.given
        switcher._models = tuple(plan.config.models)
        if plan.policy is not None:
            switcher._policy = plan.policy
            switcher._driver.use(plan.policy)
        self._go_by(Settings.of(plan.config))
        switcher._turnover.want(plan.servers)
        unsettled = switcher._turnover.unsettled
        # What is put to sleep is the old server, and it may not know the new level.
        switcher._sleep_levels |= {model: levels[model] for model in unsettled if model in levels}
        for name, model in plan.config.models.items():
            if name in unsettled:
                continue
            backend = plan.servers[name].backend
            if isinstance(backend, TunableBackend):
                backend.retune(model.timeouts, freezes=plan.config.policy.drain == "preempt")
            old = before.models.get(name) if before is not None else None
            costs = switcher._estimates.of(name, switcher._sleep_level(name))
            if old is None or model.costs != old.costs or costs == ModelCosts():
                self._seed(name, model)
        if switcher.pinned is not None and switcher.pinned not in plan.config.models:
            switcher.unpin()
        report = plan.report
        data = {"added": list(report.added), "changed": list(report.changed), "removed": list(report.removed)}
        switcher.journal.write("config", **data, settings=list(report.settings))
        switcher._room.changed.set()
        return report

    def has_settled(self, model: str) -> None:
        """`model` has its new server, of which nothing is known yet, or is gone."""
        switcher = self._switcher
        switcher._backoff.succeeded(model)
        switcher._estimates.forget(model)
        switcher._sleep_levels.pop(model, None)
        if self.config is not None and (config := self.config.models.get(model)) is not None:
            if config.sleep_level is not None:
                switcher._sleep_levels[model] = config.sleep_level
            self._seed(model, config)
        self.settled(model)

    def _seed(self, name: str, model: ModelConfig) -> None:
        costs = ModelCosts(model.costs.sleep, model.costs.wake)
        self._switcher._estimates.seed(name, self._switcher._sleep_level(name), costs)

    def _go_by(self, settings: Settings) -> None:
        switcher = self._switcher
        switcher._names = settings.names
        switcher._sleep_levels = dict(settings.sleep_levels)
        switcher._request_timeouts = dict(settings.request_timeouts)
        switcher._priorities, switcher._limits = settings.priorities, settings.limits
        switcher._backoff.set_pauses(*settings.backoff)
        switcher._idle.use(settings.ttls)
