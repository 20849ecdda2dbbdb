"""llama-swap's macros: `${NAME}`, `${MODEL_ID}`, `${PORT}` and `${env.NAME}` in its values."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import ConfigImportError

__all__ = ["expand", "used_macros"]

_MACRO = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_DEEPEST = 32
_KEPT = ("PID",)
"""Known only while the server runs: what uses it replaces it."""


def used_macros(text: str) -> set[str]:
    """Return the names of the macros in a text."""
    return set(_MACRO.findall(text))


def expand(text: str, macros: Mapping[str, object], environment: Mapping[str, str], where: str) -> str:
    """Replace all macros in a text, those in their values too. Raises `ConfigImportError` for one that is not known."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in _KEPT:
            return match[0]
        if name.startswith("env."):
            variable = name.removeprefix("env.")
            if variable not in environment:
                raise ConfigImportError(f"{where}: the environment variable {variable} is not set: set it and import again")
            return environment[variable]
        if name not in macros:
            raise ConfigImportError(f"{where}: there is no macro {name!r}")
        plain = macros[name]
        return str(plain).lower() if isinstance(plain, bool) else str(plain)

    for _ in range(_DEEPEST):
        replaced = _MACRO.sub(value, text)
        if replaced == text:
            return text
        text = replaced
    raise ConfigImportError(f"{where}: a macro refers to itself")
