"""`llmux-asgi import`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux_asgi import load_config
from llmux_asgi.cli import app

from .samples import LLAMA_SWAP_GROUPS, LLMUX_0

runner = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "swap.yaml"
    path.write_text(LLAMA_SWAP_GROUPS)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_yaml_goes_to_standard_output_and_the_report_to_standard_error(source: Path) -> None:
    status, out, err = run(source)
    assert status == 0
    written = source.with_name("llmux.yaml")
    written.write_text(out)
    assert set(load_config(written).models) == {"one", "two"}
    assert "# Imported from swap.yaml (llama-swap)" in out
    assert "groups" in err
    assert "llama-swap, 2 models; fields: 2 with a note, 1 no counterpart." in err


def test_a_file_is_written_once(source: Path) -> None:
    output = source.with_name("out.yaml")
    status, out, err = run(source, "-o", output)
    assert (status, out) == (0, "")
    assert f"Written to {output}." in err.replace("\n", " ")
    assert load_config(output).models["one"].server == "llama.cpp"
    before = output.read_bytes()
    status, out, err = run(source, "--output", output)
    assert (status, out, err) == (2, "", f"import: {output}: File exists\n")
    assert output.read_bytes() == before


def test_json(tmp_path: Path) -> None:
    source = tmp_path / "config.json"
    source.write_text(json.dumps(LLMUX_0))
    status, out, err = run(source, "--json", "--from", "llmux")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["format"] == "llmux 0.3"
    assert load_config(told["config"]).models["small"].sleep_level == 2
    assert {"field", "status", "text"} == set(told["fields"][0])


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.yaml", "models: {", (), "a.yaml: not valid YAML: "),
        ("a.json", "{", (), "a.json: not valid JSON: "),
        ("a.json", '{"models": {"a": {"port": 1}}}', (), "a.json: not a configuration of llmux or llama-swap: "),
        (
            "a.yaml",
            LLAMA_SWAP_GROUPS,
            ("--from", "llmux"),
            "a.yaml: not a configuration of llmux: its models are of ",
        ),
        ("a.yaml", LLAMA_SWAP_GROUPS, ("-o", "x.json"), "x.json: the ending must be .yaml or .yml"),
        ("a.yaml", LLAMA_SWAP_GROUPS, ("-o", "no/x.yaml"), "no/x.yaml: No such file or directory"),
        ("gone.yaml", None, (), "gone.yaml: No such file or directory"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_status_2(
    name: str, text: str | None, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    status, out, err = run(name, *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"import: {message}")
    assert err.count("\n") == 1
