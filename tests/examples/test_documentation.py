"""README and docs/ say what the code does: their code runs, their tables are complete, their links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

import llmux_asgi
from llmux_asgi import (
    HooksBackend,
    LlamaCppBackend,
    LLMuxApp,
    OllamaBackend,
    SGLangBackend,
    cli,
    exceptions,
    json_schema,
    load_config,
)
from llmux_asgi import (
    _names as names_of_telemetry,
)
from llmux_asgi._errors import describe
from llmux_asgi._instruments import METRICS
from llmux_asgi._routes import ROUTES, find_route
from llmux_asgi.admin import Status
from llmux_asgi.admin._openapi import description
from llmux_asgi.backends import build_backend
from llmux_asgi.sim import SimProcess

from .hosting import ROOT, check_both_models, load_module, pointed, serving

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page, without those that include a file."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.startswith("--8<--")]


def rows(page: Path) -> list[list[str]]:
    """The table rows of a page, cell by cell."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_host_written_from_the_readme_serves_both_models(
    tmp_path: Path, sims: list[SimProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (configuration,) = blocks(README, "yaml")
    Path("llmux.yaml").write_text(pointed(configuration, sims))
    *hosts, client = blocks(README, "python")
    assert [re.findall("starlette|fastapi|litestar", host)[0] for host in hosts] == ["starlette", "fastapi", "litestar"]
    for number, host in enumerate(hosts):
        path = Path(f"readme_host_{number}.py")
        path.write_text(host)
        with serving(load_module(path.resolve()).app) as url:
            check_both_models(f"{url}/llm")
            assert "http://127.0.0.1:8000" in client
            exec(client.replace("http://127.0.0.1:8000", url), {})  # noqa: S102 - this repository's own README
            assert re.findall("^qwen|^llama", capsys.readouterr().out, re.MULTILINE) == ["qwen", "llama"]


def test_code_that_stands_in_the_pages_runs() -> None:
    code = [(page.name, block) for page in PAGES if page != README for block in blocks(page, "python")]
    assert [name for name, _ in code] == ["simulated-vllm.md", "simulator.md", "simulator.md"]
    for _, block in code:
        exec(block, {})  # noqa: S102 - this repository's own documentation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_includes_and_links_to_exists(page: Path) -> None:
    text = page.read_text()
    for path, _, section in (found.partition(":") for found in re.findall(r'^--8<-- "(.*?)"', text, re.MULTILINE)):
        included = (ROOT / path).read_text()
        assert not section or (f"[start:{section}]" in included and f"[end:{section}]" in included)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_tests_that_the_pages_name_exist() -> None:
    named = {test for page in PAGES for test in re.findall(r"`([\w/]+\.py)::(test_\w+)`", page.read_text())}
    assert len(named) > 50
    for path, name in named:
        assert re.search(rf"^ *(async )?def {name}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_each_kind_of_other_server_is_configured_as_the_page_says() -> None:
    """Nothing is asked of a server here: the contract tests do that."""
    kinds: list[type] = []
    for block in blocks(ROOT / "docs" / "other-servers.md", "yaml"):
        config = load_config(yaml.safe_load(block))
        built = {type(build_backend(name, model, sleep_level=1)) for name, model in config.models.items()}
        assert len(config.models) > 1
        assert len(built) == 1
        kinds += built
    assert kinds == [LlamaCppBackend, OllamaBackend, SGLangBackend, HooksBackend]


def test_the_status_that_is_shown_has_all_its_fields() -> None:
    (shown,) = blocks(ROOT / "docs" / "admin.md", "json")
    status = json.loads(shown)
    assert json.loads(msgspec.json.encode(msgspec.convert(status, Status))) == status


def test_the_calls_of_the_admin_api_are_those_of_its_description() -> None:
    calls = [row[0].strip("`").partition("?")[0] for row in rows(ROOT / "docs" / "admin.md") if "/api/" in row[0]]
    shown = {tuple(call.split(" ")) for call in calls}
    paths = {path.replace("{model}", "NAME"): methods for path, methods in description()["paths"].items()}
    assert shown == {(method.upper(), path) for path, methods in paths.items() for method in methods}


def test_the_commands_of_the_admin_page_work(tmp_path: Path, sims: list[SimProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    key = "llmux-admin-0123456789"
    monkeypatch.setenv("LLMUX_ADMIN_KEY", key)
    config = tmp_path / "admin.yaml"
    config.write_text(pointed((ROOT / "examples" / "admin.yaml").read_text(), sims))
    llm = LLMuxApp(config)
    script = "".join(blocks(ROOT / "docs" / "admin.md", "sh"))
    assert script.count("--max-time 10 ") == 1
    with serving(llm) as url:
        script = script.replace("http://127.0.0.1:8000", url).replace("--max-time 10 ", "--max-time 0.5 ")
        ran = subprocess.run(
            ["bash", "-e", "-o", "pipefail"], input=script, capture_output=True, text=True, timeout=60, check=False
        )
    assert ran.returncode == 28, ran.stdout + ran.stderr  # curl's time was over, in the stream of events
    assert ran.stdout.startswith('{"version":')
    assert '"pinned":true' in ran.stdout
    assert '"drained":true' in ran.stdout
    assert "event: drain" in ran.stdout
    assert not llm.switcher.draining


def shown_commands() -> list[tuple[str, str]]:
    """Each command line of `llmux-asgi` in the pages, with the name of its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh(?: [^\n]*)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.startswith("llmux-asgi ")]
    return found


def test_the_commands_of_the_pages_have_these_options() -> None:
    shown = shown_commands()
    assert {line.split()[1] for _, line in shown} >= {"check", "import", "init", "serve", "sim-vllm", "simulate", "validate"}
    for page, line in dict.fromkeys(shown):
        words = shlex.split(line.partition(" > ")[0], comments=True)
        # `--help` behind them is enough to have the options parsed, and nothing done.
        result = CliRunner().invoke(cli.app, [*words[1:], "--help"])
        assert result.exit_code == 0, f"{page}: {line}\n{result.output}"


def test_the_make_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets, page.name
    told = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert targets - told - {"help"} == set()


@pytest.mark.parametrize("name", ["choosing-a-policy", "policies", "preemption", "sleep-levels"])
def test_what_a_page_says_of_the_configuration_can_be_configured(name: str) -> None:
    found = blocks(ROOT / "docs" / f"{name}.md", "yaml")
    assert found
    for block in found:
        load_config({"models": {"qwen": {"url": "http://127.0.0.1:8001"}}, **yaml.safe_load(block)})


def test_the_python_reference_has_every_public_name() -> None:
    pages = (ROOT / "docs" / "python").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    whole = {name: importlib.import_module(name) for name in shown if name.rpartition(".")[2].islower()}
    assert len(whole) >= 10
    for name in llmux_asgi.__all__:
        homes = [module for module in whole.values() if name in module.__all__]
        assert homes or f"llmux_asgi.{name}" in shown, f"{name}: name it in docs/python/index.md"
    for name in shown - whole.keys():
        assert name.removeprefix("llmux_asgi.") in llmux_asgi.__all__, name


# Tables


def configuration_keys() -> dict[str, str]:
    """Every key of the configuration with its default, as JSON; the structs that only hold others left out."""
    prefixes = {
        "Config": "",
        "ModelConfig": "models.NAME.",
        "TimeoutsConfig": "models.NAME.timeouts.",
        "CostsConfig": "models.NAME.costs.",
        "PolicyConfig": "policy.",
        "LimitsConfig": "limits.",
        "HooksConfig": "models.NAME.hooks.",
        "WarmUpConfig": "models.NAME.warm_up.",
        "MemoryConfig": "memory.",
        "MetricsConfig": "metrics.",
        "MetricsKeyConfig": "metrics.key.",
        "AccessConfig": "access.",
        "KeyConfig": "access.keys.NAME.",
        "AdminConfig": "admin.",
        "AdminKeyConfig": "admin.keys.NAME.",
        "SecretConfig": "models.NAME.api_key.",
        "ModelParametersConfig": "models.NAME.parameters.",
        "ParametersConfig": "models.NAME.parameters.",  # the same ones by alias
    }
    structs = json_schema()["$defs"]
    assert structs.keys() == prefixes.keys()
    keys: dict[str, str] = {}
    for name, struct in structs.items():
        for key, value in struct["properties"].items():
            if not _holds_a_struct(value):
                default = json.dumps(value["default"]) if "default" in value else "required"
                keys[prefixes[name] + key] = default
    return keys


def _holds_a_struct(schema: dict[str, Any]) -> bool:
    return "$ref" in schema or "$ref" in str(schema.get("allOf"))


def test_the_table_of_the_configuration_is_complete_and_has_the_right_defaults() -> None:
    keys = configuration_keys()
    documented = {row[0].strip("`"): row for row in rows(ROOT / "docs" / "configuration.md") if row[0].startswith("`")}
    assert {key: row[1].strip("`") for key, row in documented.items()} == keys
    for key, (_, default, unit, meaning) in documented.items():
        assert meaning.endswith("."), key
        timed = key.startswith(("models.NAME.timeouts.", "models.NAME.costs.", "limits.backoff", "priorities"))
        timed = timed or key.endswith(
            (
                "timeout",
                "duration",
                "interval",
                "shutdown",
                "settle",
                "linger",
                "ttl",
                "max_wait",
                "heartbeat",
                "max_frozen",
                "websocket_idle",
            )
        )
        assert (unit == "seconds") == timed, key
        assert default == "required" or default.startswith("`"), key


def test_the_short_table_of_the_readme_leaves_no_key_out() -> None:
    documented = {row[0].strip("`"): row[2] for row in rows(README) if row[0].startswith("`")}
    keys = set(configuration_keys()) - {"models"}
    assert set(documented) <= keys | {"models.NAME.timeouts", "models.NAME.costs", "access.keys.NAME", "admin.keys.NAME"}

    def is_told(key: str) -> bool:
        """Whether it has a row of its own, or is named in one of its section's."""
        section, _, name = key.rpartition(".")
        return key in documented or any(f"`{name}`" in text for row, text in documented.items() if row.startswith(section))

    assert [key for key in keys if not is_told(key)] == []


def test_every_error_is_in_the_table_of_what_the_client_sees() -> None:
    page = rows(ROOT / "docs" / "how-a-switch-works.md")
    documented = {(row[0], row[1].strip("`")): row[-1] == "yes" for row in page if row[0].isdecimal()}
    made: dict[type[exceptions.LLMuxError], exceptions.LLMuxError] = {
        exceptions.PolicyError: exceptions.PolicyError("why"),
        exceptions.InvalidRequestError: exceptions.InvalidRequestError("why"),
        exceptions.BodyTooLargeError: exceptions.BodyTooLargeError(1),
        exceptions.AuthenticationError: exceptions.AuthenticationError("why"),
        exceptions.PermissionDeniedError: exceptions.PermissionDeniedError("why", code="model_not_allowed", param="model"),
        exceptions.RateLimitError: exceptions.RateLimitError("k", "why", retry_after=1.0),
        exceptions.UnknownRouteError: exceptions.UnknownRouteError("GET", "/x"),
        exceptions.MethodNotAllowedError: exceptions.MethodNotAllowedError("GET", "/x", ("POST",)),
        exceptions.BodyTimeoutError: exceptions.BodyTimeoutError(1.0),
        exceptions.EncodedBodyError: exceptions.EncodedBodyError(),
        exceptions.HeadersTooLargeError: exceptions.HeadersTooLargeError(1),
        exceptions.BuffersFullError: exceptions.BuffersFullError(1),
        exceptions.UnknownModelError: exceptions.UnknownModelError("m"),
        exceptions.UnservedRouteError: exceptions.UnservedRouteError("m", "/x", ("embed",)),
        exceptions.UnknownResponseError: exceptions.UnknownResponseError("r"),
        exceptions.QueueFullError: exceptions.QueueFullError("m", "why"),
        exceptions.QueueTimeoutError: exceptions.QueueTimeoutError("m", 1.0, "why"),
        exceptions.SwitchError: exceptions.SwitchError("m", "why"),
        exceptions.DrainingError: exceptions.DrainingError(),
        exceptions.OperationError: exceptions.OperationError("why"),
        exceptions.InterruptedRequestError: exceptions.InterruptedRequestError("m"),
        exceptions.UpstreamError: exceptions.UpstreamError("m", "why"),
    }
    # These never reach a client: a configuration is refused at the start, and a backend's error fails a switch.
    internal = {"LLMuxError", "ConfigError", *(name for name in exceptions.__all__ if name.startswith("Backend"))}
    assert {kind.__name__ for kind in made} == set(exceptions.__all__) - internal
    expected: dict[tuple[str, str], bool] = {}
    expected["403", "priority_not_allowed"] = False  # told by the same class as the model
    for error in made.values():
        answer = describe(error)
        code = json.loads(answer.body)["error"]["code"]
        expected[str(answer.status), "null" if code is None else code] = answer.retry_after is not None
    assert documented == expected


def test_every_span_attribute_and_metric_is_documented() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("tracing.md", "metrics.md"))
    names = [
        value
        for name, value in vars(names_of_telemetry).items()
        if name.isupper() and name[0] != "_" and isinstance(value, str) and name != "SCOPE"
    ]
    assert len(names) > 20
    assert [name for name in names if name not in text] == []


def test_the_table_of_the_instruments_is_the_list_of_the_code() -> None:
    documented = [row for row in rows(ROOT / "docs" / "metrics.md") if len(row) == 6 and row[0].startswith("`")]
    assert [(row[0].strip("`"), *row[1:3], tuple(re.findall(r"`([^`]+)`", row[3])), row[5]) for row in documented] == [
        (each.name, each.kind, each.unit, each.attributes, each.description) for each in METRICS
    ]


def api_routes(columns: int) -> list[list[str]]:
    """The rows of the API's tables that have so many columns: 5 for what is relayed, 3 for the rest."""
    return [row for row in rows(ROOT / "docs" / "api.md") if len(row) == columns and row[1].startswith("`")]


def test_the_table_of_the_relayed_routes_is_the_list_of_the_code() -> None:
    assert [(row[0], row[1].strip("`"), row[2], row[3]) for row in api_routes(5)] == [
        (route.method, route.path, {"json": "JSON", "form": "form", None: "none"}[route.body], route.task or "any")
        for route in ROUTES
    ]


def test_a_route_that_is_said_to_be_refused_is_none_of_the_gateways() -> None:
    refused = [(method, path.strip("`")) for method, path, _ in api_routes(3)]
    assert len(refused) == len(set(refused)) > 50
    assert [path for method, path in refused if find_route(method, path) is not None] == []
