"""What vLLM's servers do, line by line of the contract: the same tests for the simulated server and the real one."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import httpx
import pytest

from tests.support.eventually import eventually

from .conftest import ContractServer
from .driver import LONG, Call, Driver, Stream

# Answers of the control routes


def test_sleep_and_wake_answer_with_their_status(vllm: Driver) -> None:
    slept = vllm.post("/sleep?level=1&mode=abort")
    assert (slept.status_code, slept.json()) == (200, {"status": "sleeping", "level": 1})
    assert vllm.get("/is_sleeping").json() == {"is_sleeping": True}
    woke = vllm.post("/wake_up")
    assert (woke.status_code, woke.json()) == (200, {"status": "awake", "tags": None})
    assert vllm.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_json_body_of_sleep_is_ignored(vllm: Driver) -> None:
    assert vllm.post("/sleep", {"level": 2, "mode": "keep"}).json() == {"status": "sleeping", "level": 1}


@pytest.mark.parametrize("query", ["level=3", "level=-1", "level=x", "level=1&mode=drain", "mode="])
def test_a_bad_level_or_mode_is_refused_and_changes_nothing(vllm: Driver, query: str) -> None:
    refused = vllm.sleep(query)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == 400
    assert not vllm.is_sleeping()


def test_control_routes_want_their_method(vllm: Driver) -> None:
    assert [vllm.get(path).status_code for path in ("/sleep", "/wake_up", "/collective_rpc")] == [405, 405, 405]
    assert vllm.get("/no/such/route").status_code == 404


def test_openapi_tells_that_sleep_knows_modes(vllm: Driver) -> None:
    paths = vllm.get("/openapi.json").json()["paths"]
    mode = next(p for p in paths["/sleep"]["post"]["parameters"] if p["name"] == "mode")
    assert set(mode["schema"]["enum"]) == {"abort", "wait", "keep"}
    assert {"/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache"} <= paths.keys()


def test_server_info_tells_whether_sleep_mode_is_on(vllm: Driver) -> None:
    told = vllm.get("/server_info?config_format=json").json()["vllm_config"]
    assert told["model_config"]["enable_sleep_mode"] in (True, False)
    assert isinstance(vllm.get("/server_info").json()["vllm_config"], str)


def test_version_is_told(vllm: Driver) -> None:
    assert vllm.get("/version").json()["version"].startswith("0.")


def test_sleeping_and_waking_twice_is_harmless(vllm: Driver) -> None:
    assert [vllm.sleep().status_code for _ in range(2)] == [200, 200]
    assert vllm.is_sleeping()
    assert [vllm.wake().json()["status"] for _ in range(2)] == ["awake", "awake"]
    assert not vllm.is_sleeping()


# Asleep


def test_health_and_models_answer_while_asleep(vllm: Driver) -> None:
    vllm.sleep()
    assert vllm.get("/health").status_code == 200
    models = vllm.get("/v1/models")
    assert (models.status_code, models.json()["data"][0]["id"]) == (200, vllm.name)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_request_sent_while_asleep_hangs_until_wake_up(vllm: Driver, server: ContractServer, level: int) -> None:
    vllm.sleep(f"level={level}")
    assert vllm.is_sleeping()
    stream = vllm.stream(max_tokens=5)
    assert not stream.wait_for_events(1, timeout=0.3)
    assert not stream.finished
    if level == 2:
        _wake_from_level_2(vllm, server)
    else:
        vllm.wake()
    assert stream.end().finish_reason == "length"
    assert stream.completion_tokens == 5


@pytest.mark.parametrize(("level", "state"), [(1, "weights_offloaded"), (2, "discard_all")])
def test_the_metric_tells_the_sleep_level(vllm: Driver, server: ContractServer, level: int, state: str) -> None:
    awake = {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0}
    assert vllm.sleep_states() == awake
    vllm.sleep(f"level={level}")
    assert vllm.sleep_states() == {**dict.fromkeys(awake, 0.0), state: 1.0}
    if level == 2:
        _wake_from_level_2(vllm, server)
    else:
        vllm.wake()
    assert vllm.sleep_states() == awake


def test_the_metrics_do_not_count_requests_that_wait_for_the_wake_up(vllm: Driver) -> None:
    """They are written when the engine steps: so they cannot tell whether a sleeper has requests."""
    vllm.sleep()
    stream = vllm.stream(max_tokens=5)
    assert not stream.wait_for_events(1, timeout=0.3)
    assert vllm.metric("vllm:num_requests_waiting") == 0
    vllm.wake()
    assert stream.end().finish_reason == "length"


def test_the_metrics_count_requests_tokens_and_the_time_to_the_first_one(vllm: Driver) -> None:
    def counts() -> list[float | None]:
        success = vllm.metric("vllm:request_success_total", 'finished_reason="length"')
        names = (
            "vllm:generation_tokens_total",
            "vllm:time_to_first_token_seconds_count",
            "vllm:e2e_request_latency_seconds_count",
        )
        return [success, *map(vllm.metric, names)]

    vllm.complete(5)
    eventually("there are counts", lambda: None not in counts())
    before = counts()
    vllm.complete(5)
    expected = [each + more for each, more in zip(before, (1, 5, 1, 1), strict=True) if each is not None]
    eventually("they have grown", lambda: counts() == expected)


def test_sleep_level_2_has_no_effect_on_a_level_1_sleeper(vllm: Driver) -> None:
    before = vllm.complete()
    vllm.sleep("level=1")
    assert vllm.sleep("level=2").status_code == 200
    vllm.wake()
    assert vllm.complete() == before  # no reload was needed


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_aborted_before_its_first_token_closes_without_any_finish_reason(vllm: Driver, chat: bool) -> None:
    vllm.sleep()
    stream = vllm.stream(max_tokens=5, chat=chat)
    assert not stream.wait_for_events(1, timeout=0.2)
    vllm.sleep("mode=abort")
    stream.end()
    assert (stream.status, stream.finish_reason, stream.closed_with_done) == (200, None, True)
    assert (stream.text, stream.completion_tokens) == ("", 0)
    assert vllm.is_sleeping()


def test_a_whole_request_aborted_before_its_first_token_is_empty(vllm: Driver) -> None:
    vllm.sleep()
    call = vllm.post_later("/v1/completions", vllm.payload(5))
    call.join(0.3)  # nothing tells that it has arrived
    assert not call.done
    vllm.sleep("mode=abort")
    choice = call.response().json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "abort")


def test_a_stream_of_responses_begins_while_asleep(vllm: Driver) -> None:
    """So a first byte does not prove that the model is awake."""
    vllm.sleep()
    stream = Stream(vllm.client, "/v1/responses", {"model": vllm.name, "input": "the", "stream": True})
    assert stream.wait_for_events(1)
    stream.wait_until_quiet()
    assert stream.events[0]["type"] == "response.created"
    assert not stream.finished


# Waking in parts


def test_a_staged_wake_is_awake_after_the_last_tag(vllm: Driver) -> None:
    vllm.sleep()
    assert vllm.wake("weights").json() == {"status": "sleeping", "tags": ["weights"]}
    assert vllm.is_sleeping()
    assert vllm.wake("kv_cache").json() == {"status": "awake", "tags": ["kv_cache"]}
    assert not vllm.is_sleeping()


def test_a_request_waits_for_the_last_tag(vllm: Driver) -> None:
    vllm.sleep()
    stream = vllm.stream(max_tokens=5)
    vllm.wake("weights")
    assert not stream.wait_for_events(1, timeout=0.3)
    vllm.wake("kv_cache")
    assert stream.end().finish_reason == "length"


def test_an_unknown_tag_wakes_nothing(vllm: Driver) -> None:
    vllm.sleep()
    answer = vllm.wake("no_such_tag")
    assert (answer.status_code, answer.json()["status"]) == (200, "sleeping")
    assert vllm.is_sleeping()


def test_two_tags_of_which_one_is_awake_wake_nothing(vllm: Driver) -> None:
    vllm.sleep()
    vllm.wake("weights")
    answer = vllm.wake("weights", "kv_cache")
    assert (answer.status_code, answer.json()["status"]) == (200, "sleeping")
    assert vllm.is_sleeping()
    assert vllm.wake("kv_cache").json()["status"] == "awake"


# Level 2


def _wake_from_level_2(vllm: Driver, server: ContractServer) -> None:
    if not server.supports_reload:
        pytest.skip("this server has dummy weights: nothing to reload")
    assert vllm.wake("weights").json()["status"] == "sleeping"
    assert vllm.reload_weights().status_code == 200
    assert vllm.wake("kv_cache").json()["status"] == "awake"
    assert vllm.post("/reset_prefix_cache").status_code == 200


def test_a_level_2_cycle_with_reload_gives_the_same_model_back(vllm: Driver, server: ContractServer) -> None:
    before = vllm.complete()
    assert vllm.sleep("level=2").json() == {"status": "sleeping", "level": 2}
    assert vllm.is_sleeping()
    _wake_from_level_2(vllm, server)
    assert not vllm.is_sleeping()
    assert vllm.complete() == before


def test_an_unknown_worker_method_fails(vllm: Driver) -> None:
    assert vllm.post("/collective_rpc", {}).status_code == 400
    assert vllm.post("/collective_rpc", {"method": "no_such_method"}).status_code == 500
    with httpx.Client(base_url=vllm.client.base_url, trust_env=False) as other:
        assert other.get("/health").status_code == 200


def test_after_a_500_the_connection_is_closed_without_notice(vllm: Driver) -> None:
    """A client that keeps its connections finds this one reset when it uses it next."""
    url = vllm.client.base_url
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=30)
    with closing(connection):
        body = b'{"method": "no_such_method"}'
        connection.request("POST", "/collective_rpc", body, {"content-type": "application/json"})
        socket = connection.sock  # http.client forgets it when it is told that the connection ends
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("connection")) == (500, None)
        assert socket.recv(1) == b""


# Control calls that meet a stream in its middle

T = TypeVar("T")


def caught(vllm: Driver, attempt: Callable[[], T | None]) -> T:
    """Return what `attempt` gives. It gives None if the stream was over before the control call was looked at.

    That happens on real servers: while it has much to send, vLLM's API server leaves other calls waiting. Then nothing has
    been shown either way, and another stream is tried.
    """
    for _ in range(8):
        if (result := attempt()) is not None:
            return result
        vllm.reset()
    raise AssertionError("every stream was over before the control call was looked at")


def aborted(vllm: Driver, start: Callable[[], Stream], tokens: Callable[[Stream], int], query: str) -> Stream:
    """Start a stream, send `/sleep?query` in its middle, and return the stream when it has ended."""

    def attempt() -> Stream | None:
        stream = start()
        assert stream.wait_for_events(3)
        assert vllm.sleep(query).status_code == 200
        return stream if tokens(stream.end()) < LONG // 2 else None

    return caught(vllm, attempt)


# mode=abort


@pytest.mark.parametrize("chat", [False, True])
def test_abort_ends_a_stream_as_if_it_were_a_success(vllm: Driver, chat: bool) -> None:
    stream = aborted(vllm, lambda: vllm.stream(chat=chat), lambda each: each.completion_tokens, "level=1&mode=abort")
    assert (stream.status, stream.finish_reason, stream.closed_with_done) == (200, "abort", True)
    assert 0 < stream.completion_tokens < LONG


def test_abort_is_the_default_mode(vllm: Driver) -> None:
    stream = aborted(vllm, vllm.stream, lambda each: each.completion_tokens, "level=1")
    assert stream.finish_reason == "abort"


@pytest.mark.parametrize("chat", [False, True])
def test_abort_answers_whole_requests_with_200_and_what_there_is(vllm: Driver, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"

    def attempt() -> list[str] | None:
        calls = [vllm.post_later(path, vllm.payload(LONG, chat=chat)) for _ in range(8)]
        eventually("requests run", lambda: (vllm.metric("vllm:num_requests_running") or 0) > 0)
        vllm.sleep("level=1&mode=abort")
        vllm.wake()  # lets one that came after the sleep run on
        answers = [call.response() for call in calls]
        assert {answer.status_code for answer in answers} == {200}
        choices = [answer.json() for answer in answers]
        if all(answer["usage"]["completion_tokens"] == LONG for answer in choices):
            return None
        return [answer["choices"][0]["finish_reason"] for answer in choices]

    reasons = caught(vllm, attempt)
    assert "abort" in reasons
    assert set(reasons) <= {"abort", "length"}


def test_an_aborted_response_says_it_is_completed(vllm: Driver) -> None:
    """The trap of /v1/responses: nothing in the answer tells that it was cut short."""
    payload = {"model": vllm.name, "input": "the fox", "max_output_tokens": LONG, "ignore_eos": True, "stream": True}

    def tokens(stream: Stream) -> int:
        return int(stream.events[-1]["response"]["usage"]["output_tokens"])

    stream = aborted(vllm, lambda: Stream(vllm.client, "/v1/responses", payload), tokens, "level=1&mode=abort")
    final = stream.events[-1]
    assert final["type"] == "response.completed"
    assert (final["response"]["status"], final["response"]["incomplete_details"]) == ("completed", None)
    assert final["response"]["usage"]["output_tokens"] < LONG // 2


def test_an_aborted_message_has_no_stop_reason(vllm: Driver) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    payload = {"model": vllm.name, "messages": messages, "max_tokens": LONG, "ignore_eos": True, "stream": True}

    def delta(stream: Stream) -> dict[str, Any]:
        return next(event for event in stream.events if event["type"] == "message_delta")

    def tokens(stream: Stream) -> int:
        return int(delta(stream)["usage"]["output_tokens"])

    stream = aborted(vllm, lambda: Stream(vllm.client, "/v1/messages", payload), tokens, "level=1&mode=abort")
    assert delta(stream)["delta"]["stop_reason"] is None
    assert tokens(stream) < LONG // 2


# mode=wait


def _start_draining(vllm: Driver) -> tuple[Stream, Call]:
    def attempt() -> tuple[Stream, Call] | None:
        stream = vllm.stream()
        assert stream.wait_for_events(5)
        call = vllm.post_later("/sleep?level=1&mode=wait")
        eventually("is_sleeping", lambda: vllm.is_sleeping())
        return None if call.done or stream.finished else (stream, call)

    return caught(vllm, attempt)


def test_wait_answers_when_requests_in_flight_are_done(vllm: Driver) -> None:
    stream, call = _start_draining(vllm)
    events = len(stream.events)
    assert stream.wait_for_events(events + 5), "is_sleeping is true while the stream still runs"
    assert call.response().json() == {"status": "sleeping", "level": 1}
    stream.end()
    assert (stream.finish_reason, stream.completion_tokens) == ("length", LONG)
    assert vllm.is_sleeping()


def test_new_requests_queue_while_it_drains(vllm: Driver) -> None:
    first, call = _start_draining(vllm)
    second = vllm.stream(max_tokens=5)
    assert call.response().status_code == 200
    assert first.end().completion_tokens == LONG
    assert not second.wait_for_events(1, timeout=0.2)
    vllm.wake()
    assert second.end().finish_reason == "length"


def test_a_second_sleep_with_abort_ends_a_stuck_wait(vllm: Driver) -> None:
    def attempt() -> tuple[Stream, Call] | None:
        stream, call = _start_draining(vllm)
        assert vllm.sleep("level=1&mode=abort").status_code == 200
        return (stream, call) if stream.end().completion_tokens < LONG else None

    stream, call = caught(vllm, attempt)
    assert stream.finish_reason == "abort"
    assert call.response().status_code == 200
    assert vllm.is_sleeping()


def test_a_wait_whose_client_timed_out_sleeps_after_a_later_wake(vllm: Driver) -> None:
    def attempt() -> Stream | None:
        stream = vllm.stream()
        assert stream.wait_for_events(5)
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/sleep?level=1&mode=wait", timeout=0.05)
        eventually("it drains all the same", lambda: vllm.is_sleeping())
        assert vllm.wake().json()["status"] == "awake"
        sleeping = vllm.is_sleeping()
        if stream.finished:
            return None
        assert not sleeping
        return stream

    stream = caught(vllm, attempt)
    assert stream.end().completion_tokens == LONG
    eventually("the forgotten sleep comes true", lambda: vllm.is_sleeping())


# mode=keep


def test_keep_freezes_a_stream_and_completes_it_whole_after_the_wake_up(vllm: Driver) -> None:
    def attempt() -> Stream | None:
        stream = vllm.stream()
        assert stream.wait_for_events(5)
        assert vllm.sleep("level=1&mode=keep").status_code == 200
        stream.wait_until_quiet()
        return None if stream.finished else stream

    stream = caught(vllm, attempt)
    assert vllm.is_sleeping()
    vllm.wake()
    stream.end()
    assert (stream.finish_reason, stream.completion_tokens) == ("length", LONG)
    assert stream.closed_with_done


# Pausing


def test_pause_looks_like_sleep_until_resume(vllm: Driver) -> None:
    assert vllm.post("/pause").json() == {"status": "paused"}
    assert vllm.is_sleeping()
    assert vllm.get("/is_paused").json() == {"is_paused": True}
    assert vllm.post("/resume").json() == {"status": "resumed"}
    assert not vllm.is_sleeping()


def test_level_0_only_pauses(vllm: Driver) -> None:
    assert vllm.sleep("level=0").json() == {"status": "sleeping", "level": 0}
    assert vllm.is_sleeping()
    vllm.post("/resume")
    assert not vllm.is_sleeping()


def test_resume_unpauses_a_sleeping_engine_without_waking_it(vllm: Driver) -> None:
    vllm.sleep()
    assert vllm.post("/resume").status_code == 200
    assert vllm.get("/is_paused").json() == {"is_paused": False}
    assert vllm.is_sleeping()
    assert vllm.wake().json()["status"] == "awake"


# Requests


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_another_models_name_is_answered_with_404(vllm: Driver, path: str) -> None:
    answer = vllm.post(path, {**vllm.payload(3, chat="chat" in path), "model": "no-such-model"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
    assert "`no-such-model` does not exist" in error["message"]


def test_a_request_that_is_no_json_or_has_no_prompt_is_answered_with_400(vllm: Driver) -> None:
    broken = vllm.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, 400)
    assert vllm.post("/v1/completions", {"model": vllm.name}).status_code == 400


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_and_a_whole_answer_say_the_same(vllm: Driver, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    whole = vllm.post(path, vllm.payload(20, chat=chat)).json()
    stream = vllm.stream(20, chat=chat).end()
    choice = whole["choices"][0]
    assert stream.text == (choice["message"]["content"] if chat else choice["text"])
    assert stream.finish_reason == choice["finish_reason"] == "length"
    assert stream.completion_tokens == whole["usage"]["completion_tokens"] == 20
    assert stream.closed_with_done
    assert {event["model"] for event in stream.events} == {vllm.name}


def test_max_tokens_of_a_completion_is_16_by_default(vllm: Driver) -> None:
    payload = vllm.payload(1)
    del payload["max_tokens"]
    assert vllm.post("/v1/completions", payload).json()["usage"]["completion_tokens"] == 16


def test_tokens_turn_back_into_the_text(vllm: Driver) -> None:
    tokens = vllm.post("/tokenize", {"model": vllm.name, "prompt": "the lazy dog"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    text = vllm.post("/detokenize", {"model": vllm.name, "tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "the lazy dog"}


def test_responses_and_messages_are_answered(vllm: Driver) -> None:
    response = vllm.post("/v1/responses", {"model": vllm.name, "input": "the fox", "max_output_tokens": 4}).json()
    assert (response["object"], response["usage"]["output_tokens"]) == ("response", 4)
    assert (response["status"], response["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    messages = [{"role": "user", "content": "the fox"}]
    message = vllm.post("/v1/messages", {"model": vllm.name, "messages": messages, "max_tokens": 4}).json()
    assert (message["type"], message["usage"]["output_tokens"], message["stop_reason"]) == ("message", 4, "max_tokens")
