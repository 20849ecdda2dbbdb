"""What a client may use in a minute, and what its requests take. No clock, no sockets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmux_asgi import Identity, RateLimitError
from llmux_asgi.access._limits import Account, Charge, TokenBucket, reset_text
from llmux_asgi.access._usage import UsageMeter, estimate

PAUSES = st.lists(st.floats(0, 30), min_size=1, max_size=25)


def admitted(account: Account, now: float, tokens: float = 0.0) -> Charge | None:
    try:
        return account.admit(tokens, now)
    except RateLimitError:
        return None


@given(limit=st.integers(1, 20), pauses=PAUSES)
def test_no_window_has_more_requests_than_a_full_bucket_and_what_came_in_meanwhile(limit: int, pauses: list[float]) -> None:
    account = Account(Identity("k", requests_per_minute=limit), 0.0)
    now, times = 0.0, []
    for pause in pauses:
        now += pause
        for _ in range(3):
            if charge := admitted(account, now):
                times.append(now)
                charge.settle(0, now)
    for first, since in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= limit * (1 + (times[last] - since) / 60) + 1e-6


@given(
    limit=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 60), st.floats(0, 3000), st.floats(0, 3000)), min_size=1, max_size=50),
)
def test_over_time_no_more_tokens_are_used_than_come_in_but_for_one_request(
    limit: int, steps: list[tuple[float, float, float]]
) -> None:
    account = Account(Identity("k", tokens_per_minute=limit), 0.0)
    now, used, largest = 0.0, 0.0, 0.0
    for pause, guess, real in steps:
        now += pause
        if charge := admitted(account, now, guess):
            charge.settle(real, now)
            used, largest = used + real, max(largest, real)
            assert used <= limit * (1 + now / 60) + largest + 1e-6


@given(limit=st.integers(1, 1000), tokens=st.floats(1, 5000))
def test_who_waits_as_long_as_is_said_is_admitted(limit: int, tokens: float) -> None:
    account = Account(Identity("k", requests_per_minute=1, tokens_per_minute=limit), 0.0)
    account.admit(tokens, 0.0)
    now = 0.0
    for _ in range(2):  # one limit after the other
        try:
            account.admit(1.0, now)
        except RateLimitError as exc:
            now += math.ceil(exc.retry_after) + 1e-6
    assert now > 0
    account.admit(1.0, now + 60)


def test_what_is_refused_takes_nothing() -> None:
    account = Account(Identity("k", requests_per_minute=2, tokens_per_minute=10, max_concurrent=1), 0.0)
    running = account.admit(4, 0.0)
    before = account.headers(0.0)
    assert all(admitted(account, 0.0, 5) is None for _ in range(5))
    assert account.headers(0.0) == before
    assert account.in_flight == 1
    running.cancel(0.0)
    assert account.is_fresh(0.0)


def test_a_charge_ends_once() -> None:
    account = Account(Identity("k", requests_per_minute=10, tokens_per_minute=100), 0.0)
    charge = account.admit(50, 0.0)
    charge.settle(20, 0.0)
    charge.settle(90, 0.0)
    charge.cancel(0.0)
    assert account.in_flight == 0
    assert dict(account.headers(0.0))[b"x-ratelimit-remaining-requests"] == b"9"
    assert dict(account.headers(0.0))[b"x-ratelimit-remaining-tokens"] == b"80"


def test_one_request_may_leave_a_debt_which_the_next_ones_wait_for() -> None:
    account = Account(Identity("k", tokens_per_minute=60), 0.0)
    account.admit(1, 0.0).settle(180, 0.0)
    with pytest.raises(RateLimitError, match="60 tokens per minute") as caught:
        account.admit(1, 0.0)
    assert caught.value.retry_after == pytest.approx(121)
    assert admitted(account, 119.0) is None
    assert admitted(account, 122.0) is not None


def test_the_headers_say_what_is_left_and_when_all_of_it_is_back() -> None:
    account = Account(Identity("k", requests_per_minute=60, tokens_per_minute=600), 0.0)
    account.admit(60, 0.0)
    assert account.headers(0.0) == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"600"),
        (b"x-ratelimit-remaining-tokens", b"540"),
        (b"x-ratelimit-reset-tokens", b"6s"),
    ]
    assert Account(Identity("k"), 0.0).headers(0.0) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0121, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (360, "6m0s"),
        (90.25, "1m30.25s"),
        (3600, "1h0m0s"),
    ],
)
def test_a_reset_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert reset_text(seconds) == text


def test_new_rules_keep_what_was_used_where_the_limit_stays() -> None:
    account = Account(Identity("k", requests_per_minute=10, tokens_per_minute=10, max_concurrent=3), 0.0)
    charge = account.admit(10, 0.0)
    account.update(Identity("k", requests_per_minute=10, tokens_per_minute=20), 0.0)
    headers = dict(account.headers(0.0))
    assert (headers[b"x-ratelimit-remaining-requests"], headers[b"x-ratelimit-remaining-tokens"]) == (b"9", b"20")
    assert account.in_flight == 1
    charge.settle(0, 0.0)  # into the bucket that it came from
    assert dict(account.headers(0.0))[b"x-ratelimit-remaining-tokens"] == b"20"


@given(limit=st.integers(1, 100), amounts=st.lists(st.tuples(st.floats(0, 100), st.floats(-200, 200))))
def test_a_bucket_never_holds_more_than_its_limit(limit: int, amounts: list[tuple[float, float]]) -> None:
    bucket, now = TokenBucket(limit, 0.0), 0.0
    for pause, amount in amounts:
        now += pause
        bucket.add(amount, now)
        assert bucket.level(now) <= limit
        assert bucket.level(now + bucket.wait(limit, now)) == pytest.approx(limit)


# Tokens

CHAT = b'{"id":"x","choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5,'
CHAT += b'"prompt_tokens_details":{"cached_tokens":99}},"prompt_logprobs":null}'
RESPONSE = b'{"metadata":{"usage": "no"},"usage": {"input_tokens": 3, "output_tokens": 4}}'
STREAM = b'data: {"choices":[{}],"usage":null}\n\n' * 3
STREAM += b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'
MESSAGES = (
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":8,"output_tokens":0}}}\n\n'
    + b"event: content_block_delta\ndata: {}\n\n" * 500
    + b'event: message_delta\ndata: {"usage":{"output_tokens":6}}\n\n'
)
FORGED = b'{"choices":[{"message":{"content":"{\\"usage\\": {\\"total_tokens\\": 0}}"}}],"usage":{"total_tokens":50}}'


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [(CHAT, 12), (RESPONSE, 7), (STREAM, 5), (MESSAGES, 14), (FORGED, 50), (b'{"usage":{"total_tokens":-5}}', 100)],
)
@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_the_usage_that_an_answer_tells_is_found_however_it_is_cut(answer: bytes, tokens: int, size: int) -> None:
    meter = UsageMeter(100)
    for start in range(0, len(answer), size):
        meter.feed(answer[start : start + size])
    assert meter.tokens == tokens


def test_a_stream_that_does_not_tell_counts_as_the_prompt_and_its_events() -> None:
    meter = UsageMeter(100)
    for _ in range(20):
        meter.feed(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
    meter.feed(b": a comment\n\n")
    assert meter.tokens == 120


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([b'"usage":{', b'"usage": {"total_tokens":', b"9" * 30, b"}"]), max_size=20
    )
)
def test_an_answer_of_any_bytes_is_read_without_an_error(chunks: list[bytes]) -> None:
    meter = UsageMeter(1)
    for chunk in chunks:
        meter.feed(chunk)
    assert 0 <= meter.tokens < 1 << 54


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"max_tokens": 50, "messages": []}', 50),
        (b'{"max_completion_tokens": 9, "max_tokens": 50}', 9),
        (b'{"max_output_tokens": 3}', 3),
        (b'{"max_tokens": null}', 0),
        (b'{"max_tokens": "many"}', 0),
        (b'{"max_tokens": -5}', 0),
    ],
)
def test_a_request_is_estimated_by_its_length_and_the_longest_answer_it_allows(body: bytes, answer: int) -> None:
    assert estimate(body) == (len(body) / 4, answer)


def test_a_form_counts_nothing_before_its_answer() -> None:
    assert estimate(b"--x\r\n\r\n" + b"\x00\xff" * 1000) == (0, 0)
