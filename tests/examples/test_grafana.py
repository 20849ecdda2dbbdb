"""The dashboard for Grafana asks for nothing that `/metrics` does not have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimProcess

from .hosting import EXAMPLES, LIMIT, ask_streaming, client, serving

DASHBOARD = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<string>"(?:[^"\\]|\\.)*") | (?P<number>\d+(?:\.\d+)?(?![\w.])) | (?P<duration>\d+[smhd])
    | (?P<name>[a-zA-Z_:][\w:]*) | (?P<sign>=~|!~|!=|>=|<=|==|[=<>(){}\[\],*/+-])""",
    re.VERBOSE,
)
FUNCTIONS = {"rate", "increase", "histogram_quantile", "sum", "max", "min"}
WORDS = {"or", "by"}
OF_THE_TARGET = {"job", "instance"}
"""Labels that Prometheus adds to all that it scrapes."""
Labels = dict[str, set[str]]


def tokens(query: str) -> list[tuple[str, str]]:
    """Kind and text of each token of a PromQL query, Grafana's variables in place."""
    query = re.sub(r"\$(__rate_interval|__range|window)\b", "5m", query)
    found, end = [], 0
    for match in TOKEN.finditer(query):
        assert match.start() == end, f"{query[end:]!r} cannot be read"
        end = match.end()
        if match.lastgroup != "space":
            found.append((match.lastgroup or "", match.group()))
    assert end == len(query), f"{query[end:]!r} cannot be read"
    return found


def selectors(query: str) -> Iterator[tuple[str, dict[str, tuple[str, str]], set[str]]]:
    """Each metric that a query names, with its matchers by label, and all labels by which the query groups."""
    read = tokens(query)
    grouped: set[str] = set()
    metrics: list[tuple[str, dict[str, tuple[str, str]]]] = []
    at = 0
    for opening, closing in ("()", "[]", "{}"):
        assert [text for _, text in read].count(opening) == [text for _, text in read].count(closing), query
    while at < len(read):
        kind, text = read[at]
        following = read[at + 1][1] if at + 1 < len(read) else ""
        at += 1
        if kind != "name" or text in WORDS - {"by"}:
            continue
        if text == "by":
            end = read.index(("sign", ")"), at)
            grouped |= {name for kind, name in read[at:end] if kind == "name"}
            at = end + 1
        elif text in FUNCTIONS:
            assert following in ("(", "by"), query
        else:
            matchers: dict[str, tuple[str, str]] = {}
            if following == "{":
                end = read.index(("sign", "}"), at)
                inside = [each for each in read[at + 1 : end] if each[1] != ","]
                for label, operator, value in zip(inside[::3], inside[1::3], inside[2::3], strict=True):
                    assert (label[0], value[0]) == ("name", "string"), query
                    matchers[label[1]] = operator[1], json.loads(value[1])
                at = end + 1
            metrics.append((text, matchers))
    yield from ((metric, matchers, grouped) for metric, matchers in metrics)


def all_panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def unknown(query: str, exposed: dict[str, Labels]) -> list[str]:
    """What a query asks for that is not there."""
    missing = []
    known: set[str] = set()
    for metric, matchers, _ in selectors(query):
        labels = exposed.get(metric)
        if labels is None:
            missing.append(metric)
            continue
        known |= labels.keys()
        for label, (operator, value) in matchers.items():
            if label not in labels.keys() | OF_THE_TARGET or (operator == "=" and value not in labels.get(label, ())):
                missing.append(f"{metric}{{{label}{operator}{value}}}")
    for _, _, grouped in selectors(query):
        missing += sorted(grouped - known - OF_THE_TARGET)
    return missing


@pytest.fixture(scope="module")
def exposed(session_sims: list[SimProcess]) -> dict[str, Labels]:
    """What `/metrics` has after switches with traffic, one that failed, and a request for no model: labels by sample."""
    models = {sim.name: {"url": sim.url} for sim in session_sims} | {"gone": {"url": "http://127.0.0.1:9"}}
    llm = LLMuxApp({"models": models, "policy": {"linger": 0}, "metrics": {"backends": True, "timeout": 10}})
    with serving(llm, closing=llm) as url:
        with client(url) as gateway:
            for model in ("qwen", "llama"):
                ask_streaming(gateway, model)
        for model in ("gone", "nobody"):
            answer = httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": "x"}, timeout=LIMIT, trust_env=False)
            assert answer.status_code >= 400
        text = httpx.get(f"{url}/metrics", timeout=LIMIT, trust_env=False).text
    found: dict[str, Labels] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        labels = found.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            labels.setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("panel", all_panels(), ids=lambda panel: panel["title"])
def test_each_query_asks_for_metrics_labels_and_values_that_there_are(
    panel: dict[str, Any], exposed: dict[str, Labels]
) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        assert unknown(target["expr"], exposed) == []
        assert list(selectors(target["expr"]))
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        grouped = {label for _, _, each in selectors(target["expr"]) for label in each}
        assert shown <= grouped, target["expr"]


def test_each_variable_is_filled_from_a_label_that_there_is(exposed: dict[str, Labels]) -> None:
    queries = [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    assert len(queries) == 3
    for query in queries:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert match is not None
        assert unknown(match[1], exposed) == []
        assert match[2] in exposed[next(selectors(match[1]))[0]].keys() | OF_THE_TARGET


@pytest.mark.parametrize(
    "query",
    [
        "sum by (llmux_model) (llmux_request_asleep)",
        'sum(llmux_request_waiting{model=~"$model"})',
        "sum by (model) (llmux_request_waiting)",
        'llmux_server_state{llmux_server_state="dozing"}',
        "histogram_quantile(0.5, sum by (le) (rate(llmux_queue_time_bucket[$window])))",
    ],
)
def test_what_is_not_there_is_noticed(query: str, exposed: dict[str, Labels]) -> None:
    assert unknown(query, exposed) != []


def test_the_dashboard_shows_every_metric_of_the_gateway(exposed: dict[str, Labels]) -> None:
    asked = {metric for panel in all_panels() for each in panel["targets"] for metric, _, _ in selectors(each["expr"])}
    families = {re.sub(r"_(bucket|count|sum)$", "", metric) for metric in asked}
    own = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed if name.startswith("llmux_")}
    assert own - families == set()


def test_panels_have_their_own_ids_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        mine = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not mine & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= mine


def test_the_scrape_configuration_asks_where_a_served_gateway_answers() -> None:
    config = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    assert "metrics_path" not in job  # Prometheus' default is the gateway's
    assert config["rule_files"] == ["prometheus-alerts.yml"]


def test_the_alerts_ask_for_what_there_is(exposed: dict[str, Labels]) -> None:
    (group,) = yaml.safe_load((EXAMPLES / "prometheus-alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert unknown(rule["expr"], exposed) == []
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown <= {label for _, _, grouped in selectors(rule["expr"]) for label in grouped}


def test_what_the_containers_are_given_is_there() -> None:
    services = yaml.safe_load((EXAMPLES / "grafana" / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    assert [source for source, *_ in mounted if not (EXAMPLES / "grafana" / source).is_file()] == []
    inside = {target for _, target, _ in mounted}
    (provider,) = yaml.safe_load((EXAMPLES / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"] + "/llmux.json" in inside
    (source,) = yaml.safe_load((EXAMPLES / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert source["url"].endswith("127.0.0.1:9090")
