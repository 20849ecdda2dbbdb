"""From a configuration to what a switcher is made of: at its start, and again when the configuration was read anew."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from ._admission import Priorities, QueueLimits
from ._turnover import Server
from .backends import FreezingBackend, api_key_of, build_backend
from .config import Config, ReloadReport, changes, server_part, server_place
from .exceptions import BackendTimeoutError, BackendUnreachableError
from .policy import SwitchPolicy, build_policy

__all__ = ["Plan", "Settings", "build_servers", "plan"]


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


async def require_freezing(plan: Plan) -> None:
    """Raise `BackendUnsupportedError` if a server that answers cannot keep its requests while it sleeps."""
    for name, server in plan.servers.items():
        backend = server.backend
        try:
            if isinstance(backend, FreezingBackend):
                with suppress(BackendUnreachableError, BackendTimeoutError):
                    await backend.require_freezing()
        finally:
            if name in plan.built:
                await backend.aclose()  # perhaps it is never used


def plan(
    before: Config,
    given: Config,
    config: Config,
    policy: SwitchPolicy,
    *known: Mapping[str, Server],
    keep_policy: bool,
) -> Plan:
    """Prepare what it takes to go from the configuration `before` to the one that is `given`. Raises `ConfigError`.

    `config` is that with its ports, `policy` the present policy, which with `keep_policy` stays whatever is configured.
    """
    report = changes(before, given)
    new_policy = build_policy(config.policy) if "policy" in report.settings and not keep_policy else None
    servers = build_servers(config, new_policy or policy, *known)
    built = frozenset(name for name, server in servers.items() if not any(each.get(name) is server for each in known))
    # The value of a server's API key may have changed, which no configuration shows.
    changed = tuple(name for name in config.models if name in report.changed or (name in built and name not in report.added))
    return Plan(given, config, replace(report, changed=changed), servers, built, new_policy)
