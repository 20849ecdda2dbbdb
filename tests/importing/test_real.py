"""What was imported runs: real llama.cpp servers, as llama-swap started them, switched by the gateway."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml

from llmux_asgi import LLMuxApp
from llmux_asgi.importing import convert
from tests.examples.hosting import serving
from tests.support.serve import free_port


@pytest.mark.vllm
def test_llama_servers_of_llama_swap_are_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.real.llama_cpp import ensure_llama_server, missing_tools
    from tests.real.tiny_gguf import write_tiny_gguf

    if missing := missing_tools():
        pytest.skip(f"building the real llama-server needs {', '.join(missing)}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for seed, name in enumerate(("alpha", "beta", "gamma")):
        write_tiny_gguf(tmp_path / f"{name}.gguf", seed)
    for name in ("llama-server", "unknown-server"):
        (tmp_path / name).symlink_to(ensure_llama_server())
    source = f"""
        startPort: {free_port()}
        macros:
          server: {tmp_path}/llama-server --port ${{PORT}} --ctx-size 256
        models:
          one: {{cmd: "${{server}} --alias one -m {tmp_path}/alpha.gguf"}}
          two: {{cmd: "${{server}} -m {tmp_path}/beta.gguf", aliases: [deux]}}
          three: {{cmd: "{tmp_path}/unknown-server --port ${{PORT}} -c 256 -m {tmp_path}/gamma.gguf --alias gamma"}}
    """
    config = convert(yaml.safe_load(source), environment={}).config
    assert [model.hooks is not None for model in config.models.values()] == [False, False, True]
    with serving(LLMuxApp(config)) as url:
        # The last one leaves no server behind: those that hooks run outlive the gateway.
        for name, answers in (("one", "alpha"), ("deux", "beta"), ("three", "gamma"), ("one", "alpha")):
            body = {"model": name, "prompt": "a", "max_tokens": 2}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == answers
