"""From a parsed file of another program to a configuration of ours, and a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

import msgspec

from ..config import Config, load_config
from ..exceptions import ConfigError
from ._draft import Finding
from ._report import report
from .errors import ConfigImportError
from .fields import FIELDS, Format
from .llama_swap import convert_llama_swap
from .llmux import convert_llmux_0, convert_llmux_2

__all__ = ["Imported", "Program", "convert", "detect_format"]

Program: TypeAlias = Literal["llmux", "llama-swap"]

_HOOKS = {"wake", "sleep", "alive"}


class Imported(msgspec.Struct, frozen=True):
    """A configuration that was imported: as plain data, as the object that it is, and what became of each field."""

    format: Format
    data: dict[str, Any]
    config: Config
    findings: list[Finding]


def detect_format(raw: object, program: Program | None = None) -> Format:
    """Say what wrote a configuration. Raises `ConfigImportError` if that is unclear, or not `program`."""
    wanted = program or "llmux or llama-swap"
    if not isinstance(raw, Mapping) or not isinstance(models := raw.get("models"), Mapping) or not models:
        raise ConfigImportError(f"not a configuration of {wanted}: it has no mapping `models` with a model in it")
    found: dict[Format, str] = {}
    for name, model in models.items():
        keys = set(model) if isinstance(model, Mapping) else set()
        one: Format
        if "cmd" in keys:
            one = "llama-swap"
        elif "model_path" in keys:
            one = "llmux 0.3"
        elif keys & _HOOKS:
            one = "llmux 2"
        else:
            needs = "`cmd` (llama-swap), `model_path` (llmux up to 1.x) or `wake`, `sleep` and `alive` (llmux 2.x)"
            raise ConfigImportError(f"not a configuration of {wanted}: models.{name} has none of {needs}")
        found.setdefault(one, str(name))
    if len(found) > 1:
        which = ", ".join(f"models.{name} is of {each}" for each, name in found.items())
        raise ConfigImportError(f"not a configuration of {wanted}: {which}")
    (kind,) = found
    if program is not None and not kind.startswith(program):
        raise ConfigImportError(f"not a configuration of {program}: its models are of {kind}")
    return kind


def convert(raw: object, program: Program | None = None, *, environment: Mapping[str, str]) -> Imported:
    """Convert a parsed file. `environment`: what llama-swap's `${env.NAME}` stands for. Raises `ConfigImportError`."""
    kind = detect_format(raw, program)
    raw = cast("Mapping[str, Any]", raw)
    match kind:
        case "llmux 0.3":
            draft = convert_llmux_0(raw)
        case "llmux 2":
            draft = convert_llmux_2(raw)
        case "llama-swap":
            draft = convert_llama_swap(raw, environment)
    try:
        config = load_config(draft.config)
    except ConfigError as exc:
        raise ConfigImportError(f"what it says cannot be had here: {exc}") from None
    return Imported(kind, draft.config, config, report(raw, FIELDS[kind], draft.findings))
