"""Another configuration while requests run and wait: no request is lost, and two servers are never in memory. On both loops."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendUnsupportedError,
    ConfigError,
    FifoPolicy,
    InvalidRequestError,
    Mode,
    Phase,
    QueueFullError,
    QueueTimeoutError,
    ReloadReport,
    SwitchError,
    UnknownModelError,
)
from tests.support.fleet import Fleet, until_settled
from tests.support.pool import running, until_frozen, until_phase, until_waiting

pytestmark = pytest.mark.anyio


async def test_a_model_that_is_added_is_served_and_the_others_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        first = await requests.served("qwen")
        before = fleet.server("qwen")
        assert await fleet.reload(qwen="a", llama="b") == ReloadReport(added=("llama",))
        assert fleet.switcher.models == ("qwen", "llama")
        second = requests.send("llama", finish=True)
        assert fleet.server("qwen") is before
        await until_phase(fleet, Phase.DRAIN)
        first.finish.set()
        await second.done.wait()
        assert second.error is None
    assert fleet.gpu.events == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_a_removed_model_is_unknown_at_once_and_finishes_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        waits = requests.send("llama")
        await until_phase(fleet, Phase.DRAIN)
        assert (await fleet.reload(mistral="c")).removed == ("qwen", "llama")
        assert fleet.switcher.models == ("mistral",)
        for gone in ("qwen", "llama"):
            with pytest.raises(UnknownModelError):
                await fleet.switcher.acquire(gone)
        runs.finish.set()
        await waits.granted.wait()
        assert "llama" in fleet.switcher.statistics().unsettled
        waits.finish.set()
        await until_settled(fleet)
        assert fleet.switcher.statistics().mode is Mode.IDLE
        assert fleet.gpu.awake == set()
        assert dict(fleet.switcher.statistics().waiting) == {"mistral": 0}
        assert runs.error is waits.error is None
        assert [backend.closed for backend in fleet.built] == [1, 1, 0]


async def test_a_server_is_replaced_when_its_requests_are_over_and_new_ones_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        old = await requests.served("qwen")
        assert (await fleet.reload(qwen="b")).changed == ("qwen",)
        new = requests.send("qwen")
        await until_waiting(fleet, "qwen", 1)
        assert fleet.switcher.statistics().unsettled == ("qwen",)
        assert fleet.gpu.events == []
        old.finish.set()
        await new.granted.wait()
        assert (old.server, new.server) == ("a", "b")
        assert fleet.switcher.statistics().unsettled == ()
        new.finish.set()
    assert fleet.gpu.events == ["sleep a", "asleep a", "wake b", "awake b"]
    assert fleet.built[0].closed == 1


async def test_a_sleeping_server_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen="a", llama="c")
        await until_settled(fleet)
        assert fleet.server("llama").name == "c"
        assert not runs.done.is_set()
        waits = requests.send("llama", finish=True)
        await until_phase(fleet, Phase.DRAIN)
        runs.finish.set()
        await waits.done.wait()
    assert fleet.gpu.events == ["sleep a", "asleep a", "wake c", "awake c"]


async def test_who_waits_for_a_wake_is_served_by_the_server_that_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, qwen="a")
    gate = fleet.server("qwen").gate("wake")
    async with running(fleet) as requests:
        waits = requests.send("qwen")
        await gate.entered.wait()
        await fleet.reload(qwen="b")
        gate.open.set()
        await waits.granted.wait()
        assert waits.server == "b"
        waits.finish.set()
    assert fleet.gpu.events == ["wake a", "awake a", "sleep a", "asleep a", "wake b", "awake b"]


async def test_a_wake_that_fails_after_its_server_was_replaced_costs_nobody_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, qwen="a")
    gate = fleet.server("qwen").gate("wake")
    fleet.server("qwen").fail("wake", BackendError("no"), times=2)
    async with running(fleet) as requests:
        waits = requests.send("qwen", finish=True)
        await gate.entered.wait()
        await fleet.reload(qwen="b")
        gate.open.set()
        await waits.done.wait()
        assert waits.error is None
        assert waits.server == "b"


async def test_a_model_that_is_renamed_serves_those_first_who_know_the_old_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        old = await requests.served("qwen")
        report = await fleet.reload(qwen3="a", llama="b")
        assert (report.added, report.removed) == (("qwen3",), ("qwen",))
        new = requests.send("qwen3")
        await until_waiting(fleet, "qwen3", 1)
        old.finish.set()
        await new.granted.wait()
        assert fleet.switcher.statistics().unsettled == ()
        new.finish.set()
    assert fleet.gpu.events == ["sleep a", "asleep a", "wake a", "awake a"]


async def test_models_may_take_over_each_others_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        old = await requests.served("qwen")
        await fleet.reload(qwen="b", llama="a")
        new = {model: requests.send(model, finish=True) for model in ("qwen", "llama")}
        await until_waiting(fleet, "llama", 1)
        old.finish.set()
        for request in new.values():
            await request.done.wait()
        assert {model: request.server for model, request in new.items()} == {"qwen": "b", "llama": "a"}


async def test_frozen_requests_finish_on_the_server_that_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = FifoPolicy(min_active_duration=0, drain="preempt")
    fleet = Fleet(monkeypatch, awake="a", policy=policy, qwen="a", llama="b")
    async with running(fleet) as requests:
        frozen = await requests.served("qwen")
        other = await requests.served("llama")
        await until_frozen(fleet, "qwen", 1)
        await fleet.reload(qwen="c", llama="b")
        new = requests.send("qwen", finish=True)
        other.finish.set()
        await until_frozen(fleet, "qwen", 0)
        assert not new.granted.is_set()
        frozen.finish.set()
        await new.done.wait()
        assert (frozen.server, new.server) == ("a", "c")
        assert frozen.error is None


async def test_a_server_that_is_not_confirmed_out_of_memory_keeps_the_new_one_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llmux_asgi._turnover._FIRST_PAUSE", 0.001)
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        old = await requests.served("qwen")
        fleet.server("qwen").fail("sleep", BackendError("it does not sleep"), times=2)
        await fleet.reload(qwen="b")
        late = requests.send("qwen", timeout=0.01)
        await late.done.wait()
        assert isinstance(late.error, QueueTimeoutError)
        assert "its server is being replaced, and the old one is not out of memory yet" in str(late.error)
        waits = requests.send("qwen", finish=True)
        old.finish.set()
        await waits.done.wait()
        assert waits.server == "b"
    assert "the old server of the replaced model 'qwen' is not confirmed out of memory" in caplog.text
    assert "is not confirmed out of memory" in fleet.switcher.statistics().last_errors["qwen"].message


async def test_a_configuration_that_is_taken_back_in_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen="c", llama="b")
        waits = requests.send("qwen")
        await until_waiting(fleet, "qwen", 1)
        await fleet.reload(qwen="a", llama="b")
        await waits.granted.wait()
        assert waits.server == "a"
        await fleet.reload(llama="b")
        await fleet.reload(qwen="a", llama="b")
        again = await requests.served("qwen")
        for request in (runs, waits, again):
            request.finish.set()
    assert fleet.gpu.events == []


async def test_a_model_that_was_added_and_removed_again_serves_who_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen3="a")
        between = requests.send("qwen3")
        await until_waiting(fleet, "qwen3", 1)
        await fleet.reload(llama="b")
        while set(fleet.switcher.statistics().unsettled) != {"qwen", "qwen3"}:
            await anyio.lowlevel.checkpoint()
        runs.finish.set()
        await between.granted.wait()
        between.finish.set()
        await until_settled(fleet)
        assert between.error is None
        assert fleet.gpu.awake == set()


async def test_what_the_gateway_has_started_is_ended_when_its_model_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", stoppable="ab", qwen="a", llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(mistral="c")
        while fleet.switcher.statistics().unsettled != ("qwen",):
            await anyio.lowlevel.checkpoint()
        runs.finish.set()
        await until_settled(fleet)
    assert fleet.gpu.events == ["stop b", "stopped b", "stop a", "stopped a"]


async def test_settings_take_effect_at_once_and_the_server_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        server, switcher = fleet.server("qwen"), fleet.switcher
        with pytest.raises(InvalidRequestError):
            switcher.priority("qwen", "high")
        qwen = {"url": "http://a", "aliases": ["gpt-4o"], "sleep_level": 2, "timeouts": {"request": 7.0}, "priority": "high"}
        llama = {"url": "http://b", "max_waiting": 1}
        settings = {"priorities": {"high": 5.0}, "limits": {"max_waiting": 10}}
        report = await fleet.reload(settings, qwen=qwen, llama=llama)
        assert report == ReloadReport(changed=("qwen", "llama"), settings=("priorities", "limits"))
        assert fleet.server("qwen") is server
        assert switcher.statistics().unsettled == ()
        assert switcher.resolve("gpt-4o") == "qwen"
        assert switcher.request_timeout("qwen") == 7.0
        assert switcher.priority("qwen") == "high"
        waits = requests.send("llama", finish=True)
        await until_waiting(fleet, "llama", 1)
        with pytest.raises(QueueFullError):
            await switcher.acquire("llama")
        runs.finish.set()
        await waits.done.wait()
        assert server.levels == [2]


async def test_an_old_server_is_put_to_sleep_at_the_level_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", stoppable="b", qwen={"url": "http://a", "sleep_level": 2})
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen={"url": "http://b:80", "command": ["serve"], "sleep_level": 3})
        runs.finish.set()
        await until_settled(fleet)
        assert fleet.built[0].levels == [2]
        assert fleet.switcher._sleep_level("qwen") == 3


async def test_time_limits_and_freezing_hold_from_a_servers_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, qwen="a", llama="b")
    async with running(fleet):
        qwen = {"url": "http://a", "timeouts": {"wake": 7}}
        await fleet.reload({"policy": {"drain": "preempt"}}, qwen=qwen, llama="c")
        await until_settled(fleet)
        assert fleet.server("qwen").tuned == [(7.0, True)]
        assert fleet.server("llama").tuned == []  # it was built so


async def test_another_policy_decides_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    never = {"policy": {"name": "gated_quantum", "linger": 1000, "quantum": 1000, "request_timeout": None}}
    fleet = Fleet(monkeypatch, settings=never, qwen={"url": "http://a", "costs": {"sleep": 9, "wake": 9}}, llama="b")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        waits = requests.send("llama", finish=True)
        await until_waiting(fleet, "llama", 1)
        runs.finish.set()
        await anyio.lowlevel.checkpoint()
        assert fleet.switcher.statistics().mode is Mode.ACTIVE
        report = await fleet.reload(qwen={"url": "http://a", "costs": {"sleep": 9, "wake": 9}}, llama="b")
        assert report == ReloadReport(settings=("policy",))
        await waits.done.wait()


async def test_a_configuration_that_cannot_be_used_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    before = fleet.switcher.reloader.config
    async with running(fleet) as requests:
        (await requests.served("qwen")).finish.set()
        with pytest.raises(ConfigError, match=r"\$\.models\.llama\.url"):
            await fleet.reload(llama={"url": "no"})
        with pytest.raises(ConfigError, match=r"\$\.memory: cannot be changed while the gateway runs: restart it"):
            await fleet.reload({"memory": {"settle": 1}}, llama="b")
        with pytest.raises(ConfigError, match="is empty"):
            await fleet.reload(llama={"url": "http://b", "api_key": {"env": "LLMUX_NO_SUCH_KEY"}})
        assert fleet.switcher.models == ("qwen",)
        assert fleet.switcher.reloader.config is before
        (await requests.served("qwen")).finish.set()


async def test_a_switcher_of_backends_has_no_configuration_to_replace() -> None:
    from tests.support.pool import Pool

    with pytest.raises(ConfigError, match="was built from backends"):
        await Pool().switcher.reload({"models": {"qwen": {"url": "http://a"}}})


async def test_a_servers_new_key_is_a_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMUX_KEY", "one-key")
    qwen = {"url": "http://a", "api_key": {"env": "LLMUX_KEY"}}
    fleet = Fleet(monkeypatch, qwen=qwen)
    async with running(fleet):
        assert await fleet.reload(qwen=qwen) == ReloadReport()
        monkeypatch.setenv("LLMUX_KEY", "another-key")
        assert await fleet.reload(qwen=qwen) == ReloadReport(changed=("qwen",))
        await until_settled(fleet)
        assert len(fleet.built) == 2


async def test_a_new_server_that_is_awake_already_is_put_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        fleet.gpu.awake.add("b")
        await fleet.reload(qwen="a", llama="b")
        await until_settled(fleet)
        while fleet.gpu.awake != {"a"}:
            await anyio.lowlevel.checkpoint()
        assert not runs.interrupted
        runs.finish.set()


async def test_the_end_of_the_gateway_refuses_who_waits_for_a_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen="b")
        waits = requests.send("qwen")
        await until_waiting(fleet, "qwen", 1)
        await fleet.switcher.aclose()
        await waits.done.wait()
        assert isinstance(waits.error, SwitchError)
        runs.finish.set()
        await runs.done.wait()
        # It may be used again: the next request finds the new server.
        again = await requests.served("qwen")
        assert again.server == "b"
        again.finish.set()


async def test_who_was_promised_a_server_that_goes_back_to_another_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(qwen="b", llama="a")
        waits = requests.send("llama")
        await until_waiting(fleet, "llama", 1)
        await fleet.reload(qwen="a")
        await waits.done.wait()
        assert isinstance(waits.error, UnknownModelError)
        assert fleet.switcher.statistics().unsettled == ()
        runs.finish.set()


async def test_who_waits_for_a_model_that_is_removed_comes_before_who_has_its_address_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        runs = await requests.served("qwen")
        await fleet.reload(llama="a")
        between = requests.send("llama")
        await until_waiting(fleet, "llama", 1)
        await fleet.reload(phi="a")
        last = requests.send("phi", finish=True)
        await until_waiting(fleet, "phi", 1)
        runs.finish.set()
        await between.granted.wait()
        assert not last.granted.is_set()
        between.finish.set()
        await last.done.wait()
        assert between.error is last.error is None


async def test_with_preemption_a_server_that_cannot_freeze_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = {"policy": {"drain": "preempt"}}
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as requests:
        (await requests.served("qwen")).finish.set()
        server = fleet.server("qwen")
        server.freezes = False
        with pytest.raises(BackendUnsupportedError):
            await fleet.reload(preempt, qwen="a")
        assert fleet.switcher.max_frozen == 0.0
        server.freezes = True
        assert (await fleet.reload(preempt, qwen="a")).settings == ("policy",)
        assert fleet.switcher.max_frozen == 300.0
        await fleet.reload(preempt, qwen="a", llama="b")
        await until_settled(fleet)
        assert fleet.server("llama").closed == 1  # it was asked before it came in


async def test_operators_see_it_and_a_removed_model_is_not_pinned_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a", llama="b")
    async with running(fleet) as requests:
        (await requests.served("qwen")).finish.set()
        fleet.switcher.pin("qwen")
        await fleet.reload(llama="b", phi="c")
        assert fleet.switcher.pinned is None
        entries = {entry.kind: entry.data for entry in fleet.switcher.journal.since(0)[0]}
        assert entries["config"] == {"added": ["phi"], "changed": [], "removed": ["qwen"], "settings": []}
        await requests.send("llama", finish=True).done.wait()
        await until_settled(fleet)
        assert fleet.gpu.awake == {"b"}


async def test_what_was_measured_of_a_server_is_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, qwen={"url": "http://a", "costs": {"wake": 5}}, llama="b")
    async with running(fleet):
        costs = fleet.switcher.statistics().costs
        assert (costs["qwen"].wake, costs["llama"].wake) == (5.0, None)
        await fleet.reload(qwen={"url": "http://a", "costs": {"wake": 6}}, llama={"url": "http://c", "costs": {"wake": 7}})
        await until_settled(fleet)
        costs = fleet.switcher.statistics().costs
        assert (costs["qwen"].wake, costs["llama"].wake) == (6.0, 7.0)
        await fleet.reload(qwen={"url": "http://d", "sleep_level": 2}, llama={"url": "http://c", "costs": {"wake": 7}})
        await until_settled(fleet)
        assert fleet.switcher.statistics().costs["qwen"].wake is None
