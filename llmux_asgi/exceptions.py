"""Everything that llmux_asgi raises on purpose.

    LLMuxError
    ├── ConfigError                 the configuration is wrong: says where and why
    ├── PolicyError                 a switch policy broke its contract
    ├── InvalidRequestError         the request names no model, or is not JSON
    │   ├── BodyTimeoutError        the request's body did not arrive in time
    │   ├── BodyTooLargeError       the request's body exceeds the limit
    │   ├── EncodedBodyError        the request's body is compressed
    │   └── HeadersTooLargeError    the request's headers exceed the limit
    ├── BuffersFullError            the bodies of all requests together exceed the limit
    ├── AuthenticationError         no valid credential came with the request
    ├── PermissionDeniedError       the client's key does not allow what it asks for
    ├── RateLimitError              the client's key has used up what it may
    ├── UnknownRouteError           the gateway has no such path
    ├── MethodNotAllowedError       the path has no such method
    ├── UnknownModelError           no model of that name or alias is configured
    ├── UnservedRouteError          the model does not do what the path asks for
    ├── UnknownResponseError        no model is known to have made the response that is asked for
    ├── QueueFullError              too many requests wait already
    ├── QueueTimeoutError           the model did not become active within `request_timeout`
    ├── SwitchError                 the switch that the request waited for failed, or is backing off
    ├── DrainingError               new requests are refused, because an operator drains the gateway
    ├── OperationError              what an operator asks for is not possible as things stand
    ├── InterruptedRequestError     a switch aborted the request while it ran
    ├── BackendError                an inference server's control API failed
    │   ├── BackendUnreachableError nothing listens at the server's address
    │   ├── BackendTimeoutError     the server did not answer within the step's time limit
    │   ├── BackendDeadError        the server's engine has died; its process is about to end
    │   ├── BackendStartError       the server's process ended, or was not ready in time
    │   └── BackendUnsupportedError the server cannot sleep safely (version, dev mode, sleep mode)
    └── UpstreamError               relaying one request to an awake server failed

Which HTTP status each becomes is decided in one table, `llmux_asgi._errors.describe`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

__all__ = [
    "AuthenticationError",
    "BackendDeadError",
    "BackendError",
    "BackendStartError",
    "BackendTimeoutError",
    "BackendUnreachableError",
    "BackendUnsupportedError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "BuffersFullError",
    "ConfigError",
    "DrainingError",
    "EncodedBodyError",
    "HeadersTooLargeError",
    "InterruptedRequestError",
    "InvalidRequestError",
    "LLMuxError",
    "MethodNotAllowedError",
    "OperationError",
    "PermissionDeniedError",
    "PolicyError",
    "QueueFullError",
    "QueueTimeoutError",
    "RateLimitError",
    "SwitchError",
    "UnknownModelError",
    "UnknownResponseError",
    "UnknownRouteError",
    "UnservedRouteError",
    "UpstreamError",
]


_LONGEST_QUOTE = 200


def quoted(text: str) -> str:
    """Return what a client has sent as it may stand in a message: cut short, control characters and quotes escaped."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…")


class LLMuxError(Exception):
    """Base class of all errors of this library."""

    headers: Sequence[tuple[bytes, bytes]] = ()
    """Further headers of the answer that tells a client of it."""


class ConfigError(LLMuxError):
    """The configuration cannot be used. The message starts with the path of the faulty value, `$.models.qwen.url: …`."""


class PolicyError(LLMuxError):
    """A switch policy raised, or answered something that is not a `PolicyDecision`."""


class InvalidRequestError(LLMuxError):
    """The request cannot be understood. `param` is the offending field or parameter, `None` for the body itself."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLargeError(InvalidRequestError):
    """The request's body is larger than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit} bytes.")
        self.limit = limit


class AuthenticationError(LLMuxError):
    """The request brought no valid credential. The message never holds what it brought."""

    headers = ((b"www-authenticate", b"Bearer"),)


