"""Loads from files, and what is said of files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import pytest

from llmux_asgi._request_log import RequestEntry
from llmux_asgi.simulate import Arrival, Script, SimulationError, TraceOptions, Workload, read_workload

AZURE = Path(__file__).parent.parent / "benchmarks" / "traces" / "azure_llm_2023_conv.csv.gz"
CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,40\n2023-11-16 18:15:48.1805900,396,100\n"


def arrivals(workload: Workload) -> list[Arrival]:
    (script,) = workload.scripts
    (part,) = script.rounds
    return list(part)


def written(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azures_form(tmp_path: Path, name: str) -> None:
    options = TraceOptions(prefill=0.5, tokens_per_second=20)
    first, second = arrivals(read_workload(written(tmp_path, name, CSV), ["a"], options=options))
    assert (first.offset, first.model, first.service) == (0.0, "a", 2.5)
    assert second.offset == pytest.approx(1.5, abs=1e-5)
    assert second.service == 5.5


def test_the_azure_trace_itself() -> None:
    load = arrivals(read_workload(AZURE, "abc"))
    assert len(load) == 19_366
    assert load[-1].offset == pytest.approx(3501.7, abs=0.1)
    share = [sum(arrival.model == model for arrival in load) / len(load) for model in "abc"]
    assert share == [pytest.approx(weight / 11, abs=0.02) for weight in (6, 3, 2)]  # 1, 1/2, 1/3


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "TIMESTAMP,GeneratedTokens\n" + "".join(f"{i},1\n" for i in range(50)))
    one, same, other = (read_workload(path, "abc", options=TraceOptions(seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_a_column_names_the_model_and_where_it_is_empty_one_is_drawn(tmp_path: Path) -> None:
    text = "timestamp,Model,GeneratedTokens\n7,b,0\n5,alias,0\n6,,0\n\n"
    load = arrivals(read_workload(written(tmp_path, "t.csv", text), ["a", "b"], aliases={"alias": "b"}))
    assert [(arrival.offset, arrival.model) for arrival in load if arrival.offset != 1.0] == [(0.0, "b"), (2.0, "b")]
    assert load[1].model in "ab"


def test_speed_and_limit(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "TIMESTAMP,GeneratedTokens\n0,4\n10,4\n20,4\n")
    load = arrivals(read_workload(path, ["a"], options=TraceOptions(speed=4, limit=2, prefill=0, tokens_per_second=2)))
    assert load == [Arrival(0.0, "a", 2.0), Arrival(2.5, "a", 2.0)]


def test_the_gateways_own_log(tmp_path: Path) -> None:
    entries = [
        RequestEntry(1003.5, "b", 2.0, 17.0, 200, True, "high", frozen=10.0),  # what it was frozen for is no service
        RequestEntry(1000.0, "alias", 0.0, 2.0),
        RequestEntry(1001.0, "a", 60.0, None, 504),  # it is not known how long it would have taken
        RequestEntry(1002.0, "a", 0.0, 4.0),
    ]
    text = b"\n".join(msgspec.json.encode(entry) for entry in entries)
    load = arrivals(
        read_workload(written(tmp_path, "log.jsonl.gz", text), ["a", "b"], aliases={"alias": "a"}, priorities=["high"])
    )
    others = [Arrival(0.0, "a", 2.0), Arrival(1.0, "a", 3.0), Arrival(2.0, "a", 4.0)]
    assert load == [*others, Arrival(3.5, "b", 7.0, "high")]


def test_a_column_names_the_priority_class(tmp_path: Path) -> None:
    text = "TIMESTAMP,GeneratedTokens,priority\n1,0,high\n2,0,\n"
    load = arrivals(read_workload(written(tmp_path, "t.csv", text), ["a"], priorities=["high", "low"]))
    assert [arrival.priority for arrival in load] == ["high", None]


def test_a_workload_names_priority_classes_too(tmp_path: Path) -> None:
    load = Workload("one", [Script([[Arrival(0.0, "a", 1.0, "high"), Arrival(0.0, "alias", 1.0)]])])
    path = written(tmp_path, "w.json", msgspec.json.encode(load))
    read = read_workload(path, ["a"], aliases={"alias": "a"}, priorities=["high"])
    assert arrivals(read) == [Arrival(0.0, "a", 1.0, "high"), Arrival(0.0, "a", 1.0)]
    assert read.priorities == ("high",)
    with pytest.raises(SimulationError, match=r"w.json: .*the priority 'high' is not configured"):
        read_workload(path, ["a"], aliases={"alias": "a"})


def test_a_workload_is_read_as_it_is_written(tmp_path: Path) -> None:
    load = Workload("loops", [Script([[Arrival(0.0, "a", 1.0)]] * 3, start=2.0, pause=0.5)])
    assert read_workload(written(tmp_path, "w.json", msgspec.json.encode(load)), ["a"]) == load
    with pytest.raises(SimulationError, match="speed and limit are for traces"):
        read_workload(tmp_path / "w.json", ["a"], options=TraceOptions(speed=2))


SCRIPT = '{"name": "x", "scripts": [{"rounds": [[{"offset": 0, "model": "%s", "service": %s}]]}]}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n", "t.csv, line 1: there is no column TIMESTAMP and no column GeneratedTokens"),
        ("t.csv", "", "t.csv, line 1: there is no column"),
        ("t.csv", CSV + "soon,1,1\n", "t.csv, line 4: 'soon' is not a time such as"),
        ("t.csv", CSV + "nan,1,1\n", "t.csv, line 4: 'nan' is not a time"),
        ("t.csv", CSV + "5,1,1.5\n", "t.csv, line 4: '1.5' is not a number of tokens"),
        ("t.csv", CSV + "5,1,-1\n", "t.csv, line 4: '-1' is not a number of tokens"),
        ("t.csv", CSV + "5,1\n", "t.csv, line 4: 2 values for 3 columns"),
        ("t.csv", CSV + '5,1,"1\n', "t.csv, line 4: unexpected end of data"),
        ("t.csv", "TIMESTAMP,model,GeneratedTokens\n1,z,1\n", "t.csv, line 2: the model 'z' is not configured"),
        ("t.csv", "TIMESTAMP,GeneratedTokens\n", "t.csv: there are no requests in it"),
        ("t.csv", b"\xff\xfe\x00", "t.csv: it is not text in UTF-8"),
        ("t.jsonl", '{"time": 1, "model": "a", "waited": 0}\n{"time": 1', "t.jsonl, line 2: "),
        ("t.jsonl", '{"time": 1, "model": "a"}\n', "t.jsonl, line 1: .*`waited`"),
        ("t.jsonl", '\n{"time": 1, "model": "z", "waited": 0}\n', "t.jsonl, line 2: the model 'z' is not configured"),
        ("t.jsonl", '{"time": 1, "model": "a", "waited": 0, "served": -1}\n', "t.jsonl, line 1: served is less than 0"),
        ("t.jsonl", '{"time": 1, "model": "a", "waited": 0, "served": 1, "frozen": -1}\n', "line 1: frozen is less than 0"),
        ("t.jsonl", '{"time": 1, "model": "a", "waited": 0, "priority": "x"}\n', "line 1: the priority 'x' is not"),
        ("t.csv", "TIMESTAMP,GeneratedTokens,priority\n1,1,x\n", "t.csv, line 2: the priority 'x' is not configured"),
        ("t.json", "{", "t.json: "),
        ("t.json", SCRIPT % ("z", "1"), "t.json: the model 'z' is not configured"),
        ("t.json", SCRIPT % ("a", "-1"), "t.json: .* must not be less than 0"),
        ("t.txt", "", "t.txt: the file's ending is none of"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        read_workload(written(tmp_path, name, text), ["a"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"none.csv: No such file"):
        read_workload(tmp_path / "none.csv", ["a"])
    (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(SimulationError, match=r"t.csv.gz: Not a gzipped file"):
        read_workload(tmp_path / "t.csv.gz", ["a"])
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-20])
    with pytest.raises(SimulationError, match=r"t.csv.gz: .*ended"):
        read_workload(tmp_path / "t.csv.gz", ["a"])
