"""What the admin API asks of the gateway that it belongs to."""

from __future__ import annotations

from typing import Protocol

from ..config import Config, ReloadReport
from ..switcher import ModelSwitcher

__all__ = ["Gateway"]


class Gateway(Protocol):
    """An `LLMuxApp`."""

    @property
    def config(self) -> Config:
        """The configuration as it is now: a reload replaces it."""

    @property
    def switcher(self) -> ModelSwitcher:
        """What is told of, and controlled."""

    @property
    def policy_name(self) -> str:
        """What the policy is called."""

    def is_client_key(self, key: str) -> bool:
        """Whether a key is one of the clients'."""

    async def reload(self) -> ReloadReport:
        """Read the configuration anew and go by it.

        Raises `ConfigError` or `BackendUnsupportedError` if it cannot be used: nothing has changed then.
        """
