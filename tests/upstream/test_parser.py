"""The parser of answers: any split of the bytes reads the same, and no bytes do more than fail."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmux_asgi.upstream._parser import MAX_HEAD, MAX_HEADERS, MAX_INTERIM, Http1Response, ResponseParser

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"content-length: 2\r\n\r\nhi"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"

REFUSED = {
    "two lengths": OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi!",
    "the same length twice": OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nhi",
    "a list of lengths": OK + b"content-length: 2, 2\r\n\r\nhi",
    "a signed length": OK + b"content-length: +2\r\n\r\nhi",
    "a length in hex": OK + b"content-length: 0x2\r\n\r\nhi",
    "no length": OK + b"content-length: \r\n\r\nhi",
    "an enormous length": OK + b"content-length: 99999999999999999999\r\n\r\nhi",
    "length and chunks": OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "chunks and length": OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "another coding": OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "a coding after chunked": OK + b"transfer-encoding: chunked, gzip\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "an unknown coding": OK + b"transfer-encoding: xchunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "chunks of HTTP/1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "a chunk that is too long": CHUNKED + b"2\r\nhi!\r\n0\r\n\r\n",
    "a chunk size with a sign": CHUNKED + b"-2\r\nhi\r\n0\r\n\r\n",
    "a chunk size with a space": CHUNKED + b"2 \r\nhi\r\n0\r\n\r\n",
    "a chunk size without CR": CHUNKED + b"2\nhi\r\n0\r\n\r\n",
    "an enormous chunk": CHUNKED + b"fffffffffffffffff\r\nhi",
    "line ends without CR": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nhi",
    "a folded header": OK + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\nhi",
    "a space before the colon": OK + b"content-length : 2\r\n\r\nhi",
    "a zero byte": OK + b"x: a\0b\r\ncontent-length: 2\r\n\r\nhi",
    "a bare CR": OK + b"x: a\rb\r\ncontent-length: 2\r\n\r\nhi",
    "another protocol": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "an unknown interim answer": b"HTTP/1.1 199 What\r\n\r\n" + PLAIN,
    "HTTP/2": b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a request": b"POST / HTTP/1.1\r\n\r\n",
    "a status below 100": b"HTTP/1.1 99 Low\r\ncontent-length: 2\r\n\r\nhi",
    "a status above 999": b"HTTP/1.1 2000 High\r\ncontent-length: 2\r\n\r\nhi",
    "a long header": OK + b"x: " + b"y" * MAX_HEAD + b"\r\ncontent-length: 2\r\n\r\nhi",
    "many headers": OK + b"x: y\r\n" * MAX_HEADERS + b"content-length: 2\r\n\r\nhi",
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INTERIM + 1) + PLAIN,
    "an endless trailer": CHUNKED + b"0\r\nx: " + b"y" * (MAX_HEAD + 65536),
    "an endless chunk extension": CHUNKED + b"2;x=" + b"y" * (MAX_HEAD + 65536),
}


class NoConnection:
    """What an answer needs of a connection, if nobody waits for it."""

    async def advance(self) -> None:
        raise AssertionError("nothing more comes")

    def close(self) -> None:
        pass


def read(pieces: list[bytes], method: bytes = b"POST", *, ends: bool = True) -> tuple[Http1Response, ResponseParser]:
    """Feed an answer piece by piece as a connection does: until it is whole or has failed."""
    parser, response = ResponseParser(), Http1Response(NoConnection())
    parser.expect(method, response)
    for piece in pieces:
        if response.whole or response.fault:
            break
        parser.feed(piece)
    if ends and not (response.whole or response.fault):
        parser.end()
    return response, parser


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places) if end > start]


def outcome(response: Http1Response) -> tuple[object, ...]:
    return (response.status, response.headers, b"".join(response.chunks), response.whole, response.fault)


@pytest.mark.parametrize("size", [1 << 20, 4096, 1], ids=["at once", "in pages", "byte by byte"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(case: str, size: int) -> None:
    data = REFUSED[case]
    response, parser = read([data[i : i + size] for i in range(0, len(data), size)], ends=False)
    assert response.fault.startswith("sent what is not a valid answer: ")
    assert not response.whole
    assert not parser.reusable


@pytest.mark.parametrize(
    ("answer", "method"),
    [
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", b"POST"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"POST"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nhi", b"POST"),
        (PLAIN + b"x", b"POST"),
        (PLAIN + PLAIN, b"POST"),
        (CHUNKED + b"2\r\nhi\r\n0\r\n\r\n" + PLAIN, b"POST"),
        (b"HTTP/1.1 204 No Content\r\n\r\nhi", b"POST"),
        (OK + b"content-length: 2\r\n\r\n", b"HEAD"),
        (PLAIN, b"HEAD"),
    ],
)
def test_an_answer_is_whole_and_its_connection_is_not_used_again(answer: bytes, method: bytes) -> None:
    response, parser = read([answer], method)
    assert response.whole
    assert b"".join(response.chunks) == (b"hi" if method == b"POST" and response.status != 204 else b"")
    assert not parser.reusable


def test_answers_follow_each_other_on_a_connection() -> None:
    _, parser = read([PLAIN])
    for answer in (CHUNKED + b"2\r\nhi\r\n0\r\nx: y\r\n\r\n", PLAIN, b"HTTP/1.1 304 Same\r\ncontent-length: 7\r\n\r\n", PLAIN):
        assert parser.reusable
        parser.expect(b"POST", response := Http1Response(NoConnection()))
        parser.feed(answer)
        assert response.whole
        assert len(response.headers) == 1


def test_a_long_answer_in_short_chunks_is_not_taken_for_a_long_head() -> None:
    data = CHUNKED + b"1\r\nx\r\n" * (MAX_HEAD // 4) + b"0\r\n\r\n"
    response, _ = read([data[i : i + 1] for i in range(len(data))])
    assert b"".join(response.chunks) == b"x" * (MAX_HEAD // 4)
    assert response.whole


def test_bytes_that_nobody_asked_for_spoil_a_connection() -> None:
    _, parser = read([PLAIN])
    parser.feed(PLAIN)
    assert not parser.reusable


headers = st.lists(
    st.tuples(st.sampled_from([b"x", b"Set-Cookie", b"date"]), st.from_regex(rb"\A[!-~\x80-\xff]{0,12}\Z")), max_size=4
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Answers of any framing, whole or cut, with or without something behind them."""
    status = draw(st.sampled_from([b"200 OK", b"204 No", b"304 Same", b"404 ", b"500 Oops"]))
    lines = [b"HTTP/1.1 " + status, *[name + b": " + value for name, value in draw(headers)]]
    body = draw(st.binary(max_size=30))
    match draw(st.sampled_from(["length", "chunks", "close"])):
        case "length":
            lines.append(b"content-length: %d" % len(body))
        case "chunks":
            lines.append(b"transfer-encoding: chunked")
            sizes = draw(st.lists(st.integers(1, 9), max_size=4))
            parts = [body[sum(sizes[:i]) :][:size] for i, size in enumerate(sizes)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"
    data = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"])) + b"\r\n".join(lines) + b"\r\n\r\n" + body
    kept = draw(st.integers(0, len(data)) | st.just(len(data)))
    return data[:kept] + draw(st.sampled_from([b"", b"x", PLAIN]))


@given(answers(), st.lists(st.integers(0, 10_000), max_size=8))
@settings(max_examples=300)
def test_any_split_of_an_answer_reads_the_same(data: bytes, cuts: list[int]) -> None:
    whole, _ = read([data])
    parts, _ = read(split(data, cuts))
    assert outcome(parts) == outcome(whole)


FRAGMENTS = [
    OK,
    PLAIN,
    CHUNKED,
    b"\r\n",
    b"\r",
    b"\n",
    b"content-length: 5\r\n",
    b"5\r\n",
    b"0\r\n\r\n",
    b": ",
    b"\0",
    b"HTTP/1.1 1",
]


@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=20), max_size=12), st.lists(st.integers(0, 10_000), max_size=5))
@example([b"HTTP/1.1 101 S\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", PLAIN], [])
@settings(max_examples=500)
def test_no_bytes_do_more_than_fail(fragments: list[bytes], cuts: list[int]) -> None:
    data = b"".join(fragments)
    response, parser = read(split(data, cuts))
    assert response.whole or response.fault
    assert response.status == 0 or 200 <= response.status <= 999
    if response.fault:
        assert not parser.reusable
