"""`/v1/realtime`: a WebSocket that takes audio and gives its text, as vLLM 0.32 has it.

The server says `session.created`. The client sends `session.update` with the model, `input_audio_buffer.commit` to begin,
`input_audio_buffer.append` with audio (PCM of 16 bits at 16 kHz, base64), and `commit` with `final` true at its end. Then
come `transcription.delta` and `transcription.done`. A real server may send the first words before the audio has ended.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from hashlib import blake2b
from typing import Any

import msgspec
from starlette.types import Receive, Send

from . import text
from .engine import Engine, EngineDeadError
from .sequence import Sequence
from .wire import new_id, usage_of

__all__ = ["realtime"]

_TOKENS = 12


class _Event(msgspec.Struct):
    type: str | None = None
    model: str | None = None
    audio: str = ""
    final: bool = False


class _Session:
    """One connection."""

    def __init__(self, engine: Engine, send: Send) -> None:
        self._engine, self._send_message = engine, send
        self._audio: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._named = False
        self._task: asyncio.Task[None] | None = None
        self._sequence: Sequence | None = None

    async def send(self, kind: str, **fields: Any) -> None:
        """Send an event."""
        content = msgspec.json.encode({"type": kind, **fields}).decode()
        await self._send_message({"type": "websocket.send", "text": content})

    async def _refuse(self, message: str, code: str) -> None:
        await self.send("error", error=message, code=code)

    async def take(self, message: str) -> None:
        """Do what an event of the client asks for."""
        try:
            event = msgspec.json.decode(message, type=_Event)
        except msgspec.ValidationError as error:
            await self._refuse(str(error), "processing_error")
            return
        except msgspec.DecodeError:
            await self._refuse("Invalid JSON", "invalid_json")
            return
        if event.type == "session.update":
            await self._update(event.model)
        elif event.type == "input_audio_buffer.append":
            try:
                self._audio.put_nowait(base64.b64decode(event.audio, validate=True) or _raise())
            except (binascii.Error, ValueError):
                await self._refuse("Invalid audio data", "invalid_audio")
        elif event.type == "input_audio_buffer.commit":
            await self._commit(event.final)
        else:
            await self._refuse(f"Unknown event type: {event.type}", "unknown_event")

    async def _update(self, model: str | None) -> None:
        if model is None:
            await self._refuse("Missing required field: model", "invalid_event")
        elif model != self._engine.options.name:
            await self._refuse(f"The model `{model}` does not exist.", "model_not_found")
        else:
            self._named = True

    async def _commit(self, final: bool) -> None:
        if not self._named:
            message = "Model not validated. Make sure to validate the model by sending a session.update event."
            await self._refuse(message, "model_not_validated")
        elif final:
            self._audio.put_nowait(None)
        elif self._task is None or self._task.done():
            self._task = asyncio.create_task(self._transcribe())

    async def _transcribe(self) -> None:
        heard = blake2b(digest_size=8)
        while (chunk := await self._audio.get()) is not None:
            heard.update(chunk)
        try:
            sequence = self._sequence = self._engine.submit(heard.hexdigest(), _TOKENS)
        except EngineDeadError:
            await self._refuse("EngineCore encountered an issue.", "processing_error")
            return
        sent = 0
        while sent < sequence.total:
            ready = await self._engine.produced(sequence, sent + 1)
            for token in sequence.tokens[sent:ready]:
                await self.send("transcription.delta", delta=text.TOKENS[token])
            sent = ready
            if sequence.finish is not None:
                break
        if sequence.finish == "error":
            await self._refuse("EngineCore encountered an issue.", "processing_error")
            return
        words = "".join(text.TOKENS[token] for token in sequence.tokens[:sent])
        await self.send("transcription.done", text=words, usage=usage_of(len(sequence.prompt), sent))

    async def end(self) -> None:
        """The client has gone: stop."""
        if self._sequence is not None:
            self._engine.drop(self._sequence)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def _raise() -> bytes:
    raise ValueError("empty audio")


async def realtime(engine: Engine, receive: Receive, send: Send) -> None:
    """Serve one WebSocket until its client leaves."""
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})
    session = _Session(engine, send)
    await session.send("session.created", id=new_id("sess-"), created=int(time.time()))
    try:
        while (message := await receive())["type"] == "websocket.receive":
            await session.take(message.get("text") or "")
    finally:
        await session.end()
