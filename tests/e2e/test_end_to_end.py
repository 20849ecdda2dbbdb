"""The whole job: two models, one of them awake, every answer what the server itself would have said.

The same tests run against simulated servers and, in `make test-vllm`, against two real vLLM servers on the CPU.
"""

from __future__ import annotations

import random
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import openai
import pytest

from tests.e2e.conftest import Pair, Prompt, directly, gateway_over, text_of
from tests.support.eventually import eventually, is_at_rest

PROMPTS = [
    Prompt(chat, stream, f"Number {index}: tell me of sleep", max_tokens=8 + 4 * index)
    for index, (chat, stream) in enumerate([(True, True), (True, False), (False, True), (False, False)])
]


async def ask(client: httpx.AsyncClient, model: str, prompt: Prompt) -> tuple[str, str]:
    response = await client.post(prompt.path, json=prompt.body(model))
    assert response.status_code == 200, response.text
    return text_of(prompt, response.content)


def check_ledger(pair: Pair) -> None:
    """Ask the simulated GPU whether two models ever held its memory at once."""
    if pair.ledger is not None:
        assert pair.ledger.max_awake() <= 1
        assert not [event for event in pair.ledger.events() if event.event == "request_while_asleep"]


@pytest.fixture(scope="module")
def expected(pair: Pair) -> dict[str, list[tuple[str, str]]]:
    """What the servers themselves answer, by the model's name in the gateway."""
    first, second = pair.servers
    answers = {"first": directly(pair, first, PROMPTS), "second": directly(pair, second, PROMPTS)}
    assert answers["first"] != answers["second"]
    assert all(text for text, _ in answers["first"])
    return answers


@pytest.mark.parametrize("level", [1, 2])
def test_every_answer_is_the_servers_own_across_fifty_alternations(
    pair: Pair, expected: dict[str, list[tuple[str, str]]], level: int
) -> None:
    with gateway_over(pair, sleep_level=level) as (llm, url), httpx.Client(base_url=url, timeout=60) as client:
        for turn in range(50):
            model = ("second", "first")[turn % 2]
            prompt, answer = PROMPTS[turn % 4], expected[model][turn % 4]
            response = client.post(prompt.path, json=prompt.body(model))
            assert response.status_code == 200, response.text
            assert text_of(prompt, response.content) == answer
        assert llm.switcher.statistics().switches >= 49
        assert llm.switcher.statistics().failures == 0
    check_ledger(pair)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_concurrent_mixed_requests_all_get_the_servers_own_answers(
    pair: Pair, expected: dict[str, list[tuple[str, str]]], loop: Any, level: int
) -> None:
    with gateway_over(pair, loop, sleep_level=level) as (llm, url):

        async def main() -> None:
            async def one(model: str, index: int) -> None:
                answers.append((model, index, await ask(client, model, PROMPTS[index])))

            answers: list[tuple[str, int, tuple[str, str]]] = []
            async with httpx.AsyncClient(base_url=url, timeout=60) as client, anyio.create_task_group() as tasks:
                for number in range(32):
                    tasks.start_soon(one, ("first", "second")[number % 2], number // 2 % 4)
            assert len(answers) == 32
            for model, index, answer in answers:
                assert answer == expected[model][index]

        anyio.run(main)
        eventually("nothing is in flight and nobody waits", lambda: is_at_rest(llm))
    check_ledger(pair)


def test_the_official_client_streams_and_lists(pair: Pair, expected: dict[str, list[tuple[str, str]]]) -> None:
    with gateway_over(pair) as (_, url), openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["first", "second"]
        for model in ("first", "second"):
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": PROMPTS[0].text}],
                temperature=0,
                max_tokens=PROMPTS[0].max_tokens,
                stream=True,
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == expected[model][0][0]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="nobody", prompt="")


def test_a_client_that_leaves_in_the_middle_of_a_stream_stops_the_generation_and_frees_its_place(pair: Pair) -> None:
    # Long enough to be cut short: seconds on either kind; a real server of the suite holds 1024 tokens.
    long = Prompt(chat=True, stream=True, text="go on", max_tokens=900 if pair.kind == "real" else 20_000)
    first = next(iter(pair.servers.values()))
    with gateway_over(pair) as (llm, url), httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(3):
            with client.stream("POST", long.path, json=long.body("first")) as response:
                chunks = response.iter_raw()  # kept: a generator that is dropped closes the connection
                next(chunks)
                assert llm.switcher.statistics().in_flight["first"] == 1
            # The other model's turn comes long before the stream would have been over.
            short = PROMPTS[3]
            assert client.post(short.path, json=short.body("second")).status_code == 200
        assert client.post(short.path, json=short.body("first")).status_code == 200
        eventually("the server stops generating", lambda: not first.metric("vllm:num_requests_running"))
    check_ledger(pair)


def test_five_hundred_concurrent_mixed_requests(pair: Pair) -> None:
    if pair.kind == "real":
        pytest.skip("32 at once are what two CPU cores can serve; the simulated servers take the 500")
    rng = random.Random(7)
    with gateway_over(pair) as (llm, url):

        async def main() -> list[int]:
            statuses: list[int] = []

            async def one(model: str, prompt: Prompt) -> None:
                response = await client.post(prompt.path, json=prompt.body(model))
                statuses.append(response.status_code)
                text, reason = text_of(prompt, response.content)
                assert text
                assert reason == "length"

            limits = httpx.Limits(max_connections=None)
            client = httpx.AsyncClient(base_url=url, timeout=90, limits=limits)
            async with client, anyio.create_task_group() as tasks:
                for _ in range(500):
                    tasks.start_soon(one, rng.choice(["first", "second"]), rng.choice(PROMPTS))
            return statuses

        assert anyio.run(main) == [200] * 500
        eventually("nothing is in flight and nobody waits", lambda: is_at_rest(llm))
        assert llm.switcher.statistics().failures == 0
    check_ledger(pair)
