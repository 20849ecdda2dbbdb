"""What vLLM 0.32 answers to inference, by its shape: recorded from a real server, the same for the simulated one."""

from __future__ import annotations

import http.client
from contextlib import closing

import msgspec
import pytest

from .driver import Driver, Stream
from .inference import CASES, RECORDED, ask

_RECORDED = msgspec.json.decode(RECORDED.read_bytes())


@pytest.mark.parametrize("case", CASES)
def test_answers_have_their_recorded_shape(driver: Driver, case: str) -> None:
    assert ask(driver.client, driver.name, case) == _RECORDED[case]


def test_a_body_that_does_not_say_that_it_is_json_is_refused(driver: Driver) -> None:
    answer = driver.client.post("/v1/chat/completions", content=b"{}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, None)
    assert "application/json" in answer.json()["error"]["message"]


def test_the_tokens_of_a_chat_are_as_many_as_its_usage_says(driver: Driver) -> None:
    chat = {"model": driver.name, "messages": [{"role": "user", "content": "the quick brown fox"}]}
    used = driver.post("/v1/chat/completions", {**chat, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert driver.post("/tokenize", chat).json()["count"] == used
    assert driver.post("/v1/messages/count_tokens", chat).json()["input_tokens"] == used


def test_the_events_of_a_response_are_numbered(driver: Driver) -> None:
    body = {"model": driver.name, "input": "the", "max_output_tokens": 5, "temperature": 0, "stream": True}
    events = Stream(driver.client, "/v1/responses", body).end().events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in events if "delta" in event) == next(e["text"] for e in events if "text" in e)


def test_a_response_is_found_again(driver: Driver) -> None:
    made = driver.post("/v1/responses", {"model": driver.name, "input": "the", "max_output_tokens": 3}).json()
    assert driver.get(f"/v1/responses/{made['id']}").json() == made
    refused = driver.post(f"/v1/responses/{made['id']}/cancel")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_id")
    assert driver.get("/v1/responses/resp_unknown").status_code == 404


def test_a_response_in_the_background_can_be_cancelled(driver: Driver) -> None:
    body = {"model": driver.name, "input": "the", "max_output_tokens": 900, "background": True}
    made = driver.post("/v1/responses", body).json()
    assert (made["status"], made["output"], made["usage"]) == ("queued", [], None)
    assert driver.post(f"/v1/responses/{made['id']}/cancel").json()["status"] == "cancelled"
    assert driver.get(f"/v1/responses/{made['id']}").json()["status"] == "cancelled"


def test_a_slash_too_many_is_redirected_to_the_server_itself(driver: Driver) -> None:
    """A trap for a gateway: the address is the server's own, and control routes are reached like this too."""
    url = driver.client.base_url
    with closing(http.client.HTTPConnection(url.host, url.port or 80, timeout=30)) as connection:
        for path in ("/v1/chat/completions", "/is_sleeping"):
            connection.request("POST", path + "/", b"{}")
            answer = connection.getresponse()
            answer.read()
            assert (answer.status, answer.getheader("location")) == (307, f"http://{url.host}:{url.port}{path}")


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/metrics", "/load", "/weight_info"])
def test_what_no_client_should_see_is_there(driver: Driver, path: str) -> None:
    assert driver.get(path).status_code == 200


def test_requests_can_be_aborted_by_anybody_who_reaches_the_server(vllm: Driver) -> None:
    vllm.sleep()
    stream = vllm.stream()
    assert not stream.wait_for_events(1, timeout=0.2)
    assert vllm.post("/abort_requests", {}).json() == {"status": "aborted", "aborted": 1}
    assert stream.end().text == ""
    assert vllm.post("/update_weights", {}).status_code == 400
