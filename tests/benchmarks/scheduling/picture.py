"""The measured mean waits as a picture: SVG that needs nothing else, on a ground of its own so that it is readable anywhere."""

from __future__ import annotations

from tests.benchmarks.pages import STYLE
from tests.benchmarks.scheduling.report import Report, Row

__all__ = ["draw"]

WIDTH, LEFT, RIGHT, TOP = 760, 130, 70, 70
BAR, GAP = 11, 14
COLOURS = {"fifo": "#d55e00", "gated_quantum": "#0072b2", "pressure": "#56b4e9", "throughput": "#8a8a8a"}


def draw(report: Report) -> str:
    """Horizontal bars, one a policy, in groups, one a load; a line for the seeds' spread, a mark for what was predicted."""
    policies = [name for name in COLOURS if name in report.policies]
    step = len(policies) * BAR + GAP
    height = TOP + step * len(report.loads) + 30
    longest = max(max(row.spread("mean_wait")[1], row.median("predicted_mean_wait")) for row in report.rows)
    tick = next(each for each in (0.5, 1, 2, 5, 10, 20, 50, 100) if longest / each <= 8)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Mean wait by load and policy, measured and predicted</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="6"/>',
        '<text class="ink title" x="16" y="26">Mean wait in seconds: less is better</text>',
        *_legend(policies),
    ]
    for number in range(int(longest / tick) + 1):
        x = LEFT + number * tick * scale
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 26}"/>')
        parts.append(f'<text class="faint small" text-anchor="middle" x="{x:.1f}" y="{height - 12}">{number * tick:g}</text>')
    for group, load in enumerate(report.loads):
        y = TOP + group * step
        middle = y + len(policies) * BAR / 2 + 4
        parts.append(f'<text class="ink" text-anchor="end" x="{LEFT - 10}" y="{middle:.1f}">{load}</text>')
        for place, name in enumerate(policies):
            if row := report.row(load, name):
                parts += _bar(row, y + place * BAR, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(policies: list[str]) -> list[str]:
    parts = []
    for place, name in enumerate(policies):
        x = 16 + place * 125
        parts.append(f'<rect fill="{COLOURS[name]}" x="{x}" y="40" width="10" height="10"/>')
        parts.append(f'<text class="ink" x="{x + 15}" y="49">{name}</text>')
    x = 16 + len(policies) * 125
    parts.append(f'<line class="mark" stroke-width="2" x1="{x}" x2="{x}" y1="39" y2="51"/>')
    parts.append(f'<text class="ink" x="{x + 8}" y="49">predicted by the simulator</text>')
    return parts


def _bar(row: Row, y: float, scale: float) -> list[str]:
    low, high = (LEFT + value * scale for value in row.spread("mean_wait"))
    width, predicted = row.median("mean_wait") * scale, LEFT + row.median("predicted_mean_wait") * scale
    middle, end = y + BAR / 2, max(high, predicted) + 5
    hint = f"{row.load}, {row.policy}: {row.median('mean_wait'):.2f} s"
    bar = f'x="{LEFT}" y="{y + 0.5:.1f}" width="{width:.1f}" height="{BAR - 1}"'
    top, bottom = y + 1, y + BAR - 1
    return [
        f'<rect fill="{COLOURS[row.policy]}" {bar}><title>{hint}</title></rect>',
        f'<line class="mark" stroke-width="1" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>',
        f'<line class="mark" stroke-width="2" x1="{predicted:.1f}" x2="{predicted:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>',
        f'<text class="faint small" x="{end:.1f}" y="{y + BAR - 2:.1f}">{row.median("mean_wait"):.2f}</text>',
    ]
