"""The admin API and its page: what the gateway is doing, and what operators may do to it. Off unless configured."""

from __future__ import annotations

from ._app import AdminApp
from ._status import ModelStatus, Status

__all__ = ["AdminApp", "ModelStatus", "Status"]
