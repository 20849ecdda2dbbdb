"""A host app on a real port, in a thread of its own; and copies of example files that point to simulated servers."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import uvicorn

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimProcess

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PORTS = {"qwen": 8001, "llama": 8002}
"""Where the examples and the documentation say that the two servers listen."""
LIMIT = 20.0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def serving(app: Callable[..., Any], *, root_path: str = "", closing: LLMuxApp | None = None) -> Iterator[str]:
    """Serve `app` with uvicorn, lifespan included; yields its URL.

    `closing` is a gateway that the app's lifespan does not close: its idle connections would fail tests as unclosed ones.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", root_path=root_path)
        server = _Server(config)

        async def run() -> None:
            await server.serve(sockets=[listener])
            if closing is not None:
                await closing.aclose()

        def run_in_thread() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(run())

        thread = threading.Thread(target=run_in_thread, daemon=True)
        thread.start()
        try:
            assert server.ready.wait(LIMIT), "the host did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(LIMIT)
            assert not thread.is_alive(), "the host did not stop"


@contextmanager
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client for the gateway at `url` (without `/v1`). Nothing is tried twice."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT) as opened:
        yield opened


def ask(client: openai.OpenAI, model: str, text: str = "Say something.", tokens: int = 5) -> str:
    """A chat answer that does not stream."""
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], max_tokens=tokens)
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].message.content or ""


def ask_streaming(client: openai.OpenAI, model: str, text: str = "Say something.", tokens: int = 5) -> str:
    """The same, streaming."""
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=tokens, stream=True
    )
    with stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def check_both_models(url: str) -> None:
    """Both models answer through the gateway at `url`, streaming and not, each with words of its own."""
    with client(url) as gateway:
        assert sorted(card.id for card in gateway.models.list()) == ["llama", "qwen"]
        assert gateway.models.retrieve("qwen").id == "qwen"
        answers = {model: ask(gateway, model) for model in ("qwen", "llama", "gpt-4o")}
        assert answers["qwen"] == answers["gpt-4o"] != answers["llama"]
        assert {model: ask_streaming(gateway, model) for model in answers} == answers


def post(url: str, body: object = None) -> httpx.Response:
    return httpx.post(url, json=body or {}, timeout=LIMIT, trust_env=False)


def configuration(sims: Sequence[SimProcess]) -> dict[str, Any]:
    """The configuration of `examples/llmux.yaml`, in short, for simulated servers."""
    return {
        "models": {sim.name: {"url": sim.url, "aliases": ["gpt-4o"] if sim.name == "qwen" else []} for sim in sims},
        "policy": {"name": "fifo", "min_active_duration": 0},
    }


def pointed(text: str, sims: Sequence[SimProcess]) -> str:
    """`text` with the addresses of the simulated servers in place of the documented ones."""
    for sim in sims:
        documented = f"http://127.0.0.1:{PORTS[sim.name]}"
        assert documented in text
        text = text.replace(documented, sim.url)
    return text


def load_example(name: str, folder: Path, sims: Sequence[SimProcess]) -> ModuleType:
    """Import a copy of `examples/NAME.py`, next to a copy of the configuration that points to `sims`."""
    path = folder / f"{name}.py"
    shutil.copyfile(EXAMPLES / path.name, path)
    (folder / "llmux.yaml").write_text(pointed((EXAMPLES / "llmux.yaml").read_text(), sims))
    return load_module(path)


def load_module(path: Path) -> ModuleType:
    """Import the file at `path`. It is entered into `sys.modules`: Litestar and dataclasses look their modules up."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
