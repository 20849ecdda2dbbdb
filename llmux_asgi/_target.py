"""Where the requests for one model go."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from .config import ModelConfig, TimeoutsConfig, read_secret
from .upstream import Origin

__all__ = ["Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests for one model go."""

    origin: Origin
    prefix: bytes
    served_name: str
    timeouts: TimeoutsConfig
    retry: bool
    authorization: bytes | None = field(repr=False)
    """The server's own; `None`: the client's is passed on, if there is one."""

    @classmethod
    def of(cls, name: str, model: ModelConfig, max_frozen: float) -> Target:
        parts = urlsplit(model.address)
        prefix = parts.path.rstrip("/").encode("ascii")
        timeouts = model.timeouts
        if timeouts.read is not None:
            timeouts = msgspec.structs.replace(timeouts, read=timeouts.read + max_frozen)
        key = read_secret(model.api_key, f"$.models.{name}.api_key") if model.api_key is not None else None
        authorization = f"Bearer {key}".encode("ascii") if key is not None else None
        return cls(Origin(model.address), prefix, model.served_name or name, timeouts, model.retry, authorization)
