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
    ├── UnknownModelError           no model of that name or alias is configured
    ├── QueueFullError              too many requests wait already
    ├── QueueTimeoutError           the model did not become active within `request_timeout`
    ├── SwitchError                 the switch that the request waited for failed, or is backing off
    ├── InterruptedRequestError     a switch aborted the request while it ran
    ├── BackendError                an inference server's control API failed
    │   ├── BackendUnreachableError nothing listens at the server's address
    │   ├── BackendTimeoutError     the server did not answer within the step's time limit
    │   ├── BackendDeadError        the server's engine has died; its process is about to end
    │   ├── BackendStartError       the server's process ended, or was not ready in time
    │   └── BackendUnsupportedError the server cannot sleep safely (version, dev mode, sleep mode)
    └── UpstreamError               relaying one request to an awake server failed

Which HTTP status each becomes is decided in one table, `llmux_asgi._openai.describe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

__all__ = [
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
    "EncodedBodyError",
    "HeadersTooLargeError",
    "InterruptedRequestError",
    "InvalidRequestError",
    "LLMuxError",
    "PolicyError",
    "QueueFullError",
    "QueueTimeoutError",
    "SwitchError",
    "UnknownModelError",
    "UpstreamError",
]


_LONGEST_QUOTE = 200


def quoted(text: str) -> str:
    """Return what a client has sent as it may stand in a message: cut short, control characters and quotes escaped."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…")


class LLMuxError(Exception):
    """Base class of all errors of this library."""


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
