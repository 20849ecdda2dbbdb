"""What holds for all formats: every documented field is told of, and the result is a configuration of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from llmux_asgi import load_config
from llmux_asgi.importing import FIELDS, ConfigImportError, convert, detect_format
from llmux_asgi.importing._render import render

from .samples import LLAMA_SWAP, LLMUX_0, LLMUX_2, SAMPLES

ENVIRONMENT = {"MODELS": "/srv/models"}
ALL = [(kind, sample) for kind, samples in SAMPLES.items() for sample in samples]


def parsed(sample: Any) -> Any:
    return yaml.safe_load(sample) if isinstance(sample, str) else sample


@pytest.mark.parametrize(("kind", "sample"), ALL)
def test_a_sample_is_recognized_and_becomes_a_configuration(kind: str, sample: Any, tmp_path: Path) -> None:
    imported = convert(parsed(sample), environment=ENVIRONMENT)
    assert imported.format == kind
    assert imported.config == load_config(imported.data)
    path = tmp_path / "llmux.yaml"
    path.write_text(render(imported.data, imported.findings, source="x", described=kind))
    assert load_config(path) == imported.config


@pytest.mark.parametrize("kind", FIELDS)
def test_every_documented_field_is_in_a_sample_and_in_the_report(kind: Any) -> None:
    rows = {field.key: field for field in FIELDS[kind]}
    assert len(rows) == len(FIELDS[kind])
    told = {finding.field for sample in SAMPLES[kind] for finding in convert(parsed(sample), environment=ENVIRONMENT).findings}
    models = {name for sample in SAMPLES[kind] for name in parsed(sample)["models"]}
    for key in rows:
        head, _, rest = key.partition(".NAME.")
        paths = {f"{head}.{name}.{rest}" for name in models} if rest else {key}
        assert told & paths, key


def test_each_field_has_one_line_in_the_report_and_unknown_ones_have_one_too() -> None:
    raw = {**LLMUX_2, "bind_address": "::", "models": {"a.b": {**LLMUX_2["models"]["small"], "extra": {"x": 1}}}}
    findings = convert(raw, environment={}).findings
    fields = [finding.field for finding in findings]
    assert len(fields) == len(set(fields))
    unknown = {finding.field for finding in findings if finding.text == "this field is not known here"}
    assert unknown == {"bind_address", "models.a.b.extra"}


@pytest.mark.parametrize(
    ("raw", "program", "message"),
    [
        ([], None, "not a configuration of llmux or llama-swap: it has no mapping `models` with a model in it"),
        ({"models": {}}, "llmux", "not a configuration of llmux: it has no mapping"),
        ({"models": {"a": {"port": 1}}}, None, r"models\.a has none of `cmd` \(llama-swap\), `model_path` .* \(llmux 2\.x\)"),
        ({"models": {"a": None}}, None, r"models\.a has none of"),
        (LLMUX_0, "llama-swap", "not a configuration of llama-swap: its models are of llmux 0.3"),
        (
            {"models": {"a": {"cmd": "x"}, "b": {"model_path": "y", "port": 1}}},
            None,
            r"models\.a is of llama-swap, models\.b is of llmux 0\.3",
        ),
    ],
)
def test_what_is_of_neither_program_is_refused(raw: Any, program: Any, message: str) -> None:
    with pytest.raises(ConfigImportError, match=message):
        detect_format(raw, program)


def test_no_secret_of_the_source_gets_into_the_file_or_the_report() -> None:
    for sample, secrets in ((LLAMA_SWAP, ("sk-never-copied", "secret")), (SAMPLES["llmux 0.3"][1], ("hush",))):
        imported = convert(parsed(sample), environment=ENVIRONMENT)
        text = render(imported.data, imported.findings, source="x", described="y") + repr(imported.findings)
        assert not any(secret in text for secret in secrets)


def test_comments_stand_at_the_model_that_they_are_about_and_stay_comments() -> None:
    model = {"port": 1, "wake": "w", "sleep": "s", "alive": "a", "odd\u2028key\x07": 1}
    imported = convert({"models": {"one": model, "one.two": model | {"port": 2}}, "bogus\n# x": 1}, environment={})
    text = render(imported.data, imported.findings, source="odd\nname.yaml", described="llmux")
    assert load_config(yaml.safe_load(text)) == imported.config
    before, one, two = text.partition("  one:")[0], text.partition("  one:")[2], text.partition("  one.two:")[2]
    assert "# Imported from odd name.yaml" in before
    assert "bogus # x: this field" in before
    assert "odd key : left out" in before  # above `one`
    assert "odd key : left out" in one.partition("  one.two:")[0]  # above `one.two`
    assert "odd key" not in two


def test_data_is_plain() -> None:
    imported = convert(parsed(LLAMA_SWAP), environment=ENVIRONMENT)
    assert msgspec.json.decode(msgspec.json.encode(imported.data)) == imported.data


def with_each_value_replaced(node: Any, value: Any) -> Iterator[Any]:
    """Copies of a tree, in each of which another node is `value`."""
    yield value
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        for changed in with_each_value_replaced(child, value):
            copy = node.copy()
            copy[key] = changed
            yield copy


@pytest.mark.parametrize("kind", SAMPLES)
def test_whatever_stands_where_something_else_belongs_is_said_and_not_a_crash(kind: str) -> None:
    results = {True: 0, False: 0}
    for value in (None, True, -3, "${PORT}", [None], {"x": [1]}):
        for raw in with_each_value_replaced(parsed(SAMPLES[kind][0]), value):
            try:
                convert(raw, environment=ENVIRONMENT)
            except ConfigImportError:
                results[False] += 1
            else:
                results[True] += 1
    assert all(results.values())
