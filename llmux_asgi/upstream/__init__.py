"""The HTTP client that carries requests to the servers, behind the seam at which it can be replaced.

`Http1Upstream` is the default: HTTP/1.1 over kept connections. `HttpxUpstream` goes through any transport of httpx. Control
calls (sleep, wake, health) are not its business.
"""

from __future__ import annotations

from ._http1 import Http1Upstream
from ._httpx import HttpxUpstream
from ._protocol import Content, Origin, Upstream, UpstreamFault, UpstreamResponse

__all__ = ["Content", "Http1Upstream", "HttpxUpstream", "Origin", "Upstream", "UpstreamFault", "UpstreamResponse"]
