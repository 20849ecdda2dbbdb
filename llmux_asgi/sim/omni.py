"""Speech and images, as vLLM-Omni makes them: vLLM has no such routes, but the servers are served in the same way.

Source: vllm-project/vllm-omni, `entrypoints/openai/protocol/audio.py` and `images.py`. Sound and picture are real files that
depend on the model and the prompt: a WAV of noise, and a PNG of one pixel.
"""

from __future__ import annotations

import base64
import io
import struct
import time
import wave
import zlib

import msgspec
from starlette.types import Receive, Send

from .asgi import HttpError, read_body, send_body, send_json
from .audio import parse_form
from .engine import Engine
from .faults import FaultPlan
from .generate import check_model, decode, required, run_whole, strike, submit

__all__ = ["OMNI_PATHS", "make"]

OMNI_PATHS = frozenset({"/v1/audio/speech", "/v1/images/generations", "/v1/images/edits"})
_TOKENS = 12
_RATE = 24_000


class _Request(msgspec.Struct):
    model: str | None = None
    input: str | None = None
    prompt: str | None = None
    n: int = 1
    size: str = "1024x1024"
    response_format: str | None = None


async def make(engine: Engine, faults: FaultPlan, path: str, content_type: str, receive: Receive, send: Send) -> None:
    """Answer one request. Raises `HttpError`."""
    body = await read_body(receive)
    if path == "/v1/images/edits":
        parts = parse_form(content_type, body)
        form = {name: part.content.decode("utf-8", "replace") for name, part in parts.items() if part.filename is None}
        request = _Request(form.get("model"), prompt=form.get("prompt"))
    else:
        request = decode(body, _Request)
    speech = path == "/v1/audio/speech"
    prompt = request.input if speech else request.prompt
    required(prompt, "input" if speech else "prompt")
    check_model(engine, request.model)
    wanted, only = request.response_format, "wav" if speech else "b64_json"
    if wanted not in (None, only):
        raise HttpError(400, f"response_format {wanted!r} is not simulated: {only}", param="response_format")
    await strike(engine, faults, "request", receive)
    sequence = submit(engine, prompt or "", _TOKENS)
    if not await run_whole(engine, sequence, receive):
        return
    values = bytes(sequence.tokens)
    if speech:
        await send_body(send, 200, b"audio/wav", _wav(values))
        return
    images = [
        {"b64_json": base64.b64encode(_png(values[index : index + 3])).decode(), "url": None, "revised_prompt": None}
        for index in range(min(request.n, 10))
    ]
    told = {"output_format": "png", "size": request.size, "cot_output": None, "metrics": None}
    await send_json(send, {"created": int(time.time()), "data": images, **told})


def _wav(values: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, _RATE, 0, "NONE", "not compressed"))
        sound.writeframes(values * (_RATE // len(values)))
    return file.getvalue()


def _png(colour: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + colour)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
