"""A WebSocket client of vLLM's realtime API."""

from __future__ import annotations

import base64
import json
from typing import Any

from websockets.sync.client import connect

from .conftest import MODELS, Gateway


def test_audio_becomes_text_as_it_is_heard(gateway: Gateway) -> None:
    sound = base64.b64encode(bytes(3200)).decode()
    heard = set()
    for name in (*MODELS, *MODELS):
        with connect(f"{gateway.v1.replace('http', 'ws')}/realtime?model={name}") as socket:

            def hear(socket: Any = socket) -> dict[str, Any]:
                event: dict[str, Any] = json.loads(socket.recv(10))
                return event

            assert hear()["type"] == "session.created"
            for event in (
                {"type": "session.update", "model": name},
                {"type": "input_audio_buffer.commit"},
                {"type": "input_audio_buffer.append", "audio": sound},
                {"type": "input_audio_buffer.commit", "final": True},
            ):
                socket.send(json.dumps(event))
            words = ""
            while (told := hear())["type"] == "transcription.delta":
                words += told["delta"]
            assert (told["type"], told["text"]) == ("transcription.done", words)
        heard.add(words)
    assert len(heard) == len(MODELS)
