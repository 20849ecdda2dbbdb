"""The ratios as a picture: SVG that needs nothing else."""

from __future__ import annotations

import math

from tests.benchmarks.pages import STYLE
from tests.benchmarks.relay.report import BASE, METRICS, ROUTER, Metric, Report

__all__ = ["draw"]

WIDTH, LEFT, RIGHT, TOP = 760, 230, 50, 74
BAR, GAP = 11, 14
COLOURS = {"nginx": "#8a8a8a", "gateway": "#0072b2", "gateway-sdk": "#56b4e9", "gateway-otel": "#cc79a7", "httpx": "#d55e00"}
DECADES = (-2, 2)
"""The axis goes from 0.01 to 100 times vllm-router."""


def draw(report: Report) -> str:
    """Bars on a logarithmic axis, one a candidate, in groups, one a metric; to the right of 1 is better than vllm-router."""
    names = [name for name in report.candidates if name not in (BASE, ROUTER)]
    step = len(names) * BAR + GAP
    height = TOP + step * len(METRICS) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>By metric and candidate: how many times better than vllm-router</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        '<text class="ink title" x="16" y="26">Times better than vllm-router (Rust); left of 1 is worse</text>',
        *_legend(names),
    ]
    for decade in range(DECADES[0], DECADES[1] + 1):
        x, width = _x(10.0**decade), 2 if decade == 0 else 1
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 26}"'
        parts.append(f'<line class="{"mark" if decade == 0 else "line"}" stroke-width="{width}" {line}/>')
        parts.append(f'<text class="faint small" text-anchor="middle" x="{x:.1f}" y="{height - 12}">{10.0**decade:g}</text>')
    for group, metric in enumerate(METRICS):
        y = TOP + group * step
        middle = y + len(names) * BAR / 2 + 4
        parts.append(f'<text class="ink" text-anchor="end" x="{LEFT - 10}" y="{middle:.1f}">{metric.title}</text>')
        for place, name in enumerate(names):
            parts += _bar(report, metric, name, y + place * BAR)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(names: list[str]) -> list[str]:
    parts = []
    for place, name in enumerate(names):
        x = 16 + place * 115
        parts.append(f'<rect fill="{_colour(name)}" x="{x}" y="42" width="10" height="10"/>')
        parts.append(f'<text class="ink" x="{x + 15}" y="51">{name}</text>')
    x = 16 + len(names) * 115
    parts.append(f'<line class="mark" stroke-width="2" x1="{x}" x2="{x}" y1="41" y2="53"/>')
    parts.append(f'<text class="ink" x="{x + 8}" y="51">asked for</text>')
    return parts


def _bar(report: Report, metric: Metric, name: str, y: float) -> list[str]:
    ratio = metric.ratio(report, name)
    if ratio is None:
        return []
    better = 1 / ratio if metric.less_is_better else ratio
    one, end = _x(1.0), _x(better)
    errors = report.errors(name, metric.load)
    hint = f"{metric.title}, {name}: {ratio:.2f} times vllm-router's" + (f", {errors:,} errors" if errors else "")
    bar = f'x="{min(one, end):.1f}" y="{y + 0.5:.1f}" width="{abs(end - one):.1f}" height="{BAR - 1}"'
    text = f"{better:.2f}" + (" (errors)" if errors else "")
    side = f'text-anchor="start" x="{end + 5:.1f}"' if better >= 1 else f'text-anchor="end" x="{end - 5:.1f}"'
    parts = [
        f'<rect fill="{_colour(name)}" {bar}><title>{hint}</title></rect>',
        f'<text class="faint small" {side} y="{y + BAR - 2:.1f}">{text}</text>',
    ]
    if (limit := metric.asked.get(name)) is not None:
        x = _x(1 / limit if metric.less_is_better else limit)
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + BAR:.1f}"'
        parts.append(f'<line class="mark" stroke-width="2" {line}/>')
    return parts


def _x(better: float) -> float:
    low, high = DECADES
    place = (min(max(math.log10(better), low), high) - low) / (high - low)
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _colour(name: str) -> str:
    return COLOURS.get(name, "#009e73")
