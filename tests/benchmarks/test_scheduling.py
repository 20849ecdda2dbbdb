"""The benchmark of scheduling works, and the pages show what it has found. Its figures themselves are no test's business."""

from __future__ import annotations

from xml.etree import ElementTree

import msgspec
import pytest

from llmux_asgi.policy import FifoPolicy, GatedQuantumPolicy, PressurePolicy, ThroughputPolicy
from llmux_asgi.simulate import Arrival, Script, Workload
from tests.benchmarks.scheduling.__main__ import DOCS, JSON, SVG
from tests.benchmarks.scheduling.bounds import bound, lone_bound
from tests.benchmarks.scheduling.loads import COSTS, LOADS, Load
from tests.benchmarks.scheduling.picture import draw
from tests.benchmarks.scheduling.report import Hour, Report, Row, Seeded, read, verdicts, write
from tests.benchmarks.scheduling.run import POLICIES, measure
from tests.benchmarks.scheduling.tables import BLOCKS, PAGES, fill


def tiny(seed: int) -> Workload:
    return Workload("tiny", [Script([[Arrival(0.0, "a", 1.0), Arrival(0.2, "b", 2.0)], [Arrival(0.1, "a", 1.0)]])])


@pytest.mark.slow
def test_a_short_run_has_every_request_its_prediction_and_its_place_in_tables_and_picture() -> None:
    told: list[str] = []
    loads = [Load("tiny", "three requests", tiny), Load("burst", "the same", tiny, burst=True)]
    report = measure(loads, ("fifo", "gated_quantum"), (1,), 40.0, told.append)
    assert [line.partition(": ")[2] for line in told] == [f"{load}, seed {seed}" for seed in (1,) for load in ("tiny", "burst")]
    report = read(write(report))
    assert [(row.load, row.policy) for row in report.rows] == [
        (load, policy) for load in ("tiny", "burst") for policy in ("fifo", "gated_quantum")
    ]
    for row in report.rows:
        assert [(run.seed, run.requests) for run in row.runs] == [(1, 3)]
        # a is woken, b waits for it, then a again: whatever the machine, nobody is faster than the servers are
        assert all(run.switches == run.predicted_switches == 3 for run in row.runs)
        assert all(run.mean_wait > 0.9 * run.predicted_mean_wait > 0 for run in row.runs)
        assert all(0 < run.mean_wait < run.longest_wait < run.seconds for run in row.runs)
        assert all(0 < run.not_switching < 1 for run in row.runs)
    measured = BLOCKS["measured"](report)
    assert all(f"| {row.load:5} | {row.policy}" in measured for row in report.rows)
    picture = ElementTree.fromstring(draw(report))  # noqa: S314 - our own
    assert [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")].count("tiny") == 1


def shown() -> Report:
    return read((DOCS / JSON).read_bytes())


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_show_the_figures_of_the_file(name: str) -> None:
    page = (DOCS / name).read_text()
    assert fill(page, PAGES[name], shown()) == page


def test_the_picture_shows_the_figures_of_the_file() -> None:
    assert draw(shown()) == (DOCS / SVG).read_text()


def test_the_file_has_every_load_by_every_policy_with_three_seeds_or_more() -> None:
    report = shown()
    assert [(row.load, row.policy) for row in report.rows] == [(load.name, policy) for load in LOADS for policy in POLICIES]
    assert all(len(row.runs) >= 3 for row in report.rows)
    assert {hour.models for hour in report.hours} == {2, 3, 5}
    assert all(set(hour.mean_waits) == set(POLICIES) for hour in report.hours)


def test_a_page_without_a_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for loads"):
        fill("# A page\n", ["loads"], Report())


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_a_load_is_drawn_by_its_seed(load: Load) -> None:
    def plain(seed: int) -> bytes:
        return msgspec.json.encode(load.make(seed))

    assert plain(1) == plain(1) != plain(2)
    models = {"trace, 3 models": "abc", "single": "a"}.get(load.name, "ab")
    assert sorted(load.make(1).models) == sorted(models)


def test_the_profiles_are_those_of_llmux() -> None:
    sizes = {load.name: load.make(1).size for load in LOADS[:5]}
    assert sizes == {"single": 40, "balanced": 40, "bursty": 40, "dominant": 50, "interleave": 60}
    (script,) = next(load for load in LOADS if load.name == "dominant").make(1).scripts
    ((*arrivals,),) = script.rounds
    assert [arrival.model for arrival in arrivals] == list("aaaab") * 10
    assert [round(arrival.offset, 2) for arrival in arrivals[:3]] == [0.0, 0.05, 0.1]


def test_the_bounds_are_the_formulas_of_the_docstrings() -> None:
    workload = Workload("", [Script([[Arrival(0.0, "a", 3.0), Arrival(0.0, "b", 1.0)]])])
    d, c = 3.0, 9.0  # the longest answer; a sleeps, b wakes
    assert bound(FifoPolicy(), workload, COSTS) == 2 * (5 + d + c)
    assert bound(GatedQuantumPolicy(), workload, COSTS) == d + (c + 4 * c + d) + c
    assert bound(PressurePolicy(), workload, COSTS) == 30 + 2 * (4 * c + d + c)
    assert bound(ThroughputPolicy(), workload, COSTS) == 30 + 2 * (d + c)
    assert lone_bound(FifoPolicy(), workload, COSTS) == 5 + d + c
    assert lone_bound(GatedQuantumPolicy(), workload, COSTS) == 4 * c + d + c
    assert lone_bound(ThroughputPolicy(), workload, COSTS) == 30 + d + c


def row(load: str, policy: str, mean: float, *, predicted: float | None = None, longest: float = 20.0, **flags: bool) -> Row:
    run = Seeded(1, 10, mean, 19.0, longest, 4, 0.5, 100.0, 0.0, mean if predicted is None else predicted, longest, 4)
    lone = 30.0 if flags.get("bounded_only") else None
    return Row(load, policy, flags.get("beats", False), flags.get("bounded_only", False), 40.0, lone, [run])


def hour(default: float, best: float, longest: float = 50.0) -> Hour:
    means, longest_waits = {"gated_quantum": default, "pressure": best}, {"gated_quantum": longest, "pressure": 50.0}
    return Hour(3, 20, 1, 900, means, longest_waits, dict.fromkeys(means, 60.0), 2.0, 2.5)


@pytest.mark.parametrize(
    ("rows", "hours", "fails"),
    [
        ([row("loops", "fifo", 6.0), row("loops", "gated_quantum", 2.0, beats=True)], [], []),
        ([row("loops", "fifo", 6.0), row("loops", "gated_quantum", 6.1, beats=True)], [], ["shorter mean wait than FIFO"]),
        ([row("single", "fifo", 6.0), row("single", "gated_quantum", 6.5)], [], []),
        ([row("single", "fifo", 6.0), row("single", "gated_quantum", 6.7)], [], ["mean wait at most 10 % above FIFO's"]),
        ([row("single", "pressure", 6.0, longest=41.0)], [], ["no wait longer than its policy's bound"]),
        ([row("x", "fifo", 6.0, predicted=5.0)], [], ["measured and predicted mean wait and switches within 15 %"]),
        (
            [row("x", "fifo", 1.0), row("x", "gated_quantum", 9.0, longest=31.0, bounded_only=True)],
            [],
            ["x: served within κ·C, a switch and the drain"],
        ),
        ([], [hour(6.5, 5.0)], []),
        ([], [hour(6.0, 5.0), hour(6.6, 5.0)], ["trace set: mean wait at most 1.3 times the best policy's"]),
        ([], [hour(5.0, 5.0, longest=61.0)], ["trace set: no wait longer than its policy's bound"]),
    ],
)
def test_what_does_not_hold_is_told(rows: list[Row], hours: list[Hour], fails: list[str]) -> None:
    report = Report(rows=rows, hours=hours)
    assert [each.asked for each in verdicts(report) if not each.holds] == fails
