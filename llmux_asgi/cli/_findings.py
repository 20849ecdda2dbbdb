"""What `check` finds: a fault, and how to mend it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

__all__ = ["Finding", "Level", "Where"]

Level: TypeAlias = Literal["error", "warning"]
Where: TypeAlias = str
"""A path in the configuration, such as `$.models.qwen.url`."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or that may surprise. `kind` is a word for scripts and never changes."""

    kind: str
    where: Where
    fault: str
    mend: str
    level: Level = "error"
