"""The benchmark of the relay works, and its page shows what it has found. Its figures themselves are no test's business."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.benchmarks.pages import fill
from tests.benchmarks.relay.__main__ import DOCS, JSON, PAGE, SVG
from tests.benchmarks.relay.candidates import CANDIDATES, Candidate, Place
from tests.benchmarks.relay.environment import Unavailable
from tests.benchmarks.relay.load import Load, Result, Sizes, joined
from tests.benchmarks.relay.measure import QUICK, measure
from tests.benchmarks.relay.picture import draw
from tests.benchmarks.relay.profile import ranked
from tests.benchmarks.relay.report import Report, Run, read, verdicts, write
from tests.benchmarks.relay.tables import BLOCKS
from tests.benchmarks.relay.wire import END, body_of, events

TINY = replace(QUICK, rounds=1, seconds=0.3, warmup=0.05, slow_streams=5, slow_seconds=0.2, connections=(1, 4), burst_streams=4)


def missing(place: Place) -> list[str]:
    raise Unavailable("it is not there")


@pytest.fixture(scope="module")
def tiny() -> Report:
    """One round in miniature: the upstream itself, the gateway, one that cannot be had, one that answers something else."""
    liar = Candidate("liar", "answers what was not asked for", lambda place: [sys.executable, "-c", _LIAR, str(place.port)])
    absent = Candidate("absent", "is not there", missing)
    return measure([CANDIDATES["direct"], CANDIDATES["gateway"], absent, liar], TINY, lambda line: None)


_LIAR = r"""
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tests.benchmarks.relay.wire import body_of, kind_of

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = kind_of(self.rfile.read(int(self.headers["content-length"])))
        body = body_of(asked, 4 if asked == "slow" else 100)
        self.send_response(200)
        if asked == "plain":
            self.send_header("content-length", str(len(body)))
        else:
            self.send_header("transfer-encoding", "chunked")
            body = b"%x\r\n%b!\r\n0\r\n\r\n" % (len(body), body[:-1])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.slow
def test_a_run_in_miniature_has_right_answers_and_figures_of_every_load(tiny: Report) -> None:
    assert tiny.candidates == ["direct", "gateway", "liar"]
    for name in ("direct", "gateway"):
        (run,) = (run for run in tiny.runs if run.candidate == name)
        assert list(run.loads) == ["plain 1", "plain 4", "stream 1", "burst", "slow"]
        for load, result in run.loads.items():
            assert (result.errors, result.lost) == ({}, 0), load
            assert result.answers > 0
            assert 0 < result.first_p50 <= result.p50 <= result.p99
        assert run.loads["burst"].events == 100 * run.loads["burst"].answers
        assert (run.loads["slow"].answers, run.loads["slow"].events) == (5, 5 * 4)
        assert run.loads["slow"].p50 > 2.5 * 0.05  # four events, one each 50 ms
    assert tiny.peak("direct") is None
    assert (tiny.peak("gateway") or 0) >= (tiny.resident("gateway") or 0) > 20
    assert (tiny.cpu("gateway", "plain 4") or 0) > 0
    assert tiny.added("gateway") is not None


@pytest.mark.slow
def test_a_candidate_that_cannot_be_had_is_left_out_with_its_reason(tiny: Report) -> None:
    assert tiny.left_out == {"absent": "it is not there"}
    assert "absent (it is not there)" in BLOCKS["conditions"](tiny)


@pytest.mark.slow
def test_wrong_answers_are_errors(tiny: Report) -> None:
    assert tiny.errors("liar", "plain 4") == 0
    assert tiny.errors("liar", "burst") > 0
    assert tiny.errors("liar", "slow") == 5
    assert tiny.of("liar", "burst")[0].answers == 0
    assert "errors)" in BLOCKS["streams"](tiny)


def result(rate: float, *, p50: float = 0.001, errors: int = 0, lost: int = 0) -> Result:
    return Result(
        connections=1000,
        seconds=1.0,
        answers=int(rate),
        events=int(rate),
        lost=lost,
        errors={"status 500": errors} if errors else {},
        cpu=1.0,
        p50=p50,
        p99=p50,
        first_p50=p50,
        first_p99=p50,
        others=0.0,
    )


