"""Small configurations of our own that use every documented field of llmux and llama-swap."""

from __future__ import annotations

from typing import Any

__all__ = ["LLAMA_SWAP", "LLAMA_SWAP_GROUPS", "LLAMA_SWAP_MATRIX", "LLMUX_0", "LLMUX_1", "LLMUX_2", "SAMPLES"]

LLMUX_0: dict[str, Any] = {
    "models": {
        "small": {
            "model_path": "org/small-1b",
            "port": 9101,
            "sleep_level": 2,
            "gpu_memory_utilization": 0.8,
            "tensor_parallel_size": 2,
            "dtype": "bfloat16",
            "extra_args": ["--max-model-len", "2048"],
        },
        "org/large-9b": {"model_path": "org/large-9b", "port": 9102},
    },
    "policy": {
        "policy_type": "fifo",
        "request_timeout_secs": 90,
        "drain_before_switch": False,
        "sleep_level": 1,
        "min_active_secs": 3,
    },
    "port": 3000,
    "metrics_port": 0,
    "vllm_command": "/opt/vllm/bin/vllm",
    "vllm_logging": True,
}
"""llmux 0.3."""

LLMUX_1: dict[str, Any] = {
    "models": {
        "a": {"model_path": "org/a", "port": 1, "eviction": {"weights": "offload", "process": "keep_running"}},
        "b": {"model_path": "org/b", "port": 2, "eviction": {"weights": "discard", "process": "keep_running"}},
        "c": {"model_path": "org/c", "port": 3, "eviction": {"weights": "retain", "process": "cuda_suspend"}},
        "d": {"model_path": "org/d", "port": 4, "sleep_level": 4, "checkpoint_path": "/images/d"},
        "e": {"model_path": "org/e", "port": 5},
    },
    "policy": {
        "policy_type": "cost_aware",
        "eviction": {"weights": "discard", "process": "keep_running"},
        "coalesce_window_ms": 1000,
        "amortization_factor": 0.5,
        "max_wait_secs": 20,
        "tick_interval_ms": 100,
        "min_quantum_ms": 8000,
    },
    "checkpoint": {"criu_path": "criu", "object_store": {"endpoint": "http://s3", "secret_key": "hush"}},
    "admin_port": 3001,
    "vllm_command": "my-vllm",
}
"""llmux between 0.3 and 2.0."""

LLMUX_2: dict[str, Any] = {
    "models": {
        "small": {
            "port": 9101,
            "wake": "./wake.sh\n# started\n",
            "sleep": "./sleep.sh",
            "alive": "curl -sf http://localhost:9101/health",
        },
    },
    "policy": {"request_timeout_secs": 120, "drain_before_switch": True, "min_active_secs": 0},
    "port": 3000,
}
"""llmux 2.x."""

LLAMA_SWAP = r"""
healthCheckTimeout: 400
logLevel: warn
logTimeFormat: rfc3339
logToStdout: both
metricsMaxInMemory: 10
captureBuffer: 1
ui: {activity: {session_id: [X-Session]}}
store: {path: /var/lib/activity.db}
performance: {disabled: true, every: 20s}
startPort: 9200
sendLoadingState: true
includeAliasesInList: true
globalTTL: 600
unloadTimeout: 20
macros:
  ctx: 2048
  server: >
    /opt/llama/llama-server-b9000 --port ${PORT}
  sized: "${server} --ctx-size ${ctx}"
  home: ${env.MODELS}
apiKeys: [sk-never-copied, "${env.SWAP_KEY}", "${home}-key"]
upstream: {ignorePaths: ["[.]css$"]}
profiles: {work: {description: For work, pins: {code: tuned}}}
selectors: {best: {strategy: warm, targets: [tuned, plain]}}

models:
  tuned:
    macros: {ctx: 8192, heat: 0.5}
    cmd: |
      # the large window: ${server} and --ctx-size
      ${sized} \
        -m ${home}/tuned-7b.gguf
      --alias old-name
    name: Tuned
    description: A tuned model
    env: ["CUDA_VISIBLE_DEVICES=0", "NOTE=a=b"]
    proxy: http://127.0.0.1:9300/v1
    checkEndpoint: /ready
    ttl: 60
    unloadTimeout: 5
    compat: {ignoreWebsockets: true}
    useModelName: org/tuned
    filters:
      stripParams: temperature, top_p, top_k, model
      setParams: {top_k: 4, heat: "${heat}", stop: ["<${ctx}>", 1, {a: null}], stream: true}
      setParamsByID:
        "${MODEL_ID}": {think: medium}
        "${MODEL_ID}:high": {think: high}
    aliases: [gpt-small, {id: gpt-mini, name: Mini, unlisted: false}]
    metadata: {port: "${PORT}", heat: "${heat}"}
    concurrencyLimit: 4
    sendLoadingState: false
    timeouts: {connect: 7, keepalive: 0, responseHeader: 45, tlsHandshake: 10, expectContinue: 1, idleConn: 90}
    capabilities: {in: [text], out: [text], tools: true, reranker: false, context: 8192}
  plain:
    cmd: vllm serve org/plain-3b --port ${PORT} --max-model-len 4096
    unlisted: true
  boxed:
    proxy: http://127.0.0.1:${PORT}
    cmd: |
      docker run --rm --init --name ${MODEL_ID} -v /srv/vllm-cache:/root/.cache --gpus '"device=0,1"'
      -p ${PORT}:8000 vllm/vllm-openai:v0.12.0
      --model "/models/boxed" --served-model-name boxed other
    cmdStop: docker stop ${MODEL_ID}

hooks: {on_startup: {profile: work, preload: [plain]}}
routing:
  scheduler: {use: fifo, settings: {fifo: {priority: {plain: 10, boxed: -1}}}}
  router:
    use: group
    settings:
      groups: {all: {swap: true, exclusive: true, members: [tuned, plain]}}
      matrix: {vars: {t: tuned}, evict_costs: {t: 3}, sets: {one: t}}
peers:
  other: {proxy: http://192.0.2.1, apiKey: secret, models: [far], filters: {stripParams: n}, timeouts: {connect: 3}}
"""

LLAMA_SWAP_GROUPS = """
models:
  one: {cmd: "llama-server --port ${PORT} -m /m/one.gguf"}
  two: {cmd: "llama-server --port ${PORT} --model=/m/two.gguf"}
groups:
  kept: {persistent: true, swap: false, exclusive: false, members: [one]}
"""

LLAMA_SWAP_MATRIX = """
models:
  one: {cmd: "some-server"}
matrix: {vars: {o: one}, sets: {all: o}}
"""

SAMPLES: dict[str, Any] = {
    "llmux 0.3": [LLMUX_0, LLMUX_1],
    "llmux 2": [LLMUX_2],
    "llama-swap": [LLAMA_SWAP, LLAMA_SWAP_GROUPS, LLAMA_SWAP_MATRIX],
}
