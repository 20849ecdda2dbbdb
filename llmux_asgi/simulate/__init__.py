"""The virtual-time simulator: what a policy would make of a load, without a server and without waiting."""

from __future__ import annotations

from .workload import Arrival, Script, Workload

__all__ = ["Arrival", "Script", "Workload"]
