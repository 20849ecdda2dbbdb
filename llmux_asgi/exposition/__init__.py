"""The metrics in Prometheus' text format, those of the models' own servers among them. Needs the extra `prometheus`."""

from __future__ import annotations

from ._endpoint import MetricsEndpoint

__all__ = ["MetricsEndpoint"]
