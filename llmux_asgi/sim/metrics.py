"""What the simulated server answers at `/metrics`: some of vLLM's metrics, by its names, types and labels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Histogram", "exposition"]

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
_FINISHED_REASONS = {"length": "length", "abort": "abort", "gone": "abort", "error": "error"}
"""vLLM's reason by that of the simulated engine."""


class Histogram:
    """Counts of durations in seconds, by bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Write it down."""
        count = 0
        for bound, each in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            count += each
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}.0'
        yield f"{name}_count{{{labels}}} {count}.0"
        yield f"{name}_sum{{{labels}}} {self._sum}"


def exposition(engine: Engine) -> str:
    """Return the metrics as they are now, in Prometheus' text format."""
    return "\n".join([*_lines(engine), ""])


def _lines(engine: Engine) -> Iterator[str]:
    name = engine.options.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    labels = f'engine="0",model_name="{name}"'
    running, waiting = engine.running_and_waiting()
    if engine.paused and not running:
        waiting = 0  # vLLM writes these when the engine steps: requests that came since then are not seen
    yield "# HELP vllm:num_requests_running Requests that run."
    yield "# TYPE vllm:num_requests_running gauge"
    yield f"vllm:num_requests_running{{{labels}}} {running}.0"
    yield "# HELP vllm:num_requests_waiting Requests that wait to run."
    yield "# TYPE vllm:num_requests_waiting gauge"
    yield f"vllm:num_requests_waiting{{{labels}}} {waiting}.0"
    yield "# HELP vllm:kv_cache_usage_perc Share of the KV cache that is in use."
    yield "# TYPE vllm:kv_cache_usage_perc gauge"
    yield f"vllm:kv_cache_usage_perc{{{labels}}} {running / engine.options.max_num_seqs}"
    yield "# HELP vllm:engine_sleep_state Which of the states of sleep it is in."
    yield "# TYPE vllm:engine_sleep_state gauge"
    for state, value in zip(_SLEEP_STATES, engine.sleep_metric(), strict=True):
        yield f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {value}.0'
    for counter, count, what in (
        ("vllm:prompt_tokens_total", engine.count["prompt_tokens"], "Tokens of prompts."),
        ("vllm:generation_tokens_total", engine.count["tokens"], "Tokens generated."),
    ):
        yield f"# HELP {counter} {what}"
        yield f"# TYPE {counter} counter"
        yield f"{counter}{{{labels}}} {count}.0"
    ended = dict.fromkeys(_FINISHED_REASONS.values(), 0)
    for reason, told in _FINISHED_REASONS.items():
        ended[told] += engine.count["ended_" + reason]
    yield "# HELP vllm:request_success_total Requests that are over."
    yield "# TYPE vllm:request_success_total counter"
    for reason, count in ended.items():
        yield f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}.0'
    for histogram, values, what in (
        ("vllm:time_to_first_token_seconds", engine.first_token, "From a request's arrival to its first token."),
        ("vllm:e2e_request_latency_seconds", engine.latency, "From a request's arrival to its end."),
    ):
        yield f"# HELP {histogram} {what}"
        yield f"# TYPE {histogram} histogram"
        yield from values.lines(histogram, labels)
