"""`/v1/audio/transcriptions` and `/v1/audio/translations`: multipart forms in, text out."""

from __future__ import annotations

import math
import time
from email.message import Message
from hashlib import blake2b
from typing import Any

import msgspec
from starlette.types import Receive, Send

from .asgi import HttpError, read_body
from .engine import Engine
from .faults import FaultPlan
from .generate import answer, check_model, strike, submit, tokens_of
from .wire import DONE, Ask, Wire, encode, event, new_id, usage_of

__all__ = ["AUDIO_PATHS", "parse_form", "transcribe"]

AUDIO_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
_TOKENS = 12
_BYTES_PER_SECOND = 32_000  # PCM of 16 bits at 16 kHz


class _Part(msgspec.Struct):
    content: bytes
    filename: str | None = None


def parse_form(content_type: str, body: bytes) -> dict[str, _Part]:
    """The parts of a `multipart/form-data` body (RFC 7578) by their names. Raises `HttpError` 400."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise HttpError(400, "1 validation error: the body is no multipart/form-data", param="body")
    parts: dict[str, _Part] = {}
    delimiter = b"\r\n--" + boundary.encode()
    pieces = (b"\r\n" + body).split(delimiter)
    if not pieces[-1].startswith(b"--"):
        raise HttpError(400, "There was an error parsing the body")
    for piece in pieces[1:-1]:
        head, found, content = piece.partition(b"\r\n\r\n")
        part = Message()
        for line in head.decode("utf-8", "replace").strip().split("\r\n"):
            name, _, value = line.partition(":")
            part[name] = value.strip()
        field = part.get_param("name", header="content-disposition")
        if not found or not isinstance(field, str):
            raise HttpError(400, "There was an error parsing the body")
        parts[field] = _Part(content, part.get_filename())
    return parts


class _AudioWire(Wire):
    """A text that was heard. `kind` is `transcription` or `translation`; `form` holds the request's text fields."""

    def __init__(self, ask: Ask, kind: str, seconds: float, form: dict[str, str]) -> None:
        super().__init__(ask)
        self._kind, self._seconds, self._form = kind, seconds, form
        prefix = {"transcription": "trsc-", "translation": "trsl-"}[kind]
        self._head = {"id": new_id(prefix), "object": f"{kind}.chunk", "created": int(time.time())}
        # As in vLLM, a chunk tells only what has been set.
        self.prefix = b"data: " + encode(self._head)[:-1] + b',"choices":[{"delta":{"content":'
        self.suffix = b'}}],"model":%b}\n\n' % encode(ask.model)

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        ending = b'},"finish_reason":"%b","stop_reason":null}],"model":%b}\n\n' % (reason.encode(), encode(self.ask.model))
        return self.prefix + token + ending + self._usage(count) + DONE

    def nothing(self) -> bytes:
        return self._usage(0) + DONE

    def _usage(self, count: int) -> bytes:
        if not self.ask.include_usage:
            return b""
        usage = usage_of(self.ask.prompt_tokens, count)
        return event({**self._head, "choices": [], "model": self.ask.model, "usage": usage})

    def whole(self, text: str, reason: str, count: int) -> bytes:
        if self._form.get("response_format") == "verbose_json":
            segment: dict[str, Any] = {"id": 0, "seek": 0, "start": 0.0, "end": self._seconds, "text": text, "tokens": []}
            segment |= {"avg_logprob": -0.5, "compression_ratio": 1.0, "no_speech_prob": None, "temperature": 0.0}
            told = {"duration": self._seconds, "language": self._form.get("language", "en"), "text": text}
            return encode({**told, "segments": [segment], "words": None})
        if self._kind == "translation":
            return encode({"text": text})
        return encode({"text": text, "usage": {"type": "duration", "seconds": math.ceil(self._seconds)}})


async def transcribe(engine: Engine, faults: FaultPlan, path: str, content_type: str, receive: Receive, send: Send) -> None:
    """Answer one request. Raises `HttpError`."""
    parts = parse_form(content_type, await read_body(receive))
    form = {name: part.content.decode("utf-8", "replace") for name, part in parts.items() if part.filename is None}
    audio = parts.get("file")
    if audio is None:
        raise HttpError(400, "1 validation error:\n  {'type': 'missing', 'loc': 'body.file'}", param="body.file")
    if audio.filename is None:
        raise HttpError(422, "Expected 'file' to be a file-like object, not 'str'.", kind="Unprocessable Entity")
    check_model(engine, form.get("model"))
    wanted = form.get("response_format", "json")
    if wanted not in ("text", "json", "verbose_json"):
        message = "Currently only support response_format: `text`, `json`, `verbose_json` or `diarized_json`"
        raise HttpError(400, message, kind="BadRequestError")
    stream = form.get("stream", "").lower() in ("true", "1", "on", "yes")
    if stream and wanted == "verbose_json":
        raise HttpError(400, "verbose_json format doesn't support streaming case", kind="BadRequestError")
    fault = await strike(engine, faults, "request", receive)
    prompt = form.get("prompt", "") + blake2b(audio.content, digest_size=8).hexdigest()
    sequence = submit(engine, prompt, _TOKENS)
    usage = form.get("stream_include_usage", "").lower() == "true"
    kind = "transcription" if path.endswith("transcriptions") else "translation"
    wire = _AudioWire(
        Ask(engine.options.name, tokens_of(prompt), _TOKENS, usage), kind, len(audio.content) / _BYTES_PER_SECOND, form
    )
    await answer(engine, sequence, wire, stream, fault, receive, send)
