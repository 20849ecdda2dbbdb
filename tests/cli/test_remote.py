"""The commands that talk to a running gateway: what they ask of it, what they print, how they fail."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import rich.screen
import typer
from rich.console import Console
from typer.testing import CliRunner

from llmux_asgi.cli import _events, app
from llmux_asgi.cli._remote import RemoteError, connect, find_gateway
from llmux_asgi.cli._remote_status import GatewayStatus, ModelStatus
from llmux_asgi.cli._remote_text import described, duration, printable
from llmux_asgi.cli._sse import Event, EventParser
from llmux_asgi.cli._top import Screen
from llmux_asgi.exceptions import ConfigError
from tests.support.admin_api import KEY, FakeAdmin, model
from tests.support.eventually import eventually
from tests.support.serve import free_port, serve

REMOTE = [
    ["status"],
    ["models"],
    ["top"],
    ["events"],
    ["events", "--no-follow"],
    ["wake", "qwen"],
    ["sleep", "qwen"],
    ["stop", "qwen"],
    ["pin", "qwen"],
    ["unpin"],
    ["drain"],
    ["resume"],
    ["reload"],
]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeAdmin, str]]:
    fake = FakeAdmin()
    with serve(fake) as url:
        yield fake, url


@pytest.fixture
def fake(served: tuple[FakeAdmin, str], monkeypatch: pytest.MonkeyPatch) -> FakeAdmin:
    """The environment names it, and has its key."""
    monkeypatch.setenv("LLMUX_URL", served[1])
    monkeypatch.setenv("LLMUX_ADMIN_KEY", KEY)
    served[0].reset()
    return served[0]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def done(*arguments: str) -> str:
    status, out, error = run(*arguments)
    assert (status, error) == (0, "")  # no progress where there is no terminal
    return out


def refused(*arguments: str) -> tuple[int, str]:
    status, out, error = run(*arguments)
    assert (out, error.count("\n")) == ("", 1), out + error
    return status, error


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


# What they print


def test_status_says_what_is_active_what_waits_and_what_went_wrong(fake: FakeAdmin) -> None:
    error = {"time": 1_000_050.0, "model": "qwen", "kind": "BackendError", "message": "it answered 500\nto /sleep \x1b[31m"}
    fake.fields |= {"errors": [error], "draining": True, "pinned": "qwen"}
    lines = done("status").splitlines()
    assert lines[0] == "qwen is active, 2 in flight, 1 waiting, qwen is pinned, draining"
    assert "12 switches, 1 failed, serving 80%, switching 15%, idle 5%, gated_quantum; up for 1 min 40 s" in lines
    assert lines[-1].endswith("error of qwen: BackendError: it answered 500 to /sleep \N{REPLACEMENT CHARACTER}[31m")
    assert ["org/llama-8b", "asleep", "-", "1", "-", "2.5", "s"] in words("\n".join(lines))
    fake.fields["switch"] = {"switch": 1, "from": "a", "to": None, "phase": "drain", "since": 1e6, "phase_since": 1_000_098.8}
    assert done("status").startswith("switching away from a: drain, 1.2 s, 2 in flight")


def test_models_lists_aliases_servers_and_estimates(fake: FakeAdmin) -> None:
    fake.models[1] |= {"managed": True, "sleep_level": 2, "retry_in": 4.0}
    table = words(done("models"))
    assert ["qwen", "awake", "gpt-4o", "vllm", "1", "-", "-", "active"] in table
    assert "org/llama-8b asleep vllm, managed 2 0.4 s 3.2 s tried again in 4.0 s" in [" ".join(row) for row in table]


def test_json_is_what_the_gateway_said_whether_this_version_knows_it_or_not(fake: FakeAdmin) -> None:
    fake.fields["new"] = {"in": "a later version"}
    for command in ("status", "top"):
        assert json.loads(done(command, "--json")) == fake.status()
    assert json.loads(done("models", "--json")) == {"models": fake.models}


def test_where_there_is_no_terminal_top_prints_the_state_once(fake: FakeAdmin) -> None:
    assert done("top") == done("status")


# What they have done


def test_a_model_is_named_as_it_is_whatever_is_in_its_name_or_by_an_alias(fake: FakeAdmin) -> None:
    assert done("wake", "org/llama-8b").startswith("org/llama-8b is active, after ")
    assert done("sleep", "gpt-4o").startswith("qwen is asleep, after ")
    assert json.loads(done("stop", "qwen", "--json"))["state"] == "stopped"
    assert [call for call in fake.calls if call.startswith("POST")] == [
        "POST models/org/llama-8b/wake",
        "POST models/gpt-4o/sleep",  # the fake does not know aliases, so the name is looked up
        "POST models/qwen/sleep",
        "POST models/qwen/stop",
    ]


def test_a_name_may_have_characters_that_mean_something_in_a_url(fake: FakeAdmin) -> None:
    name = "org/a?b=c%2Fd#e f"
    fake.models.append(model(name))
    assert done("wake", name).startswith(f"{name} is active")


def test_pin_and_unpin(fake: FakeAdmin) -> None:
    assert done("unpin") == "no model was pinned\n"
    assert done("pin", "org/llama-8b").startswith("org/llama-8b is pinned, after ")
    assert json.loads(done("unpin", "--json")) == {"unpinned": "org/llama-8b"}
    assert fake.calls[-1] == "DELETE models/org/llama-8b/pin"


def test_drain_resume_and_reload(fake: FakeAdmin) -> None:
    assert done("drain").endswith(", draining\n")
    assert json.loads(done("resume", "--json"))["draining"] is False
    status, out, _ = run("drain", "--wait", "0.5")
    assert (status, out.endswith(", draining\n"), fake.calls[-1]) == (1, True, "POST drain?wait=0.5")
    fake.fields["drained"] = True
    assert done("drain", "--wait", "5").endswith(", drained\n")
    assert done("reload") == "new configuration: added phi\n"
    assert json.loads(done("reload", "--json"))["added"] == ["phi"]


# How they fail


@pytest.mark.parametrize("command", REMOTE, ids=" ".join)
def test_each_fails_in_one_line_that_says_what_to_do(command: list[str]) -> None:
    status, error = refused(*command, "--url", f"http://127.0.0.1:{free_port()}")
    assert (status, error.startswith(f"{command[0]}: cannot reach")) == (1, True)
    assert "nothing listens there. Does the gateway run there? --url or LLMUX_URL" in error


@pytest.mark.parametrize("command", [["status"], ["wake", "qwen"], ["events"]], ids=" ".join)
def test_an_admin_api_that_is_not_there_or_refuses_the_key_is_a_line_too(
    command: list[str], fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = os.environ["LLMUX_URL"]
    status, error = refused(*command, "--url", f"{url}/llm/admin")
    assert (status, f"there is no admin API at {url}/llm/admin" in error) == (2, True)
    monkeypatch.delenv("LLMUX_ADMIN_KEY")
    status, error = refused(*command)
    assert (status, "--key-file" in error) == (2, True)
    wrong = tmp_path / "key"
    wrong.write_text("another")
    status, error = refused(*command, "--key-file", str(wrong))
    assert (status, "refuses the admin key" in error, "another" in error) == (2, True, False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("org/lama-8b", "Did you mean org/llama-8b?"),
        ("gpt-4", "Did you mean gpt-4o?"),
        ("LLAMA", "Did you mean org/llama-8b?"),
        ("phi", "There are qwen, org/llama-8b"),
    ],
)
def test_an_unknown_model_is_told_with_those_that_are_spelled_alike(name: str, hint: str, fake: FakeAdmin) -> None:
    status, error = refused("wake", name)
    assert (status, error) == (2, f"wake: there is no model {name!r}. {hint}\n")


@pytest.mark.parametrize(("code", "status"), [(409, 1), (502, 1), (503, 1), (504, 1), (400, 2), (422, 2)])
def test_the_gateways_own_reason_is_told(code: int, status: int, fake: FakeAdmin) -> None:
    answer = {"error": {"message": "Not like this.", "type": "x"}}
    fake.answers = {"POST models/qwen/stop": (code, answer), "POST reload": (code, answer)}
    assert refused("stop", "qwen") == (status, "stop: Not like this.\n")
    assert refused("reload") == (status, "reload: Not like this.\n")


def test_an_answer_of_something_else_is_no_admin_api(fake: FakeAdmin) -> None:
    url = f"{os.environ['LLMUX_URL']}/admin"
    fake.answers = {"GET status": (404, b"<html>"), "POST reload": (500, b"<html>"), "POST drain": (200, b"<html>")}
    assert refused("status")[1].startswith(f"status: there is no admin API at {url}")
    assert refused("reload") == (1, f"reload: {url} answered 500\n")
    assert refused("drain")[0] == 1
    fake.answers = {"GET events": (200, b"<html>")}
    assert refused("events")[1].startswith(f"events: there is no admin API at {url}")


# Keys and terminals


def test_a_key_is_taken_from_no_option_and_follows_no_redirect(fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    elsewhere = FakeAdmin()
    monkeypatch.setattr(elsewhere, "_answer", lambda request: sent.append(request.headers.get("authorization", "")))
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    options = {option for command in REMOTE for parameter in group.commands[command[0]].params for option in parameter.opts}
    assert {option for option in options if "key" in option} == {"--key-file"}
    with serve(elsewhere) as url:
        fake.redirect = f"{url}/admin/api/status"
        status, error = refused("status")
    assert (status, KEY in error, sent) == (2, False, [])


def test_nothing_that_a_gateway_tells_is_obeyed_by_a_terminal(fake: FakeAdmin) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\n"
    fake.models = [model(evil, aliases=[evil], state="awake", active=True)]
    fake.fields |= {"active": evil, "policy": evil, "pinned": evil, "errors": [{"time": 0.0, "kind": evil, "message": evil}]}
    fake.fields["switch"] = {"switch": 1, "from": evil, "to": evil, "phase": evil, "since": 0.0, "phase_since": 0.0}
    for kind in ("switch", "model", "error", "pin", "later"):
        fake.happens(kind, model=evil, message=evil, state=evil, **{"from": evil, "to": evil})
    fake.answers = {"POST reload": (503, {"error": {"message": evil}})}
    outputs = [done("status"), done("models"), done("events", "--no-follow"), refused("reload")[1], refused("wake", "x")[1]]
    for output in outputs:
        assert "owned" in output
        assert not set(output) & {"\x1b", "\x07", "\x9b"}


# Where the gateway is, and the key for it


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (None, "http://127.0.0.1:8000/admin"),
        ("http://h:1", "http://h:1/admin"),
        ("http://h:1/", "http://h:1/admin"),
        ("https://h/llm/ops/", "https://h/llm/ops"),
        ("http://[::1]:80/admin", "http://[::1]/admin"),
    ],
)
def test_the_url_is_that_of_the_admin_api_and_a_bare_one_gets_the_default_prefix(given: str | None, url: str) -> None:
    assert find_gateway(given, None, None).url == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://h/admin", "http://", "http://h/admin?key=x", "http://u:p@h/admin", "http://h:x"]
)
def test_an_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        find_gateway(url, None, None)


def test_the_file_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMUX_ADMIN_KEY", "from-environment")
    path = tmp_path / "key"
    path.write_text("from-file\n")
    assert find_gateway(None, path, None).key == "from-file"
    assert find_gateway(None, None, None).key == "from-environment"
    with pytest.raises(ConfigError, match=r"--key-file: the file .*gone cannot be read"):
        find_gateway(None, tmp_path / "gone", None)


# Events


def test_events_prints_what_is_kept_a_line_each(fake: FakeAdmin) -> None:
    assert done("events", "--no-follow") == ""
    fake.happens("switch", switch=1, waiting=1, in_flight=0, **{"from": "qwen", "to": "llama"})
    fake.happens("error", model=None, kind="SwitchError", message="two\nlines \x1b]0;x\x07 \u2028")
    lines = done("events", "--no-follow").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "switch 1 qwen → llama begins: 1 waiting, 0 in flight",
        "error: SwitchError: two lines \N{REPLACEMENT CHARACTER}]0;x\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}",
    ]
    told = [json.loads(line) for line in done("events", "--no-follow", "--json").split("\n")[:-1]]
    assert [(each["id"], each["event"], each["time"]) for each in told] == [
        ("e1-1", "switch", 1_000_000.0),
        ("e1-2", "error", 1_000_001.0),
    ]
    assert told[0]["to"] == "llama"
    (line,) = done("events", "--no-follow", "--json", "--since", "e1-1").split("\n")[:-1]
    assert json.loads(line)["id"] == "e1-2"
    assert done("events", "--no-follow", "--since", "e1-2") == ""
    assert done("events", "--no-follow", "--since", "e0-2").splitlines()[0].strip().startswith("events before this")


def test_a_lost_stream_is_made_anew_after_the_last_event(fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "PAUSES", (0.0,))
    fake.cut = True
    fake.happens("drain", draining=True)
    lost: list[str] = []
    seen: list[str | None] = []

    def tell(error: RemoteError) -> None:
        lost.append(str(error))
        fake.happens("drain", draining=False)

    async def follow() -> None:
        with anyio.fail_after(30):
            async with (
                connect(find_gateway(os.environ["LLMUX_URL"], None, None)) as gateway,
                aclosing(_events.follow_events(gateway, None, tell)) as stream,
            ):
                async for event in stream:
                    if event.kind != "status":
                        seen.append(event.id)
                    if len(seen) == 3:
                        return

    anyio.run(follow)
    assert seen == ["e1-1", "e1-2", "e1-3"]
    assert fake.asked_after == [None, "e1-1", "e1-2"]
    assert "the gateway stops" in lost[0]


def test_events_are_parsed_however_their_bytes_come() -> None:
    stream = (
        b': hello\n\nretry: 1000\n\nid: e-1\r\nevent: pin\r\ndata: {"a":\r\ndata: "\xe2\x80\xa8"}\r\n\r\nevent: x\ndata:\n\n'
    )
    expected = [Event("pin", b'{"a":\n"\xe2\x80\xa8"}', "e-1"), Event("x", b"")]
    for size in (1, 2, 7, len(stream)):
        parser = EventParser()
        found = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
        assert found == expected


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        (
            "switch",
            {"switch": 2, "from": None, "to": "a", "waiting": 1, "in_flight": 0},
            "switch 2 to a begins: 1 waiting, 0 in flight",
        ),
        ("phase", {"switch": 2, "phase": "wake", "model": "a"}, "switch 2: wake a"),
        (
            "switched",
            {"switch": 2, "from": "a", "to": None, "outcome": "completed", "duration": 1.0, "phases": {"sleep": 0.5}},
            "switch 2 away from a completed after 1.0 s (sleep 0.5 s)",
        ),
        (
            "switched",
            {"switch": 3, "from": "a", "to": "b", "outcome": "failed", "duration": 90},
            "switch 3 a → b failed after 90.0 s",
        ),
        ("model", {"model": "a", "state": "asleep"}, "a is asleep"),
        ("error", {"model": "a", "kind": "BackendError", "message": "m"}, "error of a: BackendError: m"),
        ("pin", {"model": "a"}, "a is pinned"),
        ("pin", {"model": None}, "no model is pinned any more"),
        ("drain", {"draining": True}, "draining: new requests are refused"),
        ("config", {"added": ["a", "b"], "changed": [], "removed": ["c"]}, "new configuration: added a, b; removed c"),
        ("config", {"added": [], "settings": ["policy"]}, "new configuration: settings policy"),
        ("config", {}, "new configuration: nothing has changed"),
        ("later", {"time": 1, "x": 2}, 'later {"x":2}'),
    ],
)
def test_each_kind_of_event_is_a_line(kind: str, data: dict[str, Any], line: str) -> None:
    assert described(kind, data) == line


def test_times_and_texts_are_made_for_people() -> None:
    seconds = [None, 0, 0.02, 3.24, 99.9, 245, 7220]
    assert [duration(each) for each in seconds] == ["-", "0.0 s", "0.02 s", "3.2 s", "99.9 s", "4 min 5 s", "2 h 0 min"]
    assert printable("ü a\tb\x9b") == "ü a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


# On a terminal


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[bytes]]]:
    """Standard input, output and error are a terminal: its other end, and what was shown on it so far."""
    ours, theirs = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while True:
                shown.append(os.read(ours, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "90")
        patch.setenv("LINES", "30")
        patch.delenv("NO_COLOR", raising=False)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            patch.setattr(sys, name, open(theirs, mode, closefd=False))  # noqa: SIM115
        try:
            yield ours, shown
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            assert termios.tcgetattr(theirs)[3] & termios.ECHO  # as it was
            os.close(theirs)
            thread.join()
            os.close(ours)


def when(shown: list[bytes], text: str, then: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a text is on the terminal."""

    def wait() -> None:
        try:
            eventually(f"{text} is shown", lambda: text.encode() in b"".join(shown))
        finally:
            then()  # so that nothing waits for it for ever

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("way", ["q", "Ctrl-C", "SIGTERM"])
def test_top_follows_what_happens_until_it_is_told_to_end(way: str, fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as (ours, shown):

        def change() -> None:
            fake.happens("model", model="org/llama-8b", state="stopped")
            fake.fields["pinned"] = "qwen"

        ends = {
            "q": lambda: os.write(ours, b"q"),
            "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
            "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
        }
        threads = [when(shown, "q ends it", change), when(shown, "org/llama-8b is stopped", ends[way])]
        with pytest.raises(SystemExit) as ended:
            app(["top"])
        for thread in threads:
            thread.join()
    assert ended.value.code == 0
    assert b"qwen is pinned" in b"".join(shown)
    assert b"".join(shown).rstrip().endswith((b"\x1b[?25h", b"\x1b[?1049l"))  # the cursor and the lines from before are back


def test_a_long_operation_says_what_the_gateway_is_doing(fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.held.clear()
    with terminal(monkeypatch) as (_, shown):
        waker = when(shown, "waking org/llama-8b: qwen is active, 2 in flight", fake.held.set)
        app(["wake", "org/llama-8b"], standalone_mode=False)
        waker.join()
    assert b"org/llama-8b is active, after" in b"".join(shown)


def test_what_is_wrong_from_the_beginning_is_a_line_and_no_screen(fake: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as (_, shown), pytest.raises(SystemExit) as ended:
        app(["top", "--url", f"http://127.0.0.1:{free_port()}"])
    assert ended.value.code == 1
    assert b"top: cannot reach" in b"".join(shown)
    assert b"\x1b[?1049h" not in b"".join(shown)


def drawn(screen: Screen, width: int, height: int, **options: Any) -> str:
    out = Console(width=width, height=height, force_terminal=True, markup=False, highlight=False, **options)
    with out.capture() as captured:
        out.print(rich.screen.Screen(screen))
    return captured.get()


@pytest.mark.parametrize(("width", "height"), [(120, 40), (60, 20), (30, 12)])
def test_the_screen_fits_any_terminal(width: int, height: int) -> None:
    models = [ModelStatus(name="org/a-model-with-a-long-name", state="awake", waiting=3), ModelStatus(name="b", state="asleep")]
    screen = Screen("http://127.0.0.1:8000/admin", GatewayStatus(time=1.0, mode="active", active="b", models=models))
    for number in range(50):
        screen.take(Event("model", json.dumps({"time": 1.0, "model": f"m{number}", "state": "awake"}).encode()))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn(screen, width, height)).splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[-1].strip() == "q ends it"
    assert "m49 is awake" in lines[-2]
    assert [word in "".join(lines) for word in ("waiting", "in flight", "frozen")] == [True, width > 30, width > 60]
    screen.lost(RemoteError("the connection was lost", 1))
    assert "the connection was lost; trying again" in " ".join(drawn(screen, 120, 40).split())


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen("u", GatewayStatus(time=1.0, mode="idle", models=[ModelStatus(name="a", state="awake")]))
    assert "\x1b[32m" in drawn(screen, 80, 20)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in drawn(screen, 80, 20)


# In the shell


def test_the_shell_completes_commands_and_the_gateways_models(fake: FakeAdmin) -> None:
    def completed(line: str) -> str:
        environment = {"_LLMUX_ASGI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        return CliRunner().invoke(app, prog_name="llmux-asgi", env=environment).stdout

    assert completed("llmux-asgi wa").split() == ["wake"]
    assert completed("llmux-asgi wake o").split() == ["org/llama-8b"]
    assert completed(f"llmux-asgi wake --url http://127.0.0.1:{free_port()} o").strip() == ""
    shown = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="llmux-asgi").stdout
    assert "_LLMUX_ASGI_COMPLETE=complete_bash" in shown
