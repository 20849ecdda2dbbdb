"""Reads a configuration: by object, dict or file, and says where what is wrong with it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args

import msgspec

from ..exceptions import ConfigError
from ._access import AccessConfig, AdminConfig, AdminKeyConfig, KeyConfig
from ._models import (
    Config,
    DrainMode,
    LoadingNotice,
    MemoryCheckKind,
    ModelConfig,
    PolicyName,
    ProbeKind,
    ServerKind,
    SleepLevel,
)

__all__ = ["ConfigSource", "json_schema", "load_config", "load_keys"]

_T = TypeVar("_T")

ConfigSource: TypeAlias = Config | Mapping[str, Any] | str | os.PathLike[str]
"""What a configuration may be given as: an object, a dict, or the path of a YAML, TOML or JSON file."""


def load_config(source: ConfigSource) -> Config:
    """Validate `source` and return the configuration. Raises `ConfigError`, whose message names the path and the cause."""
    if isinstance(source, Config):
        # Constructors check values, not types: the round trip checks both, whoever built the objects.
        return _build(msgspec.to_builtins(source))
    if isinstance(source, Mapping):
        return _build(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"$: expected a Config, a dict or the path of a file, got {type(source).__name__}")
    path = Path(source)
    try:
        return _build(_parser(path)(path.read_bytes()))
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    except OSError as exc:
        raise ConfigError(f"{path.absolute()}: {exc.strerror or exc}") from exc


def load_keys(path: Path, config: Config) -> dict[str, KeyConfig]:
    """Read a file of clients' keys (`access.keys_file`) for a gateway of this configuration. Raises `ConfigError`."""
    try:
        keys = _keys(_parser(path)(path.read_bytes()), "$", KeyConfig)
        for name, key in keys.items():
            config.check_key(name, key)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    except OSError as exc:
        raise ConfigError(f"{path.absolute()}: {exc.strerror or exc}") from exc
    return keys


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file; shipped as `llmux_asgi/config.schema.json`."""
    schema = msgspec.json.schema(Config)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llmux_asgi configuration", **schema}


def _parser(path: Path) -> Callable[[bytes], Any]:
    match path.suffix.lower():
        case ".json":
            return _json
        case ".toml":
            return _toml
        case ".yaml" | ".yml":
            return _yaml
        case suffix:
            raise ConfigError(f"$: the file's ending {suffix!r} is not one of .yaml, .yml, .toml, .json")


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"$: not valid JSON: {exc}") from None


def _toml(data: bytes) -> Any:
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"$: not valid TOML: {exc}") from None


def _yaml(data: bytes) -> Any:
    try:
        import yaml  # an optional dependency, and not a quick one to import
    except ImportError:
        raise ConfigError("$: reading YAML needs PyYAML: pip install pyyaml") from None
    try:
        _refuse_duplicates(yaml.compose(data, yaml.SafeLoader), "$")
        return yaml.load(data, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"$: not valid YAML: {' '.join(str(exc).split())}") from None


def _refuse_duplicates(node: Any, where: str) -> None:
    """Refuse a mapping that has a key twice. PyYAML would let the last one win, and a model would be lost."""
    if node is None or isinstance(node.value, str):
        return
    seen = set()
    for child in node.value:
        if not isinstance(child, tuple):
            _refuse_duplicates(child, where)
            continue
        key, value = child
        name = str(key.value)
        if name in seen:
            raise ConfigError(f"{where}.{name}: is there twice, again in line {key.start_mark.line + 1}")
        seen.add(name)
        _refuse_duplicates(value, f"{where}.{name}")


def _build(raw: Any) -> Config:
    if isinstance(raw, Mapping) and isinstance(models := raw.get("models"), Mapping):
        # msgspec calls every key of a mapping `[...]`: converting model by model is what gives errors the model's name.
        for name in models:
            if not isinstance(name, str):
                raise ConfigError(f"$.models.{name}: a model's name is a text: write it in quotes")
        built = {name: _convert(model, ModelConfig, f"$.models.{name}") for name, model in models.items()}
        raw = {**raw, "models": built}
        if isinstance(access := raw.get("access"), Mapping) and isinstance(access.get("keys"), Mapping):
            raw["access"] = _convert(
                {**access, "keys": _keys(access["keys"], "$.access.keys", KeyConfig)}, AccessConfig, "$.access"
            )
        if isinstance(admin := raw.get("admin"), Mapping) and isinstance(admin.get("keys"), Mapping):
            keys = _keys(admin["keys"], "$.admin.keys", AdminKeyConfig)
            raw["admin"] = _convert({**admin, "keys": keys}, AdminConfig, "$.admin")
    return _convert(raw, Config, "$")


def _keys(raw: Any, where: str, kind: type[_T]) -> dict[str, _T]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected keys by name")
    for name in raw:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}.{name}: a key's name is a text: write it in quotes")
    return {name: _convert(key, kind, f"{where}.{name}") for name, key in raw.items()}


_ALLOWED = {
    "sleep_level": get_args(SleepLevel),
    "name": get_args(PolicyName),
    "server": get_args(ServerKind),
    "probe": get_args(ProbeKind),
    "check": get_args(MemoryCheckKind),
    "loading_notice": get_args(LoadingNotice),
    "drain": (*get_args(DrainMode), "true", "false"),
}
_HINTS = {
    "Expected `float`, got": " (a number, in seconds)",
    "Expected `float | null`, got": " (a number, in seconds, or null)",
    "Expected `array`, got `str`": " (write a list: [one, two])",
    "Expected `str`, got": " (write it in quotes)",
    "Expected `str | null`, got": " (write it in quotes)",
}


def _convert(raw: Any, kind: type[_T], root: str) -> _T:
    if isinstance(raw, kind):
        raw = msgspec.to_builtins(raw)
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as exc:
        message, _, where = str(exc).partition(" - at `$")
        where = where.removesuffix("`")
        if found := re.fullmatch(r"\$(\.[^ ]+): (.*)", message, re.DOTALL):  # raised by a __post_init__ of ours
            where, message = where + found[1], found[2]
        message += next((hint for start, hint in _HINTS.items() if message.startswith(start)), "")
        if message.startswith("Invalid enum value"):
            message += f" (one of: {', '.join(str(each) for each in _ALLOWED[where.rpartition('.')[2]])})"
        raise ConfigError(f"{root}{where}: {message[:1].lower()}{message[1:]}") from None
