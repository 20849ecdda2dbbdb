"""Anything may arrive on a connection: the gateway is never at fault, never hangs, and holds nothing afterwards."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.conftest import Fortress

LINES = [
    *(b"content-length: 14", b"content-length: 15", b"content-length: 0", b"content-length: x", b"content-length: 999999"),
    *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"expect: 100-continue", b"connection: close"),
    *(b"connection: upgrade", b"upgrade: websocket", b"upgrade: h2c", b"content-encoding: gzip", b"te: trailers"),
    *(b"x-llmux-model: a", b"x-llmux-model: b", b"x-llmux-model:", b"x-llmux-priority: x", b"x-llmux-model: \xff\xfe"),
    *(b"content-type: multipart/form-data; boundary=x", b"content-type: text/plain", b"host: a", b"host: b", b": x", b"x"),
    *(b"traceparent: 00-x", b"tracestate: =,=", b"baggage: ;;", b"x: " + b"y" * 5000, b"accept-encoding: gzip", b" folded"),
]
TARGETS = [
    *(b"/llm/v1/chat/completions", b"/v1/completions?a=b", b"/v1/models", b"/sleep", b"/rooted/v1/embeddings"),
    *(b"*", b"/\xff", b""),
]
BODIES = [
    *(b'{"model": "a"}', b"e\r\n" + b'{"model": "a"}' + b"\r\n0\r\n\r\n", b"0\r\n\r\n", b'{"model": "a", "stream": true}'),
    *(b"{}", b"[[[[", b"\0\0\0\0", b"ffffffff\r\n", b'{"model": "a", "model": "b"}', b"--x\r\n\r\n--x--\r\n"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
requests = st.builds(
    lambda method, target, version, lines, body, noise: (
        method + b" " + target + b" " + version + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body + noise
    ),
    st.sampled_from([b"POST", b"POST", b"POST", b"GET", b"OPTIONS", b"HEAD", b"X", b""]),
    st.sampled_from(TARGETS),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]),
    st.lists(st.sampled_from(LINES), max_size=5),
    st.sampled_from(BODIES) | st.binary(max_size=40),
    st.sampled_from([b"", b"", b"\r\n", b"POST / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"]),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=requests | st.binary(max_size=200))
@pytest.mark.parametrize("loop", ["asyncio"], indirect=True)  # hypercorn on trio ends with its process at the first stray byte
def test_whatever_is_sent_the_gateway_is_not_at_fault(tight: Fortress, data: bytes) -> None:
    answer = tight.send(data, patience=0.02)
    assert not {500, 502} & set(answer.statuses), (data, answer.raw[:300])
    tight.is_closed()
    assert tight.post().statuses == [200]
