"""Preemption for real: what a switch stops in the middle is the same answer in the end.

The same tests run against simulated servers and, in `make test-vllm`, against two real vLLM servers on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest

from llmux_asgi import PolicyContext, PolicyDecision, Stay, SwitchContext, SwitchNow, SwitchPolicy
from tests.contract.driver import Call, Stream
from tests.e2e.conftest import Pair, Prompt, directly, gateway_over, text_of
from tests.support.eventually import eventually, is_at_rest
from tests.support.serve import EventLoop

STREAMS = 8
TOKENS = {"sim": 1000, "real": 320}
LONG = {"sim": 6000, "real": 320}
"""Tokens of an answer that takes long enough, seconds on either kind, for another model to have its turn meanwhile."""
SHORT = Prompt(chat=True, stream=True, text="in short", max_tokens=8)
TURN = 1
"""Tokens that each stream of a model gets at least before the other one has its turn. On a busy machine it is dozens."""
ALTERNATIONS = 20


class TokenByToken(SwitchPolicy):
    """Preempts as soon as each stream of the active model has got its share, however fast its server is."""

    min_active_duration = 0.0
    request_timeout = None

    def __init__(self) -> None:
        self.streams: dict[str, list[Stream]] = {}
        self._turn: str | None = None
        self._seen: dict[Stream, int] = {}

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        if self._turn != context.active_model:
            self._turn, self._seen = context.active_model, {}
        streams = self.streams.get(context.active_model or "", [])
        shares = [
            stream.finished or len(stream.events) >= self._seen.setdefault(stream, len(stream.events)) + TURN
            for stream in streams
        ]
        return SwitchNow() if all(shares) else Stay(context.now + 0.005)

    async def prepare_switch(self, context: SwitchContext) -> None:
        await context.preempt(max_freezes=1000)


@dataclass(frozen=True)
class Undisturbed:
    """What is asked, and what the servers themselves answer: by the model's name in the gateway, the streams' answers first."""

    long: list[Prompt]
    plain: Prompt
    answers: dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def undisturbed(pair: Pair) -> Undisturbed:
    tokens = TOKENS[pair.kind]
    long = [Prompt(True, True, f"Number {index}: tell me of sleep", tokens) for index in range(STREAMS)]
    plain = Prompt(False, False, "and what of waking", tokens)
    names = dict(zip(("first", "second"), pair.servers, strict=True))
    return Undisturbed(long, plain, {alias: directly(pair, name, [*long, plain]) for alias, name in names.items()})


def text(stream: Stream) -> tuple[str, str | None]:
    assert stream.error is None
    assert stream.closed_with_done
    return stream.text, stream.finish_reason


def test_long_answers_of_two_models_take_turns_and_all_are_whole(pair: Pair, undisturbed: Undisturbed) -> None:
    policy, long, plain = TokenByToken(), undisturbed.long, undisturbed.plain
    with (
        gateway_over(pair, switches=policy, second={"sleep_level": 2}) as (llm, url),
        httpx.Client(base_url=url, timeout=300) as client,
    ):

        def send(model: str) -> httpx.Response:
            return client.post(plain.path, json=plain.body(model))

        waves = 0
        while waves == 0 or llm.switcher.statistics().switches < ALTERNATIONS:  # on a busy machine a turn is many tokens long
            streams = {model: [Stream(client, each.path, each.body(model)) for each in long] for model in ("first", "second")}
            calls = {model: Call(partial(send, model)) for model in streams}
            policy.streams = streams
            for model, answers in undisturbed.answers.items():
                assert [text(stream.end(300)) for stream in streams[model]] == answers[:STREAMS]
                assert text_of(plain, calls[model].response(300).content) == answers[STREAMS]
            waves += 1
        eventually("nothing is in flight, waits or is frozen", lambda: is_at_rest(llm))
        assert llm.switcher.statistics().failures == 0


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_long_answer_does_not_hold_up_another_model(pair: Pair, loop: EventLoop) -> None:
    policy: dict[str, Any] = {"name": "gated_quantum", "linger": 0, "drain": "preempt"}
    prompt = Prompt(True, True, "at great length", LONG[pair.kind])
    [undisturbed] = directly(pair, next(iter(pair.servers)), [prompt])
    second_was_awake = not [server.sleeps() for server in pair.servers.values()][1]
    with gateway_over(pair, loop, policy=policy) as (llm, url), httpx.Client(base_url=url, timeout=300) as client:
        long = Stream(client, prompt.path, prompt.body("first"))
        assert long.wait_for_events(3)
        short = Stream(client, SHORT.path, SHORT.body("second")).end()
        assert text(short)[0]
        assert not long.finished
        assert text(long.end(300)) == undisturbed
        assert llm.switcher.statistics().switches - (1 if second_was_awake else 0) == 2
