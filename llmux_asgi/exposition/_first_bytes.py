"""The times to first byte as Prometheus knows them, added up by the gateway itself."""

from __future__ import annotations

from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily

from .. import _names as names
from .._instruments import METRICS, SECONDS, FirstByteTimes

__all__ = ["first_byte_family"]


def first_byte_family(times: FirstByteTimes) -> HistogramMetricFamily:
    """Return what OpenTelemetry's exporter would make of its instrument."""
    (metric,) = (each for each in METRICS if each.name == names.METRIC_FIRST_BYTE)
    labels = [name.replace(".", "_") for name in metric.attributes]
    family = HistogramMetricFamily(metric.name.replace(".", "_"), metric.description, labels=labels, unit="seconds")
    bounds = (*map(str, SECONDS), "+Inf")
    for (model, streamed), counts in times.counts.items():
        buckets = list(zip(bounds, accumulate(counts), strict=True))
        family.add_metric([model, str(streamed).lower()], buckets=buckets, sum_value=times.sums[model, streamed])
    return family
