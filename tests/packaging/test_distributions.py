"""Wheel and sdist: what is in them, what they say of themselves, and that they work where nothing else is installed."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from importlib.metadata import version
from pathlib import Path

import pytest

from .conftest import Distributions, run, tracked

pytestmark = pytest.mark.packaging

EXTRAS = {"cli", "nvml", "otlp", "server", "yaml"}

IMPORTS = """
import importlib, json, pkgutil
import llmux_asgi
for name in llmux_asgi.__all__:
    getattr(llmux_asgi, name)
failed = {}
for module in pkgutil.walk_packages(llmux_asgi.__path__, "llmux_asgi."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed[module.name] = str(error)
print(json.dumps(failed))
"""


METRICS = """
from llmux_asgi import LLMuxApp
LLMuxApp({"models": {"qwen": {"url": "http://127.0.0.1:8001"}}, "metrics": {"path": "/metrics"}})
"""


def imported_by_us_only(module: str) -> bool:
    """Whether what imports it says what is missing: the command, or the gateway that is configured to need it."""
    return module.startswith("llmux_asgi.cli.") or module.endswith((".command", ".exposition")) or "._" in module


def members(archive: Path) -> set[str]:
    """The files of a wheel, or of an sdist without its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return set(opened.namelist())
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}


def package_files() -> set[str]:
    return {name for name in tracked() if name.startswith("llmux_asgi/")}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(distributions: Distributions) -> None:
    files = {name for name in members(distributions.wheel) if ".dist-info/" not in name}
    assert files == package_files()
    assert {"llmux_asgi/py.typed", "llmux_asgi/config.schema.json"} <= files


def test_the_sdist_has_what_is_needed_to_build_test_and_read_it(distributions: Distributions) -> None:
    wanted = {
        name
        for name in tracked()
        if name.startswith(("llmux_asgi/", "tests/", "examples/", "docs/")) or ("/" not in name and name != ".gitignore")
    }
    assert wanted - members(distributions.sdist) == set()


def test_the_license_is_in_both(distributions: Distributions) -> None:
    assert [name for name in members(distributions.wheel) if name.endswith(".dist-info/licenses/LICENSE")]
    assert "LICENSE" in members(distributions.sdist)


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_clone(
    distributions: Distributions, clone: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    """`distributions` has built its wheel out of the sdist."""
    run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, clone], bare, tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    assert members(direct) == members(distributions.wheel)


def test_the_metadata_is_what_an_index_takes(distributions: Distributions, bare: dict[str, str], tmp_path: Path) -> None:
    run([sys.executable, "-m", "twine", "check", "--strict", distributions.wheel, distributions.sdist], bare, tmp_path)
    with zipfile.ZipFile(distributions.wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(opened.read(name))
    assert metadata["Name"] == "llmux-asgi"
    assert metadata["Version"] == version("llmux-asgi")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra", [])) >= EXTRAS
    changelog = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(metadata['Version'])} ", changelog, re.MULTILINE)


def test_it_works_where_nothing_else_is_installed(distributions: Distributions, bare: dict[str, str], tmp_path: Path) -> None:
    """First without extras: all imports, and says what is missing where something is. Then with the command's extra."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python, command = environment / "bin" / "python", environment / "bin" / "llmux-asgi"
    run([python, "-m", "pip", "install", "--quiet", distributions.wheel], bare, tmp_path)
    run([python, "-m", "pip", "check"], bare, tmp_path)

    failed = json.loads(run([python, "-W", "error", "-c", IMPORTS], bare, tmp_path))
    assert "llmux_asgi.serving" in failed
    silent = [name for name, told in failed.items() if not imported_by_us_only(name) and "pip install" not in told]
    assert silent == []
    assert re.fullmatch(r"llmux-asgi: .*pip install '\.\[cli\]'\n", run([command, "--version"], bare, tmp_path, status=2))
    (tmp_path / "llmux.yaml").write_text("models: {qwen: {url: 'http://127.0.0.1:8001'}}")
    loading = "from llmux_asgi import load_config; load_config('llmux.yaml')"
    assert "needs PyYAML: pip install" in run([python, "-c", loading], bare, tmp_path, status=1)

    assert "pip install 'llmux-asgi[prometheus]'" in run([python, "-c", METRICS], bare, tmp_path, status=1)

    run([python, "-m", "pip", "install", "--quiet", f"{distributions.wheel}[cli]"], bare, tmp_path)
    assert run([command, "--version"], bare, tmp_path) == f"llmux-asgi {version('llmux-asgi')}\n"
    (installed,) = environment.glob("lib/python*/site-packages/llmux_asgi/config.schema.json")
    assert run([command, "schema"], bare, tmp_path) == installed.read_text()
    run([command, "check", "--offline", "llmux.yaml"], bare, tmp_path)
    failed = json.loads(run([python, "-W", "error", "-c", IMPORTS], bare, tmp_path))
    assert {name for name in failed if not name.startswith(("llmux_asgi.exposition", "llmux_asgi.otlp"))} == set()
