"""A simulated vLLM server: a real HTTP process with vLLM's sleep API, its traps included, and no GPU.

    with start_sim("qwen", tokens_per_second=50) as sim:
        httpx.post(f"{sim.url}/sleep?level=1")

By hand: `llmux-asgi sim-vllm --name qwen --port 8001`, or `python -m llmux_asgi.sim '{"name": "qwen"}'`. The server itself
(`llmux_asgi.sim.vllm`) needs uvicorn and is not imported here.
"""

from .faults import Fault
from .gpu import GpuEvent, GpuLedger, GpuOutOfMemoryError
from .options import SimOptions, SimState
from .process import SimError, SimProcess, start_sim, start_sims

__all__ = [
    "Fault",
    "GpuEvent",
    "GpuLedger",
    "GpuOutOfMemoryError",
    "SimError",
    "SimOptions",
    "SimProcess",
    "SimState",
    "start_sim",
    "start_sims",
]