def run(candidate: str, rate: float, *, added: float, burst: float, peak: float = 60.0, errors: int = 0, lost: int = 0) -> Run:
    loads = {f"plain {count}": result(rate, p50=0.001 + added) for count in (1, 32, 256)}
    loads |= {"burst": result(burst), "slow": result(1000, errors=errors, lost=lost)}
    return Run(candidate, loads, 50.0, peak)


ROUTER = run("vllm-router", 10_000, added=0.0002, burst=100)


@pytest.mark.parametrize(
    ("gateway", "missed"),
    [
        (run("gateway", 8_000, added=0.00025, burst=300), []),
        (run("gateway", 7_900, added=0.00025, burst=300), ["requests/s, 32", "requests/s, 256"]),
        (run("gateway", 8_000, added=0.00027, burst=300), ["added latency"]),
        (run("gateway", 8_000, added=0.00025, burst=299), ["events/s"]),
        (run("gateway", 8_000, added=0.00025, burst=300, peak=71), ["70 MB"]),
        (run("gateway", 8_000, added=0.00025, burst=300, errors=1), ["slow streams"]),
        (run("gateway", 8_000, added=0.00025, burst=300, lost=1), ["slow streams"]),
    ],
)
def test_what_is_asked_is_judged(gateway: Run, missed: list[str]) -> None:
    traced = run("gateway-sdk", 5_000, added=0.001, burst=100)
    report = Report(runs=[run("direct", 50_000, added=0.0, burst=900), ROUTER, gateway, traced])
    found = verdicts(report)
    assert [each.asked for each in found if each.reached is None] == []
    assert [part for each in found if not each.reached for part in missed if part in each.asked] == missed
    assert sum(not each.reached for each in found) == len(missed)


def test_without_the_router_nothing_is_judged_by_it() -> None:
    report = Report(runs=[run("direct", 50_000, added=0.0, burst=900), run("gateway", 8_000, added=0.1, burst=1)])
    assert [each.asked for each in verdicts(report) if "vllm-router" in each.asked and each.reached is not None] == []


def test_the_page_and_the_picture_show_the_figures_of_the_file() -> None:
    report = read((DOCS / JSON).read_bytes())
    page = (DOCS / PAGE).read_text()
    assert fill(page, {name: block(report) for name, block in BLOCKS.items()}) == page
    assert draw(report) == (DOCS / SVG).read_text()
    assert ElementTree.fromstring(draw(report)).tag.endswith("svg")  # noqa: S314 - our own
    assert read(write(report)) == report


def test_a_body_is_right_if_it_is_the_same_byte_by_byte() -> None:
    sizes = Sizes(seconds=1.0, warmup=0.0, slow_events=4, tries=1, upstream_pid=os.getpid(), pid=None)
    plain, slow = Load(1, "plain", sizes), Load(1, "slow", sizes)
    right = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events(4)) + END
    for _ in range(2):  # what was right once is compared in a shorter way
        assert plain.is_right(body_of("plain", 0), chunked=False)
        assert slow.is_right(right, chunked=True)
        assert slow.is_right(b"".join(events(4)), chunked=False)
        assert not plain.is_right(body_of("plain", 0)[:-1] + b" ", chunked=False)
        assert not slow.is_right(right.replace(b"token1", b"token2"), chunked=True)
        assert not slow.is_right(right[: -len(END)], chunked=True)


def test_a_chunked_body_is_joined_and_a_cut_one_is_none() -> None:
    assert joined(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n") == b"abcde"
    assert joined(b"3\r\nabc\r\n2\r\nd") != b"abcd"


def test_samples_are_counted_by_function_and_by_what_it_calls() -> None:
    assert ranked(["a;b 2", "a;b;a 1"]) == (3, {"b": 2, "a": 1}, {"a": 3, "b": 3})
