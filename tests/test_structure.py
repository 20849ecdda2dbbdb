"""The shape of the package: exports, layers, the tree of errors, no SDK."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmux_asgi
from llmux_asgi import exceptions

PACKAGE = Path(llmux_asgi.__file__).parent
MODULES = sorted(
    info.name for info in pkgutil.walk_packages([str(PACKAGE)], "llmux_asgi.") if not info.name.endswith("__main__")
)

# Imports go down only. What stands on one line may import what stands on earlier lines, and its own line.
LAYERS = [
    [
        "exceptions",
        "config._values",
        "config._access",
        "config._metrics",
        "config._warm_up",
        "config._parameters",
        "config._models",
        "_estimates",
    ],
    ["config._load", "config._changes"],
    ["config"],
    ["policy._vocabulary"],
    ["policy._base"],
    ["policy.fifo", "policy.gated_quantum", "policy.pressure", "policy.throughput"],
    ["policy._build"],
    [
        "policy",
        "_queue",
        "_statistics",
        "_state",
        "_shares",
        "_admission",
        "_forecast",
        "_backoff",
        "_names",
        "_instruments",
        "telemetry",
    ],
    ["_turn"],
    ["_routes", "_json_body", "_form_body", "_openai", "_errors", "_payload", "_parameters", "_timing"],
    [
        "_body",
        "upstream._protocol",
        "upstream._request",
        "upstream._parser",
        "upstream._pool",
        "upstream._asyncio",
        "upstream._streams",
        "upstream._http1",
        "upstream._httpx",
        "upstream",
        "_intake",
        "_waiting",
        "_websocket",
        "_spawn",
        "_notice",
        "_estimates_file",
        "_request_log",
        "_process",
        "_guardian",
        "_memory",
        "backends._protocol",
        "backends._http",
        "access._identity",
        "access._limits",
        "access._usage",
        "access._credentials",
        "access._keys",
        "access._control",
        "access",
    ],
    [
        "backends.vllm",
        "backends.sglang",
        "backends.llamacpp",
        "backends.ollama",
        "backends.hooks",
        "backends.managed",
        "backends.probe",
        "backends._build",
        "backends",
    ],
    ["_orders", "_journal", "_record", "_lease", "_decision", "_servers", "_steps", "_room", "_reconcile", "_driver"],
    ["_idle", "_inquiry", "_operations", "_target", "_proxy"],
    ["_turnover", "_reload", "switcher"],
    ["_answers", "_responses"],
    ["_responder"],
    ["middleware"],
    ["_realtime"],
    ["exposition._first_bytes", "exposition._merge", "exposition._scrape", "exposition._endpoint", "exposition"],
    [
        "admin._gateway",
        "admin._status",
        "admin._events",
        "admin._static",
        "admin._openapi",
        "admin._api",
        "admin._app",
        "admin",
    ],
    ["app"],
    [""],
    ["sim", "simulate", "importing", "serving"],
    ["otlp._replace", "otlp._exporter", "otlp._provider", "otlp"],
    ["cli"],
]
POLICIES = sorted(f"policy/{path.stem}" for path in (PACKAGE / "policy").glob("*.py"))
CONFIG = [
    "config/__init__",
    "config/_values",
    "config/_access",
    "config/_metrics",
    "config/_models",
    "config/_load",
    "config/_changes",
]
ACCESS = ["access/_identity", "access/_limits", "access/_usage", "access/_credentials"]
PURE = [
    "exceptions",
    *CONFIG,
    *ACCESS,
    *POLICIES,
    "_estimates",
    "_queue",
    "_statistics",
    "_state",
    "_shares",
    "_admission",
    "_forecast",
    "_routes",
    "_json_body",
    "_form_body",
    "_openai",
    "_errors",
    "_payload",
    "_timing",
    "_backoff",
]


def test_the_modules_of_which_contributing_says_where_they_belong_exist() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    table = text.partition("## Where things are")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+(?:\.py|/))`", table))
    modules = {path.name if path.is_file() else f"{path.name}/" for path in PACKAGE.iterdir() if path.name[0] != "."}
    assert len(named) > 40
    assert named - modules == set()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def layer_of(module: str) -> int:
    for level, names in enumerate(LAYERS):
        package = module.partition(".")[0]
        if module in names or (package in names and package in ("sim", "simulate", "importing", "cli")):
            return level
    raise AssertionError(f"{module} belongs to no layer: give it a place in LAYERS")


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, those of this package by their name within it."""
    package = ["llmux_asgi", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            bare = node.level and not node.module
            found |= {f"{name}.{alias.name}" for alias in node.names} if bare else {name}
    return found


def under_type_checking(path: Path) -> set[str]:
    """Imports for annotations only do not run."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {f"llmux_asgi.{n.module}" for b in blocks for n in b.body if isinstance(n, ast.ImportFrom) and n.level}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_of)
def test_imports_go_down_only(path: Path) -> None:
    level = layer_of(module_of(path))
    for name in imports_of(path) - under_type_checking(path):
        if name.split(".")[0] == "llmux_asgi":
            assert layer_of(name.removeprefix("llmux_asgi").removeprefix(".")) <= level, f"{path} imports {name}"


@pytest.mark.parametrize("module", PURE)
def test_the_pure_layer_does_no_io(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports_of(PACKAGE / f"{module}.py")}
    assert not roots & {"anyio", "asyncio", "httpx", "httpcore", "starlette", "trio", "socket", "time"}


def test_the_library_imports_the_api_of_opentelemetry_and_never_the_sdk() -> None:
    for path in PACKAGE.rglob("*.py"):
        # They are imported where they are asked for: /metrics, and what sends spans.
        if path.parent.name not in ("exposition", "otlp") and path.name != "_tracing.py":
            assert not any(name.startswith("opentelemetry.sdk") for name in imports_of(path)), path
    unwanted = ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus_client", "yaml", "typer")
    code = f"import sys; from llmux_asgi import *; print([m for m in sys.modules if m.startswith({unwanted})])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[]"


def test_a_gateway_imports_only_what_its_configuration_asks_for() -> None:
    unwanted = ("llmux_asgi.admin", "llmux_asgi.exposition", "llmux_asgi.cli", "llmux_asgi.importing", "llmux_asgi.sim")
    servers = {f"llmux_asgi.backends.{kind}" for kind in ("hooks", "llamacpp", "managed", "ollama", "probe", "sglang")}
    code = (
        "import sys; from llmux_asgi import LLMuxApp; LLMuxApp({'models': {'a': {'url': 'http://127.0.0.1:1'}}});"
        f"print([m for m in sys.modules if m.startswith({unwanted}) or m in {servers}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["llmux_asgi", *MODULES])
def test_what_is_exported_exists_is_sorted_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", [])
    # Constants, classes, functions; each by name: the order that ruff keeps.
    assert exported == sorted(exported, key=lambda each: (not each.isupper(), not each[0].isupper(), each))
    for each in exported:
        value = getattr(module, each)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{each} has no docstring"


def test_the_tree_in_the_docstring_of_the_errors_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (exceptions.__doc__ or "").splitlines():
        name = line.strip("│├└─ ").split(" ")[0]
        if not name.endswith("Error"):
            continue
        depth = line.index(name)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        drawn[name] = stack[-1][1] if stack else "Exception"
        stack.append((depth, name))
    real = {name: getattr(exceptions, name).__base__.__name__ for name in exceptions.__all__}
    assert drawn == real
