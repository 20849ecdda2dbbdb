"""Puts the metrics of several servers together: one family a name, and the model's name on each sample."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

__all__ = ["MODEL_LABEL", "UP", "merged"]

logger = logging.getLogger("llmux_asgi.metrics")

UP = "llmux_backend_up"
MODEL_LABEL = "model"
_OWN = ("llmux_", "target")
"""What the names of the gateway's own metrics begin with. A server's are not taken for them."""


def merged(answers: Mapping[str, bytes | None]) -> list[Metric]:
    """Return the families that the servers' answers hold, by model, and which of the servers gave one.

    Where servers differ in what kind of metric a name is, it is of unknown type. A label `model` that a server has set to
    something else is kept as `exported_model`, which is what Prometheus does.
    """
    up = GaugeMetricFamily(UP, "Whether the server of a model has told its metrics.", labels=[MODEL_LABEL])
    families: dict[str, Metric] = {}
    for model, answer in answers.items():
        parsed = _parsed(model, answer) if answer is not None else None
        up.add_metric([model], 0 if parsed is None else 1)
        for family in parsed or ():
            if family.name.startswith(_OWN):
                continue
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
            if known.type != family.type:
                known.type = "unknown"
            known.samples += _labelled(model, family.samples)
    return [up, *families.values()]


def _parsed(model: str, answer: bytes) -> list[Metric] | None:
    try:
        return list(text_string_to_metric_families(answer.decode()))
    except Exception as exc:  # noqa: BLE001 - the parser raises whatever its input makes it trip over
        logger.warning("the metrics of the server of the model %r cannot be read: %r", model, exc)
        return None


def _labelled(model: str, samples: Iterable[Sample]) -> Iterable[Sample]:
    for sample in samples:
        labels = {MODEL_LABEL: model, **sample.labels}
        if labels[MODEL_LABEL] != model:
            labels = {**labels, "exported_model": labels[MODEL_LABEL], MODEL_LABEL: model}
        yield sample._replace(labels=labels)
