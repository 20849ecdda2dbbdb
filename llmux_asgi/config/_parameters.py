"""Parameters of requests that a model's configuration adds, sets and takes out."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ._values import Name, ValueConfigError

__all__ = ["ModelParametersConfig", "ParametersConfig"]

_NOT_ALLOWED = {
    "model": "the gateway sets it: use served_name",
    "stream": "only the client knows in which form it reads its answer",
}
_KINDS = ("defaults", "forced", "strip")


class ParametersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of the keys of a request's JSON object."""

    defaults: Annotated[dict[Name, Any], Meta(description="Added where a request does not have the key itself.")] = {}
    forced: Annotated[dict[Name, Any], Meta(description="Set, whatever a request says.")] = {}
    strip: Annotated[tuple[Name, ...], Meta(description="Keys that are taken out.")] = ()

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        for kind in _KINDS:
            given = getattr(self, kind)
            for key in given:
                if key in _NOT_ALLOWED:
                    raise ValueConfigError(kind, f"{key!r} cannot be a parameter: {_NOT_ALLOWED[key]}")
                if key.isspace() or not key.isprintable() or "\\" in key or '"' in key:
                    raise ValueConfigError(kind, f"{key!r} is no name of a parameter")
                if (other := owners.setdefault(key, kind)) != kind:
                    raise ValueConfigError(kind, f"{key!r} is in {other} too: one of them says it all")
            if isinstance(given, dict):
                for key, value in given.items():
                    _check_json(value, f"{kind}.{key}")


class ModelParametersConfig(ParametersConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for all requests to one model, and further ones by the name that a request uses."""

    aliases: Annotated[
        dict[Name, ParametersConfig],
        Meta(description="By alias, or the model's own name: what its requests get on top of that."),
    ] = {}


def _check_json(value: object, where: str) -> None:
    match value:
        case None | bool() | int():
            return
        case str() if value.isascii() or value.encode("utf-8", "replace").decode() == value:
            return
        case float() if math.isfinite(value):
            return
        case list() | tuple():
            for index, each in enumerate(value):
                _check_json(each, f"{where}[{index}]")
        case dict() if all(isinstance(key, str) for key in value):
            for key, each in value.items():
                _check_json(each, f"{where}.{key}")
        case _:
            raise ValueConfigError(where, f"{value!r} is not a value of JSON")
