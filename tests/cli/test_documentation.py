"""docs/command-line.md: its commands run, print what it shows, and its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from llmux_asgi.access import hash_key
from llmux_asgi.cli import _serve, app
from llmux_asgi.cli._findings import Kind
from llmux_asgi.config import json_schema
from llmux_asgi.sim import SimOptions, start_sims
from llmux_asgi.sim.vllm import ready_line

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
TEXT = PAGE.read_text()
COMMANDS = [each.name or each.callback.__name__ for each in app.registered_commands if each.callback is not None]


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("llmux-asgi")]


def shown() -> list[tuple[str, str]]:
    """Each command that is followed by what it prints."""
    return re.findall(r"^```sh\n(llmux-asgi [^\n]*)\n```\n\n```text\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[str]:
    """The first column of the table below a line."""
    table = TEXT.partition(heading)[2].partition("\n\n")[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def codes(heading: str) -> list[str]:
    """What the first column of the table below a line names."""
    return sorted(code for cell in rows(heading) for code in re.findall(r"`([\w-]+)`", cell))


def plain(text: str) -> list[list[str]]:
    """Words by line: without the widths of columns, and with every time the same."""
    text = re.sub(r"─+", "─", re.sub(r"\d+\.\d\d s", "0.02 s", text))
    return [line.split() for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """Where the page's servers are, by where it says that they are."""
    with start_sims(*(SimOptions(name=name, start_asleep=1) for name in ("qwen", "llama"))) as sims:
        yield dict(zip(("http://127.0.0.1:8001", "http://127.0.0.1:8002"), (sim.url for sim in sims), strict=True))


def replaced(text: str, urls: dict[str, str]) -> str:
    for there, here in urls.items():
        text = text.replace(there, here)
    return text


def test_what_the_page_shows_is_what_the_commands_print(
    urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (faulty,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    Path("faulty.yaml").write_text(replaced(faulty, urls))
    ran = []
    for command, output in shown():
        name = command.split()[1]
        if name in ("serve", "status"):
            continue  # a process of its own, in test_serve and test_operator
        result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert plain(result.stdout) == plain(replaced(output, urls)), command
        ran.append((name, result.exit_code))
        if name == "init":
            Path("llmux.yaml").write_text(replaced(Path("llmux.yaml").read_text(), urls))
    assert ran == [("init", 0), ("check", 0), ("check", 1), ("validate", 0)]


def test_the_line_of_serve_is_the_one_that_the_page_shows() -> None:
    (line,) = (output for command, output in shown() if command.split()[1] == "serve")
    assert _serve.ready_line(["qwen", "llama"], "http://127.0.0.1:8000", None) + "\n" == line


def test_every_command_of_the_page_has_its_options(tmp_path: Path) -> None:
    for command in commands():
        arguments = shlex.split(command)[1:]
        result = CliRunner().invoke(app, [*arguments, "--help"])
        assert result.exit_code == 0, command
        names = [each for each in arguments if each.startswith("--")]
        assert [name for name in names if name not in result.output] == [], command


def test_the_tables_have_every_command_and_every_kind_of_finding() -> None:
    assert codes("llmux-asgi --help") == sorted(COMMANDS)
    assert codes("## Exit status") == sorted(COMMANDS)
    assert codes("for scripts:") == sorted(get_args(Kind))


def test_every_command_prints_json_and_tells_its_exit_status() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert sorted(group.commands) == sorted(COMMANDS)
    for name, command in group.commands.items():
        assert "--json" in [option for parameter in command.params for option in parameter.opts], name
        assert "Exit status: 0" in " ".join((command.help or "").split()), name


def test_commands_that_have_little_to_say_say_it_as_json() -> None:
    said = CliRunner().invoke(app, ["hash-key", "--json"]).stdout
    made = json.loads(said)
    assert hash_key(made["key"]) == made["hash"]
    said = CliRunner().invoke(app, ["hash-key", "--stdin", "--json"], input=made["key"]).stdout
    assert json.loads(said) == {"hash": made["hash"]}
    assert json.loads(CliRunner().invoke(app, ["schema", "--json"]).stdout)["title"] == json_schema()["title"]
    ready = json.loads(_serve.ready_line(["a"], "http://h:1/llm", "http://h:1/llm/admin", as_json=True))
    assert ready == {"models": ["a"], "url": "http://h:1/llm/v1", "admin": "http://h:1/llm/admin"}
    assert json.loads(ready_line("a", "::1", 80, as_json=True)) == {"name": "a", "url": "http://[::1]:80"}
