"""OpenTelemetry's exporter of spans with a quicker encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.trace import SpanKind, StatusCode

from ._replace import with_names

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult

__all__ = ["OTLPSpanExporter", "encode"]


class OTLPSpanExporter(trace_exporter.OTLPSpanExporter):
    """OpenTelemetry's exporter over OTLP/HTTP with a quicker encoder. Arguments and environment variables are the same.

    A gateway shares the interpreter with its exporter. OpenTelemetry's encoder makes an object for each attribute of each
    span; this one writes the bytes of ordinary spans at once, for a fifth of the work. What is sent says the same. For that it
    needs version 1.40 of OpenTelemetry's exporter or a newer one; an older one goes on encoding by itself.
    """

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; see `opentelemetry.sdk.trace.export.SpanExporter`."""
        result: SpanExportResult = _export(self, spans)
        return result


class _Encoded:
    """As much of what `encode_spans` returns as the exporter needs."""

    def __init__(self, spans: Sequence[ReadableSpan]) -> None:
        self._spans = spans

    def SerializePartialToString(self) -> bytes:
        return encode(self._spans)


# What OpenTelemetry's exporter does with another encoder: all else (limits, retries, its own metrics) goes on.
_export = with_names(trace_exporter.OTLPSpanExporter.export, encode_spans=_Encoded)


def encode(spans: Iterable[ReadableSpan]) -> bytes:
    """Return an `ExportTraceServiceRequest` with these spans, in protobuf's format.

    Source: https://github.com/open-telemetry/opentelemetry-proto/blob/main/opentelemetry/proto/trace/v1/trace.proto
    """
    plain: dict[tuple[int, int], list[bytes]] = {}
    firsts: list[ReadableSpan] = []
    others: list[ReadableSpan] = []
    for span in spans:
        try:
            data = _plain_span(span)
        except (AttributeError, TypeError, ValueError):  # a list as a value, a number too large, another SDK
            data = None
        if data is None:
            others.append(span)
            continue
        # By identity: to hash a resource is to write it as JSON. It does not matter if equal ones stand there twice.
        group = id(span.resource), id(span.instrumentation_scope)
        if group not in plain:
            plain[group] = []
            firsts.append(span)
        plain[group].append(data)
    parts = [_around(span, b"".join(datas)) for span, datas in zip(firsts, plain.values(), strict=True)]
    if others:
        parts.append(encode_spans(others).SerializePartialToString())
    return b"".join(parts)  # messages in a row are one message, whose lists have what all of theirs have


def _around(span: ReadableSpan, spans: bytes) -> bytes:
    """Put spans into the resource and the scope that `span` has."""
    resource = encode_spans([span]).resource_spans[0]
    scope = resource.scope_spans[0]
    del scope.spans[:]
    in_scope = scope.SerializePartialToString() + spans
    del resource.scope_spans[:]
    return _field(1, resource.SerializePartialToString() + _field(2, in_scope))


# The numbers are those of the fields in trace.proto and common.proto, with the wire types of
# https://protobuf.dev/programming-guides/encoding/

_TIMES = Struct("<BQBQ").pack
_END = Struct("<BBBBI").pack
_DOUBLE = Struct("<Bd").pack
_HAS_REMOTE, _IS_REMOTE = 0x100, 0x200
_SMALLEST, _LARGEST = -(1 << 63), (1 << 63) - 1


def _plain_span(span: ReadableSpan) -> bytes | None:
    """Return a span as a field of its scope's; `None`: it has something in it that most have not."""
    context, parent, status = span.get_span_context(), span.parent, span.status
    if context is None or context.trace_state or status.status_code is not StatusCode.UNSET:
        return None
    # By their properties the lists would be copied to see that nothing is in them, the attributes looked at once more.
    if span._events or span._links or span.dropped_attributes or span.dropped_events or span.dropped_links:
        return None
    parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")]
    flags = _HAS_REMOTE
    if parent is not None:
        parts += (b"\x22\x08", parent.span_id.to_bytes(8, "big"))
        if parent.is_remote:
            flags |= _IS_REMOTE
    parts += (_title(span.name, span.kind), _TIMES(0x39, span.start_time or 0, 0x41, span.end_time or 0))
    attributes: Any = span._attributes
    for key, value in attributes.copy().items():
        parts.append(_KEPT.get((key, type(value), value)) or _attribute(key, value))
    parts.append(_END(0x7A, 0, 0x85, 1, flags))
    return _field(2, b"".join(parts))


@lru_cache(maxsize=256)
def _title(name: str, kind: SpanKind) -> bytes:
    return _field(5, name.encode()) + bytes((0x30, kind.value + 1))


_KEPT: dict[tuple[str, type, object], bytes] = {}
"""Attributes that were met: most have one of a few values."""
_MOST_KEPT = 1024
_LONG = 256
"""Bytes of an attribute that is not kept."""


def _attribute(key: str, value: object) -> bytes:
    """Return an attribute. Raises `TypeError` or `ValueError` if its value is not simple."""
    data = _field(9, _field(1, key.encode()) + _field(2, _value(value)))
    if len(data) < _LONG and not isinstance(value, float):  # 0.0 is equal to -0.0, and seldom is one the same twice
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        _KEPT[key, type(value), value] = data
    return data


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return _field(1, value.encode())
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int) and _SMALLEST <= value <= _LARGEST:
        return b"\x18" + _varint(value % (1 << 64))
    if isinstance(value, float):
        return _DOUBLE(0x21, value)
    raise TypeError(type(value))


def _field(number: int, data: bytes) -> bytes:
    """Return a field of bytes, a string or a message. Its number is at most 15."""
    return _ONE_BYTE[number << 3 | 2] + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _ONE_BYTE[number]
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


_ONE_BYTE = [bytes((number,)) for number in range(0x80)]
