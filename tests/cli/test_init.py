"""`llmux-asgi init`: what it writes is a configuration, and nobody's file is lost."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux_asgi import load_config
from llmux_asgi.cli import app


def written(path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["init", str(path), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["init", *arguments])
    assert result.stderr.count("\n") == 1, result.stderr
    return result.exit_code, result.stderr


def test_without_a_terminal_it_asks_nothing_and_check_accepts_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    assert "llmux-asgi check" in written(path)
    assert CliRunner().invoke(app, ["check", str(path), "--offline"]).exit_code == 0
    assert tuple(load_config(path).models) == ("qwen", "llama")
    assert path.read_text().count("#") > 10
    assert [each.name for each in tmp_path.iterdir()] == ["llmux.yaml"]


@pytest.mark.parametrize("name", ["on", "123", "a: b", 'with "quotes"', "ü", "gpt-4.1", "~", "#1", "null"])
def test_every_name_is_written_as_the_text_that_it_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    told = json.loads(written(path, "--json", "--model", f"{name}=http://127.0.0.1:1"))
    assert told == {"path": str(path), "models": [name]}
    assert tuple(load_config(path).models) == (name,)


def test_options_take_the_place_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yml"
    options = ["--sleep-level", "2", "--request-timeout", "90.5", "--request-log", "re quests.jsonl"]
    written(path, "--yes", "--model", "a=vllm serve org/a --port {port}", "--model", "b=http://h:1", *options)
    config = load_config(path)
    assert config.models["a"].command == ("vllm", "serve", "org/a", "--port", "{port}")
    assert config.models["b"].url == "http://h:1"
    assert (config.policy.sleep_level, config.policy.request_timeout) == (2, 90.5)
    assert config.request_log == "re quests.jsonl"


def test_a_file_that_is_there_is_kept_unless_it_is_forced(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    path.write_text("mine")
    status, error = refused(str(path))
    assert (status, path.read_text()) == (2, "mine")
    assert "--force" in error
    written(path, "--force")
    assert path.read_text() != "mine"


def test_an_answer_that_cannot_be_used_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    path.write_text("mine")
    for model in ("a=http://h:1/v1", "a=vllm serve x", "a", "a=", "=http://h:1"):
        status, error = refused(str(path), "--force", "--model", model)
        assert status == 2, error
    assert "leave out /v1" in refused(str(path), "--force", "--model", "a=http://h:1/v1")[1]
    assert path.read_text() == "mine"
    assert refused(str(tmp_path / "llmux.toml"))[0] == 2
    assert refused(str(tmp_path / "gone" / "llmux.yaml"))[0] == 1


def test_on_a_terminal_it_asks(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from llmux_asgi.cli import main; main()", "init", str(path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.write(ours, b"mistral\nhttp://127.0.0.1:9001\nphi\n\n\n2\n\n")
    out, error = process.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, error
    assert out.decode().strip().startswith(f"{path} has mistral, phi.")
    config = load_config(path)
    assert {name: model.url for name, model in config.models.items()} == {
        "mistral": "http://127.0.0.1:9001",
        "phi": "http://127.0.0.1:8002",
    }
    assert config.policy.sleep_level == 2
