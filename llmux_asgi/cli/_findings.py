"""What `check` finds: a fault, and how to mend it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

__all__ = ["Finding", "Kind", "Level", "Where"]

Level: TypeAlias = Literal["error", "warning"]
Kind: TypeAlias = Literal[
    "missing-file",
    "unreadable-file",
    "file-ending",
    "no-yaml",
    "syntax",
    "unknown-key",
    "duplicate-key",
    "missing-key",
    "wrong-type",
    "out-of-range",
    "unknown-value",
    "contradiction",
    "no-effect",
    "invalid",
    "bad-url",
    "url-with-v1",
    "url-without-port",
    "no-server",
    "duplicate-server",
    "alias-clash",
    "unknown-priority",
    "no-models",
    "command-without-port",
    "level-without-command",
    "preempt-impossible",
    "no-program",
    "not-executable",
    "no-folder",
    "unwritable",
    "no-gpu",
    "no-prometheus",
    "unreachable",
    "no-connection",
    "hangs",
    "not-http",
    "not-vllm",
    "no-dev-mode",
    "no-sleep-mode",
    "unsafe-version",
    "no-preempt",
    "engine-dead",
    "server-error",
    "hook-failed",
    "wrong-name",
    "names-unknown",
    "port-taken",
    "several-awake",
]
"""A word for scripts; never changes. docs/command-line.md says what each means."""
Where: TypeAlias = str
"""A path in the configuration, such as `$.models.qwen.url`."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, or that may surprise."""

    kind: Kind
    where: Where
    fault: str
    mend: str
    level: Level = "error"
