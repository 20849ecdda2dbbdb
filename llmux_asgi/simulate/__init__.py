"""The virtual-time simulator: what a policy would make of a load, without a server and without waiting."""

from __future__ import annotations

from .engine import simulate
from .errors import SimulationError
from .result import Figures, Outcome, RequestRecord, Result, SwitchRecord
from .traces import TraceOptions, read_workload
from .workload import Arrival, Script, Workload

__all__ = [
    "Arrival",
    "Figures",
    "Outcome",
    "RequestRecord",
    "Result",
    "Script",
    "SimulationError",
    "SwitchRecord",
    "TraceOptions",
    "Workload",
    "read_workload",
    "simulate",
]
