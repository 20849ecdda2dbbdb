"""The limits of one client: requests and tokens per minute, requests at once. Pure: the time is passed in, in seconds.

Both rates are token buckets: a bucket holds what may be used in a minute, is full at first, and fills at an even rate. So
within any t seconds at most `limit * (1 + t / 60)` requests begin: the whole bucket at once, then `limit` a minute.

How many tokens a request takes is known only when its answer is over. An estimate is taken out when it is admitted, and
corrected then. It is admitted while the bucket holds anything at all, so it may leave the bucket in debt, which has to fill up
before the next one is admitted: over time the rate is kept, whatever the estimates were.
"""

from __future__ import annotations

from ..exceptions import RateLimitError
from ._identity import Identity

__all__ = ["Account", "Charge", "TokenBucket", "reset_text"]

_MINUTE = 60.0
_CONCURRENCY_PAUSE = 1.0
"""What `Retry-After` says when too many requests run: nobody knows when one of them will be over."""

Header = tuple[bytes, bytes]


class TokenBucket:
    """Holds at most `limit`, and gets `limit` a minute."""

    __slots__ = ("_level", "_since", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._since = now

    def level(self, now: float) -> float:
        """What it holds; negative: it is in debt."""
        return min(self.limit, self._level + (now - self._since) * self.limit / _MINUTE)

    def add(self, amount: float, now: float) -> None:
        """Put `amount` in, or take it out if it is negative. What it cannot hold is lost."""
        self._level = min(self.limit, self.level(now) + amount)
        self._since = now

    def wait(self, needed: float, now: float) -> float:
        """In how many seconds it will hold `needed`, if nothing is taken out."""
        return max(0.0, (needed - self.level(now)) * _MINUTE / self.limit)


class Account:
    """What one client has used. `update` changes its rules; what was used stays used where a limit stays what it is."""

    __slots__ = ("_requests", "_tokens", "identity", "in_flight")

    def __init__(self, identity: Identity, now: float) -> None:
        self.identity = identity
        self.in_flight = 0
        self._requests = _bucket(None, identity.requests_per_minute, now)
        self._tokens = _bucket(None, identity.tokens_per_minute, now)

    def update(self, identity: Identity, now: float) -> None:
        """Go by the rules of `identity` from now on."""
        self.identity = identity
        self._requests = _bucket(self._requests, identity.requests_per_minute, now)
        self._tokens = _bucket(self._tokens, identity.tokens_per_minute, now)

    def admit(self, tokens: float, now: float) -> Charge:
        """Take one request, expected to need `tokens`, out of the limits. Raises `RateLimitError` and takes nothing."""
        identity = self.identity
        if identity.max_concurrent is not None and self.in_flight >= identity.max_concurrent:
            limit = f"{identity.max_concurrent} requests at once"
            raise RateLimitError(identity.name, limit, retry_after=_CONCURRENCY_PAUSE)
        if self._requests is not None and (wait := self._requests.wait(1.0, now)) > 0:
            raise RateLimitError(identity.name, f"{self._requests.limit} requests per minute", retry_after=wait)
        if self._tokens is not None and self._tokens.level(now) <= 0:
            wait = self._tokens.wait(1.0, now)
            raise RateLimitError(identity.name, f"{self._tokens.limit} tokens per minute", retry_after=wait)
        return Charge(self, self._requests, self._tokens, tokens, now)

    def headers(self, now: float) -> list[Header]:
        """What is left, in OpenAI's headers; of the limits that there are."""
        return [*_headers(b"requests", self._requests, now), *_headers(b"tokens", self._tokens, now)]

    def is_fresh(self, now: float) -> bool:
        """Whether nothing is lost if it is forgotten: no request runs, and all that was used has come back."""
        buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
        return self.in_flight == 0 and all(bucket.level(now) >= bucket.limit for bucket in buckets)


class Charge:
    """What one admitted request has taken. `settle` or `cancel` ends it; of several calls the first one counts."""

    __slots__ = ("_account", "_ended", "_requests", "_reserved", "_tokens")

    def __init__(
        self, account: Account, requests: TokenBucket | None, tokens: TokenBucket | None, reserved: float, now: float
    ) -> None:
        self._account = account
        self._requests = requests
        self._tokens = tokens
        self._ended = False
        self._reserved = reserved
        account.in_flight += 1
        if requests is not None:
            requests.add(-1, now)
        if tokens is not None:
            tokens.add(-reserved, now)

    def settle(self, tokens: float, now: float) -> None:
        """The request is over, and has taken `tokens`."""
        if self._end() and self._tokens is not None:
            self._tokens.add(self._reserved - tokens, now)

    def cancel(self, now: float) -> None:
        """The request is over, and no server has seen it: it has taken nothing."""
        if self._end():
            if self._requests is not None:
                self._requests.add(1, now)
            if self._tokens is not None:
                self._tokens.add(self._reserved, now)

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        self._account.in_flight -= 1
        return True


def reset_text(seconds: float) -> str:
    """Write a duration as OpenAI's reset headers do: `0s`, `120ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = max(0, round(seconds * 1000))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _bucket(old: TokenBucket | None, limit: int | None, now: float) -> TokenBucket | None:
    if limit is None:
        return None
    return old if old is not None and old.limit == limit else TokenBucket(limit, now)


def _headers(kind: bytes, bucket: TokenBucket | None, now: float) -> list[Header]:
    if bucket is None:
        return []
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % bucket.limit),
        (b"x-ratelimit-remaining-" + kind, b"%d" % max(0, int(bucket.level(now)))),
        (b"x-ratelimit-reset-" + kind, reset_text(bucket.wait(bucket.limit, now)).encode("ascii")),
    ]
