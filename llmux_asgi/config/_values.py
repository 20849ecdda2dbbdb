"""The kinds of values that a configuration is made of."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

from ..exceptions import ConfigError

__all__ = ["Name", "PositiveInt", "PositiveSeconds", "Seconds", "ValueConfigError"]

# A finite number: a year is as good as for ever.
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=31_536_000)]
PositiveInt: TypeAlias = Annotated[int, Meta(gt=0)]
PositiveSeconds: TypeAlias = Annotated[float, Meta(gt=0, le=31_536_000)]
Name: TypeAlias = Annotated[str, Meta(min_length=1)]


class ValueConfigError(ConfigError, ValueError):
    """A value that has the right type and is still wrong. A `ValueError` too, so that msgspec adds the path around it."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"$.{where}: {message}")
