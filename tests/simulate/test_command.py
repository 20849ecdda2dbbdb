"""`llmux-asgi simulate`: the table, JSON, the page, and what is said of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from llmux_asgi import load_config
from llmux_asgi.cli import app
from llmux_asgi.simulate import Arrival, Script, Workload, lower_bound
from llmux_asgi.simulate.comparison import compare

runner = CliRunner()
MODELS: dict[str, Any] = {
    "qwen": {"url": "http://127.0.0.1:1", "costs": {"sleep": 1, "wake": 2}, "aliases": ["gpt"]},
    "llama": {"url": "http://127.0.0.1:2", "costs": {"sleep": 1, "wake": 3}},
}
POLICY = {"name": "gated_quantum", "quantum": 2, "request_timeout": None}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path / "llmux.json", {"models": MODELS, "policy": POLICY})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{index},{'qwen' if index % 3 else 'llama'},40" for index in range(60)]
    path.write_text("\n".join(["TIMESTAMP,model,GeneratedTokens", *rows]))
    return path


def written(path: Path, content: object) -> Path:
    path.write_bytes(msgspec.json.encode(content))
    return path


def simulated(*arguments: object) -> Any:
    result = runner.invoke(app, ["simulate", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = runner.invoke(app, ["simulate", *map(str, arguments)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_the_table_has_each_policy_and_the_configured_one_first(trace: Path, config: Path) -> None:
    result = runner.invoke(app, ["simulate", str(trace), "--config", str(config)], catch_exceptions=False)
    assert result.exit_code == 0
    names = re.findall(r"^ (\* )?(gated_quantum|fifo|pressure|throughput) ", result.stdout, re.MULTILINE)
    assert names == [("* ", "gated_quantum"), ("", "fifo"), ("", "gated_quantum"), ("", "pressure"), ("", "throughput")]
    assert "* gated_quantum quantum=2 linger=0.5 " in result.stdout
    assert "trace.csv: 60 requests. Sleep + wake: qwen 1 + 2 s, llama 1 + 3 s." in result.stdout
    assert "No schedule has a mean wait below" in result.stdout


def test_json_has_the_figures_and_the_bound(trace: Path, config: Path) -> None:
    told = simulated(trace, "--config", config, "--active", "gpt", "--limit", 50)
    assert told["costs"] == {"qwen": {"sleep": 1.0, "wake": 2.0}, "llama": {"sleep": 1.0, "wake": 3.0}}
    assert 0 < told["bound"]["clairvoyant"] <= told["bound"]["non_anticipating"]
    first, *others = told["policies"]
    assert (first["policy"], first["configured"], first["parameters"]["quantum"]) == ("gated_quantum", True, 2.0)
    assert [each["configured"] for each in others] == [False] * 4
    for each in told["policies"]:
        assert each["requests"] == 50
        assert each["ratio"] == pytest.approx(each["mean_wait"] / told["bound"]["non_anticipating"])
        assert each["ratio"] >= 1


def test_the_settings_that_every_policy_has_are_the_configurations(trace: Path, tmp_path: Path) -> None:
    impatient = {"models": MODELS, "policy": {"name": "fifo", "request_timeout": 2.0}}
    told = simulated(trace, "--config", written(tmp_path / "i.json", impatient))
    for each in told["policies"]:
        assert each["lost"] > 0
        assert each["longest_wait"] == pytest.approx(2.0)
        assert each["ratio"] is None  # who gives up makes the mean wait shorter


CLASSES = {
    "models": {**MODELS, "llama": {**MODELS["llama"], "priority": "low"}},
    "priorities": {"high": 20, "low": 0},
    "policy": {**POLICY, "drain": "preempt", "max_freezes": 3},
    "limits": {"max_waiting": 12},
}


@pytest.fixture
def classified(tmp_path: Path) -> Path:
    path = tmp_path / "classified.csv"
    rows = [f"{i},{'qwen' if i % 3 else 'llama'},{40 + 60 * (i % 5)},{'high' if i % 4 == 0 else ''}" for i in range(60)]
    path.write_text("\n".join(["TIMESTAMP,model,GeneratedTokens,priority", *rows]))
    return path


def test_preemption_priorities_and_limits_are_the_configurations(classified: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", CLASSES)
    told = simulated(classified, "--config", path)
    for each in told["policies"]:
        assert each["freezes"] > 0
        assert 0 < each["mean_frozen"] < each["longest_frozen"]
        assert [(one["priority"], one["requests"]) for one in each["classes"]] == [("high", 15), (None, 30), ("low", 15)]
    assert told["bound"]["non_anticipating"] == told["bound"]["clairvoyant"]  # a model is brought back for who is frozen
    slower = simulated(classified, "--config", path, "--recompute", 1)
    assert slower["policies"][0]["makespan"] > told["policies"][0]["makespan"]
    tight = {**CLASSES, "limits": {"max_waiting": 2}}
    told = simulated(classified, "--config", written(tmp_path / "t.json", tight))
    assert all(each["refused"] > 0 and each["ratio"] is None for each in told["policies"])


def test_the_table_shows_classes_freezes_and_refusals_if_there_are_any(classified: Path, trace: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", {**CLASSES, "limits": {"max_waiting": 2}})
    text = runner.invoke(app, ["simulate", str(classified), "--config", str(path)], catch_exceptions=False).stdout
    head, _, first, *rows = text.splitlines()[2:]
    columns = [name.strip() for name in re.split(r"  +", head) if name.strip()]
    assert columns[8:] == ["cut", "refused", "freezes", "mean frozen", "longest frozen", "÷ bound"]
    assert first.startswith(" * gated_quantum quantum=2 linger=0.5 ")
    assert [re.split(r"  +", row)[1] for row in rows[:3]] == ["high", "(no class)", "low"]
    assert "if it may switch" not in text
    plain = written(tmp_path / "p.json", {"models": MODELS, "policy": POLICY})
    text = runner.invoke(app, ["simulate", str(trace), "--config", str(plain)], catch_exceptions=False).stdout
    assert "frozen" not in text
    assert "refused" not in text
    assert "no class" not in text


@pytest.mark.parametrize(
    ("policy", "drain"),
    [
        ({}, None),
        ({"drain": True, "drain_timeout": 1}, 1.0),
        ({"drain": "abort"}, 0.0),
        ({"drain": "preempt"}, 0.0),
        ({"drain": "preempt", "drain_timeout": 1}, 1.0),
    ],
)
def test_the_bound_counts_the_drain_that_the_configuration_has(policy: dict[str, Any], drain: float | None) -> None:
    arrivals = [Arrival(float(i), ("qwen", "llama")[i % 2], 5.0) for i in range(8)]
    load = Workload("l", [Script([arrivals])])
    comparison = compare(load, load_config({"models": MODELS, "policy": policy}))
    expected = lower_bound(load, comparison.costs, drain=drain)
    assert comparison.bound is not None
    assert expected is not None
    assert comparison.bound.clairvoyant == expected.clairvoyant
    preempts = policy.get("drain") == "preempt"
    assert comparison.bound.non_anticipating == (expected.clairvoyant if preempts else expected.non_anticipating)
    assert all(run.figures.mean_wait >= comparison.bound.non_anticipating for run in comparison.runs)


def test_a_closed_load_has_no_bound(tmp_path: Path, config: Path) -> None:
    loop = [[Arrival(0.0, "gpt", 1.0)]] * 5
    load = Workload("loops", [Script(loop, pause=0.5), Script([[Arrival(0.0, "llama", 1.0)]] * 5)])
    path = written(tmp_path / "loops.json", load)
    told = simulated(path, "--config", config)
    assert told["bound"] is None
    assert all(each["ratio"] is None and each["requests"] == 10 for each in told["policies"])
    result = runner.invoke(app, ["simulate", str(path), "--config", str(config)])
    assert "There is no lower bound" in result.stdout


def test_costs_come_from_the_file_of_measurements_else_the_configuration_else_the_options(trace: Path, tmp_path: Path) -> None:
    bare = {name: {"url": model["url"]} for name, model in MODELS.items()}
    stored = written(tmp_path / "estimates.json", {"costs": {"qwen": {"1": {"sleep": 7.0, "wake": 8.0}}}})
    policy = {"name": "fifo", "estimates": str(stored)}
    path = written(tmp_path / "bare.json", {"models": {**bare, "spare": {"url": "http://127.0.0.1:3"}}, "policy": policy})
    told = simulated(trace, "--config", path, "--sleep-seconds", 0.5, "--wake-seconds", 1.5)
    assert told["costs"] == {"qwen": {"sleep": 7.0, "wake": 8.0}, "llama": {"sleep": 0.5, "wake": 1.5}}
    assert "of the model 'llama' take is not known: give models.llama.costs" in refused(trace, "--config", path)


def test_what_is_given_by_options_the_gateway_does_not_know_at_first(tmp_path: Path) -> None:
    bare = {name: {"url": model["url"]} for name, model in MODELS.items()}
    load = Workload("two", [Script([[Arrival(0.0, "qwen", 9.0), Arrival(3.0, "llama", 1.0)]])])
    config = {"models": bare, "policy": {"name": "gated_quantum"}}
    learning = compare(load, load_config(config), sleep_seconds=1.0, wake_seconds=2.0)
    knowing = compare(load, load_config({**config, "models": MODELS}))
    # Its turn is 4 times what was measured so far: the wake alone.
    assert learning.runs[0].result.switches[1].begun == pytest.approx(2.0 + 4 * 2.0)
    assert knowing.runs[0].result.switches[1].begun == pytest.approx(2.0 + 9.0 + 0.5)


def test_the_page_needs_nothing_but_itself_and_shows_each_policy(trace: Path, tmp_path: Path) -> None:
    models = {"<b>&": {**MODELS["qwen"]}, "llama": MODELS["llama"]}
    path = written(tmp_path / "c.json", {"models": models, "policy": POLICY})
    trace.write_text(trace.read_text().replace("qwen", "<b>&"))
    page = tmp_path / "page.html"
    simulated(trace, "--config", path, "--plot", page)
    text = page.read_text()
    assert text.count("<svg") == 2
    assert text.count("<polyline") == 5
    assert text.count("<rect") > 5
    assert not re.search(r"<script|src=|href=|url\(|@import", text)
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "simulate: none.csv: No such file or directory"),
        (["{trace}", "--config", "none.json"], "none.json: No such file"),
        (["{trace}", "--active", "phi"], "the model 'phi' is not configured"),
        (["{trace}", "--plot", "/none/page.html"], "simulate: /none/page.html: No such file"),
        (["{classified}"], "classified.csv, line 2: the priority 'high' is not configured"),
        (["{trace}", "--tokens-per-second", "inf"], "must be finite numbers"),
    ],
)
def test_bad_input_is_said_in_one_line(trace: Path, classified: Path, config: Path, arguments: list[str], message: str) -> None:
    words = [word.format(trace=trace, classified=classified) for word in arguments]
    assert message in refused(*words, *([] if "--config" in words else ["--config", config]))


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "fast"])
def test_options_out_of_range_are_refused(trace: Path, config: Path, speed: str) -> None:
    result = runner.invoke(app, ["simulate", str(trace), "--config", str(config), "--speed", speed])
    assert result.exit_code == 2


def test_the_installed_command_does_it(trace: Path, config: Path) -> None:
    code = "from llmux_asgi.cli import main; main()"
    command = [sys.executable, "-c", code, "simulate", str(trace), "--config", str(config), "--json"]
    result = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(result.stdout)["load"] == "trace.csv"