class PermissionDeniedError(LLMuxError):
    """The client's key does not allow what the request asks for. `param` is the field or header that asks for it."""

    def __init__(self, message: str, *, code: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class RateLimitError(LLMuxError):
    """The client's key has used up a limit. `retry_after`: in how many seconds it has something again."""

    def __init__(self, key: str, limit: str, *, retry_after: float) -> None:
        super().__init__(f"The key {key!r} has reached its limit of {limit}. Send the request again later.")
        self.key = key
        self.retry_after = retry_after


class UnknownRouteError(LLMuxError):
    """Nothing is served under this path."""

    def __init__(self, method: str, path: str, served: str = "the inference routes of its API only") -> None:
        super().__init__(f"Unknown request URL: {method[:20]} {quoted(path)}. The gateway serves {served}.")


class MethodNotAllowedError(LLMuxError):
    """The path is served, and has other methods; they are in the header `Allow`."""

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        super().__init__(f"Method {method[:20]} is not allowed for {quoted(path)}.")
        self.headers = ((b"allow", ", ".join(allowed).encode("ascii")),)


class UnservedRouteError(LLMuxError):
    """The model is configured with other tasks than the one that the path asks for."""

    def __init__(self, model: str, path: str, tasks: Collection[str]) -> None:
        super().__init__(f"The model {model!r} does not serve {quoted(path)}. Its tasks are: {', '.join(tasks)}.")
        self.model = model


class UnknownResponseError(LLMuxError):
    """The gateway does not know which model made a response: it is too long ago, or was another gateway."""

    def __init__(self, response: str) -> None:
        super().__init__(
            f"The response {quoted(response)} is not known here. If it should be, name its model: ?model=NAME or x-llmux-model."
        )


class BodyTimeoutError(InvalidRequestError):
    """The request's body has not arrived whole within `limit` seconds."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"The request body did not arrive within the limit of {limit:.3g} s.")
        self.limit = limit


class EncodedBodyError(InvalidRequestError):
    """The request's body is compressed. It would have to be inflated to find the model's name."""

    def __init__(self) -> None:
        super().__init__("The request body must not be compressed: leave out Content-Encoding.")


class HeadersTooLargeError(InvalidRequestError):
    """The request's headers and query are larger than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request's headers and query are larger than the limit of {limit} bytes.")
        self.limit = limit


class BuffersFullError(LLMuxError):
    """The bodies of all requests together are larger than `limit` bytes. `retry_after` is in seconds."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The gateway holds {limit} bytes of request bodies and takes no more. Send the request again later.")
        self.limit = limit
        self.retry_after = 1.0


class UnknownModelError(LLMuxError):
    """No model is configured under this name or alias."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {quoted(model)} does not exist. GET /v1/models lists the models served here.")
        self.model = model


class QueueFullError(LLMuxError):
    """As many requests wait as may. `retry_after`: in how many seconds the model is expected to be active."""

    def __init__(self, model: str, reason: str, *, retry_after: float = 1.0) -> None:
        super().__init__(f"The queue for the model {model!r} is full: {reason}. Send the request again later.")
        self.model = model
        self.retry_after = retry_after


class QueueTimeoutError(LLMuxError):
    """The model did not become active in time. `waited` and `retry_after` are in seconds."""

    def __init__(self, model: str, waited: float, reason: str, *, retry_after: float = 1.0) -> None:
        super().__init__(f"The model {model!r} did not become active within {waited:.3g} s: {reason}.")
        self.model = model
        self.waited = waited
        self.retry_after = retry_after


class SwitchError(LLMuxError):
    """The switch to `model` failed.

    `retry_after` (seconds) is when the next attempt is allowed, `switch` the span of the one that failed, if there was one.
    """

    def __init__(self, model: str, reason: str, *, retry_after: float = 1.0, switch: SpanContext | None = None) -> None:
        super().__init__(f"Switching to the model {model!r} failed: {reason}")
        self.model = model
        self.reason = reason
        self.retry_after = retry_after
        self.switch = switch


class DrainingError(LLMuxError):
    """The gateway lets what is under way finish and takes nothing new. `retry_after` is in seconds."""

    def __init__(self) -> None:
        super().__init__(
            "The gateway is being drained by its operator: requests that are under way finish, new ones are refused. "
            "Send the request again later."
        )
        self.retry_after = 10.0


class OperationError(LLMuxError):
    """What an operator asks for is not possible as things stand. The message says why, and what to do."""


class InterruptedRequestError(LLMuxError):
    """The running request was aborted: its model was put to sleep (drain off, deadline passed) or its server ended.

    `may_retry`: nothing of the answer has been passed on, and to send the request again does no harm.
    """

    def __init__(self, model: str, *, may_retry: bool = False) -> None:
        super().__init__(
            f"The request was aborted because the model {model!r} was put to sleep, or ended, before the answer was complete. "
            "Send the request again."
        )
        self.model = model
        self.retry_after = 1.0
        self.may_retry = may_retry


class BackendError(LLMuxError):
    """A control call (sleep, wake, state) failed; the message names the server, the call and what to do."""


class BackendUnreachableError(BackendError):
    """Nothing accepts connections at the server's address: its process is gone, or the address is wrong."""


class BackendTimeoutError(BackendError):
    """The server accepted the call and did not answer within the step's time limit."""


class BackendDeadError(BackendError):
    """The server's engine has died. The process that listens says so until it ends, in a moment."""


class BackendStartError(BackendError):
    """The process of a model did not come up: it ended, or was not ready in time. Ends with the last lines it wrote."""


class BackendUnsupportedError(BackendError):
    """The server must not be used for switching as it is: version, dev mode or sleep mode. Says how to mend it."""


class UpstreamError(LLMuxError):
    """An awake server refused, broke off or timed out while a request was relayed to it.

    `may_retry`: nothing of the answer has been passed on, and to send the request again does no harm.
    """

    def __init__(self, model: str, reason: str, *, may_retry: bool = False) -> None:
        super().__init__(f"The server of the model {model!r} {reason}")
        self.model = model
        self.reason = reason
        self.may_retry = may_retry
