"""Names of spans, metrics and attributes.

    llmux.request                 one relayed request, from its arrival to the last byte of its answer
    llmux.switch                  one switch, a child of the request that it was begun for, linked to all that waited for it
    ├── cooldown                  the outgoing model has not been active for `min_active_duration` yet
    ├── drain                     its running requests finish
    ├── sleep                     it is put to sleep, confirmation included
    ├── wake                      the target is woken
    └── ready                     until the target takes requests

Attributes follow the GenAI and HTTP semantic conventions where those have a name; the rest starts with `llmux.`. Why no metric
of those conventions is among the metrics is told in docs/metrics.md.
Durations are in seconds. Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

SCOPE = "llmux_asgi"
"""The instrumentation scope."""

SPAN_REQUEST = "llmux.request"
SPAN_SWITCH = "llmux.switch"

GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
HTTP_REQUEST_METHOD = "http.request.method"
HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
HTTP_ROUTE = "http.route"
ERROR_TYPE = "error.type"
ENDUSER_ID = "enduser.id"
MODEL = "llmux.model"
PRIORITY = "llmux.priority"
QUEUE_TIME = "llmux.queue_time"
FREEZES = "llmux.freezes"
FROZEN_TIME = "llmux.frozen_time"
CLIENT_DISCONNECTED = "llmux.client_disconnected"
SWITCH_FROM = "llmux.switch.from"
SWITCH_TO = "llmux.switch.to"
SWITCH_SLEEP_LEVEL = "llmux.switch.sleep_level"
SWITCH_POLICY = "llmux.switch.policy"
SWITCH_WAITING = "llmux.switch.waiting"
SWITCH_IN_FLIGHT = "llmux.switch.in_flight"
SWITCH_FROZEN = "llmux.switch.frozen"
SWITCH_OUTCOME = "llmux.switch.outcome"
SWITCH_PHASE = "llmux.switch.phase"
SERVER_STATE = "llmux.server.state"
SHARE = "llmux.pool.share"
STREAMED = "llmux.streamed"

METRIC_SWITCH_DURATION = "llmux.switch.duration"
METRIC_PHASE_DURATION = "llmux.switch.phase.duration"
METRIC_SWITCH_FAILURES = "llmux.switch.failures"
METRIC_ESTIMATE = "llmux.switch.estimate"
METRIC_QUEUE_TIME = "llmux.queue.time"
METRIC_QUEUE_OLDEST = "llmux.queue.oldest"
METRIC_REQUESTS = "llmux.requests"
METRIC_REQUEST_FAILURES = "llmux.request.failures"
METRIC_FIRST_BYTE = "llmux.request.time_to_first_byte"
METRIC_IN_FLIGHT = "llmux.request.in_flight"
METRIC_WAITING = "llmux.request.waiting"
METRIC_FROZEN = "llmux.request.frozen"
METRIC_SERVER_STATE = "llmux.server.state"
METRIC_POOL_TIME = "llmux.pool.time"

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by route, for the routes that the conventions have a name for."""
