"""The configuration: models, policy, limits. By object, dict or file (YAML, TOML, JSON), validated once.

    models:
      qwen:
        url: http://127.0.0.1:8001
        served_name: Qwen/Qwen3-14B     # default: the model's own name
        aliases: [gpt-4o]
        sleep_level: 1                  # default: the policy's
        timeouts: {sleep: 120, wake: 300}
      llama:
        command: [vllm, serve, llama-3, --port, "{port}"]   # started, stopped and restarted by the gateway
        env: {CUDA_VISIBLE_DEVICES: "0"}
    policy: {name: gated_quantum, request_timeout: 120}
    limits: {max_body: 33554432}

All durations are in seconds, all sizes in bytes. Unknown keys are errors.
"""

from __future__ import annotations

from ._access import (
    AccessConfig,
    AdminConfig,
    AdminKeyConfig,
    KeyConfig,
    KeySource,
    SecretConfig,
    is_hash,
    is_token,
    read_secret,
)
from ._changes import SERVER_KEYS, ReloadReport, changes, server_part, server_place
from ._load import ConfigSource, json_schema, load_config, load_keys
from ._metrics import MetricsConfig, MetricsKeyConfig
from ._models import (
    POLICY_PARAMETERS,
    Config,
    CostsConfig,
    DrainMode,
    HooksConfig,
    LimitsConfig,
    LoadingNotice,
    MemoryConfig,
    ModelConfig,
    PolicyConfig,
    PolicyName,
    Task,
    TimeoutsConfig,
)
from ._parameters import ModelParametersConfig, ParametersConfig
from ._warm_up import WarmUpConfig

__all__ = [
    "POLICY_PARAMETERS",
    "SERVER_KEYS",
    "AccessConfig",
    "AdminConfig",
    "AdminKeyConfig",
    "Config",
    "ConfigSource",
    "CostsConfig",
    "DrainMode",
    "HooksConfig",
    "KeyConfig",
    "KeySource",
    "LimitsConfig",
    "LoadingNotice",
    "MemoryConfig",
    "MetricsConfig",
    "MetricsKeyConfig",
    "ModelConfig",
    "ModelParametersConfig",
    "ParametersConfig",
    "PolicyConfig",
    "PolicyName",
    "ReloadReport",
    "SecretConfig",
    "Task",
    "TimeoutsConfig",
    "WarmUpConfig",
    "changes",
    "is_hash",
    "is_token",
    "json_schema",
    "load_config",
    "load_keys",
    "read_secret",
    "server_part",
    "server_place",
]
