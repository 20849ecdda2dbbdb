"""What can be configured about the metrics that Prometheus reads."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ._access import CLIENT_PATHS, PREFIX, KeySource
from ._values import PositiveSeconds, ValueConfigError

__all__ = ["MetricsConfig", "MetricsKeyConfig"]


class MetricsKeyConfig(KeySource, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the key for the metrics, or its hash, is read from."""


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metrics in Prometheus' format."""

    path: Annotated[str, Meta(description="Path below the gateway's own mount point.")] = "/metrics"
    key: Annotated[
        MetricsKeyConfig | None,
        Meta(description="Key that who reads them has to send; null: a client's key if there is access control, else none."),
    ] = None
    backends: Annotated[
        bool, Meta(description="Whether the metrics of the models' own servers (vLLM, SGLang) are among them, by model.")
    ] = False
    timeout: Annotated[PositiveSeconds, Meta(description="Longest wait for those of a server.")] = 2.0

    def __post_init__(self) -> None:
        if not PREFIX.fullmatch(self.path) or {".", ".."} & set(self.path.split("/")):
            message = f"{self.path!r} is not a path such as /metrics: slashes, letters, digits, . _ ~ -"
            raise ValueConfigError("path", message)
        if (first := self.path.split("/")[1]) in CLIENT_PATHS:
            raise ValueConfigError("path", f"{self.path!r} would hide what clients ask for at /{first}")
