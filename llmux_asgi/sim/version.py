"""What changed between vLLM's versions, as far as the sleep API goes (sources: vLLM's tracker and code)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Behaviour"]


@dataclass(frozen=True)
class Behaviour:
    """The traits of one vLLM version."""

    sleep_answers_json: bool
    """Since 0.32; the body was empty before."""
    has_modes: bool
    """Since 0.17: `mode`, `/pause`, `/resume`, and `is_sleeping` true when merely paused."""
    frees_weights: bool
    """Not in 0.14-0.16."""
    survives_requests_asleep: bool
    """Up to 0.16 a request sent to a sleeper kills the engine; later it waits."""
    partial_wake_resumes: bool
    """Up to 0.23 scheduling goes on as soon as a part of the memory is back."""

    @classmethod
    def of(cls, version: str) -> Behaviour:
        """The traits of `version`, such as `0.32.0` (major and minor count)."""
        major, minor = (int(part) for part in version.split(".")[:2])
        number = (major, minor)
        return cls(
            sleep_answers_json=number >= (0, 32),
            has_modes=number >= (0, 17),
            frees_weights=not (0, 14) <= number <= (0, 16),
            survives_requests_asleep=number >= (0, 17),
            partial_wake_resumes=number <= (0, 23),
        )
