"""The headers that tell a client what its request has waited for. Pure.

`Server-Timing` is in milliseconds, `x-llmux-queue-time` in seconds.
Source: https://www.w3.org/TR/server-timing/
"""

from __future__ import annotations

from urllib.parse import quote

from ._openai import Headers

__all__ = ["with_times"]

_OWN = b"x-llmux-"
_PLAIN = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
"""What may stand in a header, beside letters, digits and -._~ ."""


def with_times(
    given: Headers, model: str, *, queue: float | None, switch: float | None = None, upstream: float | None = None
) -> Headers:
    """Return the `given` headers of an answer with those that tell its times, in seconds, behind them; `None`: not known.

    `queue` is how long the request waited for its model, `switch` for how long of that the switch to it was under way (`None`:
    there was none), `upstream` how long its server took from then on to begin its answer. A server's own `Server-Timing` is
    kept.
    """
    headers = [pair for pair in given if not pair[0].lower().startswith(_OWN)]
    headers.append((b"x-llmux-model", quote(model, safe=_PLAIN).encode("ascii")))
    if queue is None:
        return headers
    times = {"queue": queue, "switch": switch, "upstream": upstream}
    told = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in times.items() if seconds is not None)
    return [
        *headers,
        (b"x-llmux-queue-time", f"{queue:.6f}".encode("ascii")),
        (b"x-llmux-switched", b"true" if switch is not None else b"false"),
        (b"server-timing", told.encode("ascii")),
    ]
