"""The policy that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..config import POLICY_PARAMETERS, PolicyConfig, PolicyName
from ._vocabulary import SwitchPolicy
from .fifo import FifoPolicy
from .gated_quantum import GatedQuantumPolicy
from .pressure import PressurePolicy
from .throughput import ThroughputPolicy

__all__ = ["build_policy"]

_POLICIES: Mapping[PolicyName, Callable[..., SwitchPolicy]] = {
    "fifo": FifoPolicy,
    "gated_quantum": GatedQuantumPolicy,
    "pressure": PressurePolicy,
    "throughput": ThroughputPolicy,
}


def build_policy(config: PolicyConfig) -> SwitchPolicy:
    """Make it. A setting that is left out has the policy's own default."""
    common = ("min_active_duration", "max_freezes", "max_frozen")
    own = {name: getattr(config, name) for name in (*common, *POLICY_PARAMETERS[config.name])}
    return _POLICIES[config.name](
        sleep_level=config.sleep_level,
        request_timeout=config.request_timeout,
        drain=config.drain,
        drain_timeout=config.drain_timeout,
        **{name: value for name, value in own.items() if value is not None},
    )
