"""Who a client is to the gateway, and what it may use."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ANY_MODEL", "Identity"]

ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Identity:
    """A client. Requests whose identity has the same `name` share its limits."""

    name: str
    """Shown in spans, logs and errors. Not a secret."""
    models: tuple[str, ...] = (ANY_MODEL,)
    """Names or aliases of the models that it may use; `*`: all."""
    requests_per_minute: int | None = None
    """`None`: no limit."""
    tokens_per_minute: int | None = None
    """Prompt and answer together. `None`: no limit."""
    max_concurrent: int | None = None
    """Requests that may wait or run at once. `None`: no limit."""
    priority: str | None = None
    """Priority class of its requests, and the highest that they may ask for. `None`: the model's, and any."""
