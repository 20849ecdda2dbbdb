"""OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmux_asgi.sim.text import vector

from .conftest import ARGUMENTS, MODELS, SCHEMA, Gateway, said

openai: Any = importlib.import_module("openai")

_TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
_NAMED: Any = {"type": "function", "function": {"name": "weather"}}
_FLAT: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}


def _user(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Any]:
    with openai.OpenAI(base_url=gateway.v1, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_chats(client: Any) -> None:
    for name in (*MODELS, *MODELS):
        answer = client.chat.completions.create(model=name, messages=_user("hello"), max_tokens=9)
        assert answer.choices[0].message.content == said(name, "hello", 9)
        assert (answer.model, answer.usage.completion_tokens) == (name, 9)


def test_chats_streamed(client: Any) -> None:
    for name in MODELS:
        usage = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model=name, messages=_user("hi"), max_tokens=40, stream=True, stream_options=usage)
        )
        words = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert words == said(name, "hi", 40)
        assert [choice.finish_reason for choice in chunks[-2].choices] == ["length"]
        assert chunks[-1].usage.completion_tokens == 40


def test_completions(client: Any) -> None:
    texts = [client.completions.create(model=name, prompt="once", max_tokens=5).choices[0].text for name in MODELS]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (_NAMED, "stop")])
def test_tools(client: Any, choice: Any, reason: str) -> None:
    for name in MODELS:
        wanted: dict[str, Any] = {"model": name, "messages": _user("sunny?"), "tools": [_TOOL], "tool_choice": choice}
        answer = client.chat.completions.create(**wanted).choices[0]
        (call,) = answer.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
        assert answer.finish_reason == reason
        with client.chat.completions.stream(**wanted) as stream:
            final = stream.get_final_completion().choices[0]
        (call,) = final.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
        assert final.finish_reason == reason


def test_responses(client: Any) -> None:
    for name in MODELS:
        answer = client.responses.create(model=name, input="hello", max_output_tokens=7)
        assert (answer.model, answer.status, answer.usage.output_tokens) == (name, "incomplete", 7)
        assert answer.output_text
        with client.responses.stream(model=name, input="hello", max_output_tokens=7) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert kinds.count("response.output_text.delta") == 7
        assert final.output_text == answer.output_text


def test_tools_of_responses(client: Any) -> None:
    for name in MODELS:
        wanted: dict[str, Any] = {"model": name, "input": "sunny?", "tools": [_FLAT], "tool_choice": "required"}
        (call,) = client.responses.create(**wanted).output
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", ARGUMENTS)
        with client.responses.stream(**wanted) as stream:
            (call,) = stream.get_final_response().output
        assert json.loads(call.arguments) == ARGUMENTS


def test_a_response_is_retrieved_from_the_model_that_made_it(client: Any) -> None:
    made = [client.responses.create(model=name, input="hello", max_output_tokens=3) for name in MODELS]
    for answer in made:
        assert client.responses.retrieve(answer.id).output_text == answer.output_text
    slow = client.responses.create(model="alpha", input="hello", max_output_tokens=30_000, background=True)
    assert client.responses.cancel(slow.id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_unknown")


def test_embeddings(client: Any) -> None:
    for name in MODELS:
        answer = client.embeddings.create(model=name, input=["x", "y"])  # as base64, by default
        assert [each.embedding for each in answer.data] == [pytest.approx(vector(name, text)) for text in "xy"]
        plain = client.embeddings.create(model=name, input="x", encoding_format="float")
        assert plain.data[0].embedding == pytest.approx(vector(name, "x"))


# OpenAI ends its own translations, and its client says so; vLLM has them.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_audio(client: Any) -> None:
    sound = bytes(100_000)
    for name in MODELS:
        heard = client.audio.transcriptions.create(model=name, file=("a.wav", io.BytesIO(sound)), language="en")
        assert heard.text
        assert client.audio.translations.create(model=name, file=("a.wav", sound)).text == heard.text
        streamed = client.audio.transcriptions.create(model=name, file=("a.wav", sound), stream=True)
        deltas = [choice["delta"]["content"] for event in streamed for choice in event.model_extra["choices"]]
        assert "".join(deltas) == heard.text


def test_speech_and_images(client: Any) -> None:
    for name in MODELS:
        spoken = client.audio.speech.create(model=name, input="hello", voice="none", response_format="wav")
        assert spoken.content.startswith(b"RIFF")
        drawn = client.images.generate(model=name, prompt="hello", n=2)
        assert [base64.b64decode(each.b64_json)[:4] for each in drawn.data] == [b"\x89PNG"] * 2


def test_models(client: Any) -> None:
    assert {model.id for model in client.models.list()} == set(MODELS)
    for name in MODELS:
        assert client.models.retrieve(name).id == name
        client.completions.create(model=name, prompt="x", max_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("unknown")


def test_errors_have_the_clients_classes(client: Any, gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="unknown", messages=_user("hello"))
    assert unknown.value.code == "model_not_found"
    kinds = {400: openai.BadRequestError, 422: openai.UnprocessableEntityError, 429: openai.RateLimitError}
    for name in MODELS:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=name, messages=_user("hello"), max_tokens=0)
        assert refused.value.param == "max_tokens"
        for status, kind in kinds.items():
            gateway.servers[name].add_faults(f"request:1:{status}")
            with pytest.raises(kind) as told:
                client.chat.completions.create(model=name, messages=_user("hello"))
            assert told.value.body["message"] == "fault on demand: request"


def test_a_client_that_retries_gets_its_answer(gateway: Gateway) -> None:
    with openai.OpenAI(base_url=gateway.v1, api_key="none", max_retries=1, timeout=20) as client:
        for name in MODELS:
            gateway.servers[name].add_faults("request:1:429")
            answer = client.chat.completions.create(model=name, messages=_user("hello"), max_tokens=3)
            assert answer.choices[0].message.content == said(name, "hello", 3)


def test_many_at_once_of_both_models(gateway: Gateway) -> None:
    async def ask(client: Any, number: int) -> None:
        name, text = MODELS[number % 2], f"hello {number}"
        stream = await client.chat.completions.create(model=name, messages=_user(text), max_tokens=20, stream=True)
        words = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        assert "".join(words) == said(name, text, 20)

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=gateway.v1, api_key="none", max_retries=0, timeout=20) as client:
            await asyncio.gather(*[ask(client, number) for number in range(20)])

    asyncio.run(run())
