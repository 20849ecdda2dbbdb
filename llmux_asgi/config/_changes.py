"""What a new configuration changes in a running gateway, and what it cannot change there."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ..exceptions import ConfigError
from ._models import ROUTERS, Config, ModelConfig

__all__ = ["SERVER_KEYS", "ReloadReport", "changes", "server_part", "server_place"]

SERVER_KEYS = ("url", "command", "env", "cwd", "server", "hooks", "served_name", "probe", "warm_up", "api_key")
"""The keys of a model that say which server it has and how that is spoken to. All others can change while it serves."""

_FIXED = ("memory", "metrics")
"""Sections that are read once, when the gateway starts."""


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a new configuration has changed. Models by their names."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """The sections beside `models` that have changed, such as `policy`."""


def server_part(name: str, model: ModelConfig) -> tuple[object, ...]:
    """Return what says which server a model has, to be compared."""
    values = {key: getattr(model, key) for key in SERVER_KEYS}
    if model.url is not None:
        values["url"] = model.address
    return tuple({**values, "served_name": model.served_name or name}.values())


def server_place(name: str, model: ModelConfig) -> tuple[str, str]:
    """Return a server's address, and the model's name in it if it is of a kind that has several, else an empty text."""
    return model.address, (model.served_name or name) if model.server in ROUTERS else ""


def changes(before: Config, after: Config) -> ReloadReport:
    """Say what differs. Raises `ConfigError` if it cannot be changed while the gateway runs."""
    fields = [field for field in msgspec.structs.fields(Config) if field.name != "models"]
    differing = [field.encode_name for field in fields if getattr(before, field.name) != getattr(after, field.name)]
    for section in differing:
        if section in _FIXED:
            raise ConfigError(f"$.{section}: cannot be changed while the gateway runs: restart it, or leave that as it was")
    for where, old, new in (
        ("admin.prefix", before.admin and before.admin.prefix, after.admin and after.admin.prefix),
        ("policy.estimates", before.policy.estimates, after.policy.estimates),
    ):
        if old != new:
            raise ConfigError(f"$.{where}: cannot be changed while the gateway runs: restart it, or leave that as it was")
    return ReloadReport(
        added=tuple(name for name in after.models if name not in before.models),
        changed=tuple(name for name, model in after.models.items() if name in before.models and model != before.models[name]),
        removed=tuple(name for name in before.models if name not in after.models),
        settings=tuple(differing),
    )
