"""The virtual-time simulator: what a policy would make of a load, without a server and without waiting."""

from __future__ import annotations

from .bound import Bound, lower_bound
from .engine import simulate
from .errors import SimulationError
from .result import ClassFigures, Figures, Outcome, RequestRecord, Result, SwitchRecord
from .traces import TraceOptions, read_workload
from .workload import Arrival, Script, Workload

__all__ = [
    "Arrival",
    "Bound",
    "ClassFigures",
    "Figures",
    "Outcome",
    "RequestRecord",
    "Result",
    "Script",
    "SimulationError",
    "SwitchRecord",
    "TraceOptions",
    "Workload",
    "lower_bound",
    "read_workload",
    "simulate",
]
