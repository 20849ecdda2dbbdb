"""A copy of what a clone has, the distributions that are built of it, and an environment like an empty container's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 300.0


def run(command: Sequence[str | Path], environment: Mapping[str, str], folder: Path, *, status: int = 0) -> str:
    """Run a command that has to end with `status`; returns its standard output, or standard error if that is not 0."""
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == status, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr if status else done.stdout


def tracked() -> list[str]:
    """The files that a clone would have: what git knows, and what is new and not ignored."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an empty container: a PATH, a HOME with nothing in it, and what leads pip to its index here."""
    folders = [path for path in os.environ["PATH"].split(os.pathsep) if not Path(path).is_relative_to(ROOT)]
    base = str(Path(getattr(sys, "_base_executable", sys.executable)).parent)
    path = os.pathsep.join([base, *(each for each in folders if each != base)])
    index = (
        "PIP_",
        "SSL_CERT",
        "REQUESTS_CA",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    )
    passed = {name: value for name, value in os.environ.items() if name.startswith(index)}
    return {**passed, "PATH": path, "HOME": str(tmp_path_factory.mktemp("home")), "LANG": "C.UTF-8"}


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, as a clone would have them."""
    folder = tmp_path_factory.mktemp("clone") / "llmux_asgi"
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


@pytest.fixture(scope="session")
def distributions(clone: Path, bare: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """What `python -m build` makes of the clone: the sdist, and the wheel out of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", folder, clone], bare, folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distributions(wheel, sdist)
