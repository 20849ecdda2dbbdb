"""A comparison as one HTML file: who was active when, and how the waits are distributed. It needs nothing but itself."""

from __future__ import annotations

from html import escape

from .comparison import Comparison, PolicyRun
from .result import Result, percentile

__all__ = ["render"]

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a00", "#6a51a3")
_WIDTH, _LEFT, _LANE, _HEIGHT = 1100, 330, 22, 360
_MARGIN = 50
_POINTS = 200
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
svg { display: block; margin: 0.5em 0 2em; max-width: 100%; height: auto; }
text { font: 12px system-ui, sans-serif; fill: #222; }
table { border-collapse: collapse; } td, th { padding: 0.2em 0.8em; text-align: right; } td:first-child { text-align: left; }
.axis { stroke: #888; } .grid { stroke: #ddd; } .curve { fill: none; stroke-width: 2; } .key { padding: 0 0.4em; }
"""


def render(comparison: Comparison) -> str:
    """Return the page."""
    models = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(comparison.costs)}
    keys = "".join(f'<span class="key" style="background:{colour}">&nbsp;</span> {escape(m)} ' for m, colour in models.items())
    bound = comparison.bound
    said = "none, the load has closed loops" if bound is None else f"{bound.non_anticipating:.2f} s"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(comparison.load)}: policies</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(comparison.load)}</h1>
<p>* the configured policy. Lower bound on the mean wait: {said}.</p>
{_table(comparison)}
<h2>Who was active</h2>
<p>{keys} white: switching, or none is awake</p>
{_timeline(comparison, models)}
<h2>Share of requests that waited no longer</h2>
{_distribution(comparison)}
</body>
</html>
"""


def _table(comparison: Comparison) -> str:
    titles = ("", "mean wait", "p50", "p99", "longest", "switches", "serving", "lost")
    rows = ["<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for run in comparison.runs:
        f = run.figures
        cells = (f"{f.mean_wait:.2f} s", f"{f.p50_wait:.2f} s", f"{f.p99_wait:.2f} s", f"{f.longest_wait:.2f} s")
        texts = (escape(run.label), *cells, str(f.switches), f"{100 * f.serving_share:.1f} %", str(f.lost))
        rows.append("<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _timeline(comparison: Comparison, models: dict[str, str]) -> str:
    begin = min(run.result.begin for run in comparison.runs)
    end = max(run.result.end for run in comparison.runs)
    scale = (_WIDTH - _LEFT) / max(end - begin, 1e-9)
    parts = []
    for lane, run in enumerate(comparison.runs):
        top = lane * (_LANE + 8)
        parts.append(f'<text x="0" y="{top + 15}">{escape(run.label)}</text>')
        for model, since, until in _turns(run.result, begin):
            x, width = _LEFT + (since - begin) * scale, max((until - since) * scale, 0.2)
            title = f"<title>{escape(model)}: {since:.1f} s to {until:.1f} s</title>"
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_LANE}" fill="{models[model]}">{title}</rect>'
            )
    bottom = len(comparison.runs) * (_LANE + 8)
    for step in range(6):
        x, time = _LEFT + step * (_WIDTH - _LEFT) / 5, begin + step * (end - begin) / 5
        anchor = "end" if step == 5 else "middle"
        parts.append(f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="{anchor}">{time:.0f} s</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {bottom + 20}" width="{_WIDTH}" role="img">{"".join(parts)}</svg>'


def _turns(result: Result, begin: float) -> list[tuple[str, float, float]]:
    """Who was active from when to when."""
    turns = []
    model, since = result.active_at_start, begin
    for switch in result.switches:
        if switch.committed is None:
            continue  # it was given up, and the model served on
        if model is not None:
            turns.append((model, since, switch.committed))
        model, since = (switch.target, switch.ended) if switch.completed else (None, switch.ended)
    if model is not None:
        turns.append((model, since, max(result.end, since)))
    return turns


def _distribution(comparison: Comparison) -> str:
    waits = [run.result.waits() for run in comparison.runs]
    longest = max((each[-1] for each in waits if each), default=0.0) or 1.0
    width, height = _WIDTH - 300, _HEIGHT - 30
    parts = []
    for step in range(6):
        y, x = height - step * height / 5 + 5, _MARGIN + step * width / 5
        parts.append(f'<line class="grid" x1="{_MARGIN}" x2="{_MARGIN + width}" y1="{y:.0f}" y2="{y:.0f}"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">{20 * step} %</text>')
        parts.append(f'<text x="{x:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{longest * step / 5:.3g} s</text>')
    for place, run in enumerate(comparison.runs):
        colour = _COLOURS[place % len(_COLOURS)]
        shares = [point / _POINTS for point in range(_POINTS + 1)]
        places = (
            (_MARGIN + percentile(waits[place], share) / longest * width, height - share * height + 5) for share in shares
        )
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = "" if run.configured else ' stroke-dasharray="6 3"'
        parts.append(f'<polyline class="curve" stroke="{colour}"{dashes} points="{points}"/>')
        parts.append(_key(run, colour, 30 + 20 * place))
    return f'<svg viewBox="0 0 {_WIDTH + 120} {_HEIGHT}" width="{_WIDTH + 120}" role="img">{"".join(parts)}</svg>'


def _key(run: PolicyRun, colour: str, y: int) -> str:
    x = _WIDTH - 240
    line = f'<line x1="{x}" x2="{x + 25}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
    return f'{line}<text x="{x + 32}" y="{y}">{escape(run.label)}</text>'
