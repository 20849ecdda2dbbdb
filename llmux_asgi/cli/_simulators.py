"""`llmux-asgi sim-vllm` and `llmux-asgi simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..exceptions import LLMuxError
from ..sim import GpuOutOfMemoryError, SimOptions
from ..sim.vllm import serve
from ..simulate import TraceOptions
from ..simulate.command import run as run_simulation
from ._app import FAILED, TRY, UNUSABLE, app, fail

__all__ = ["sim_vllm", "simulate"]


@app.command("sim-vllm", rich_help_panel=TRY)
def sim_vllm(
    name: Annotated[str, typer.Option(help="Served model's name.")],
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    version: Annotated[str, typer.Option(help="vLLM version to behave like.")] = "0.32.0",
    dev_mode: Annotated[bool, typer.Option(help="VLLM_SERVER_DEV_MODE: offer the sleep routes.")] = True,
    sleep_mode: Annotated[bool, typer.Option(help="--enable-sleep-mode: sleeping frees memory.")] = True,
    dummy_weights: Annotated[bool, typer.Option("--dummy-weights", help="reload_weights fails.")] = False,
    tokens_per_second: Annotated[float, typer.Option(help="Rate of each request; 0: no limit.")] = 1000.0,
    prefill: Annotated[float, typer.Option(help="Seconds before the first token.")] = 0.0,
    start_seconds: Annotated[float, typer.Option(help="Seconds until it listens.")] = 0.02,
    sleep_seconds: Annotated[float, typer.Option(help="Seconds to sleep at level 1.")] = 0.02,
    sleep_l2_seconds: Annotated[float, typer.Option(help="Seconds to sleep at level 2.")] = 0.02,
    wake_seconds: Annotated[float, typer.Option(help="Seconds to wake from level 1.")] = 0.02,
    wake_l2_seconds: Annotated[float, typer.Option(help="Seconds that reload_weights takes.")] = 0.02,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 1024,
    max_model_len: Annotated[int, typer.Option(help="Told by /v1/models.")] = 32768,
    gpu: Annotated[str | None, typer.Option(help="File of the GPU that several servers share.")] = None,
    gpu_memory: Annotated[int, typer.Option(help="The GPU's memory, MiB.")] = 24576,
    model_memory: Annotated[int, typer.Option(help="Weights, MiB.")] = 12288,
    kv_memory: Annotated[int, typer.Option(help="KV cache, MiB.")] = 8192,
    context_memory: Annotated[int, typer.Option(help="Held while asleep too, MiB.")] = 0,
    start_asleep: Annotated[int, typer.Option(help="Sleep level at start; 0: awake.")] = 0,
    crash_seconds: Annotated[float, typer.Option(help="From the engine's death to the process's.")] = 0.5,
    fault: Annotated[list[str] | None, typer.Option(help="WHAT:NTH:ACTION, e.g. sleep:2:fail.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Say in a line of JSON where it listens: name, url.")] = False,
) -> None:
    """Run a simulated vLLM server: vLLM's API and sleep mode without a GPU. Says in one line where it listens.

    Exit status: 0 ended by SIGINT; 1 the port is taken, or the simulated GPU is full; 2 an option is wrong.
    """
    options = {
        "name": name,
        "host": host,
        "port": port,
        "version": version,
        "dev_mode": dev_mode,
        "sleep_mode": sleep_mode,
        "dummy_weights": dummy_weights,
        "tokens_per_second": tokens_per_second,
        "prefill_seconds": prefill,
        "start_seconds": start_seconds,
        "sleep_seconds": sleep_seconds,
        "sleep_l2_seconds": sleep_l2_seconds,
        "wake_seconds": wake_seconds,
        "wake_l2_seconds": wake_l2_seconds,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "gpu": gpu,
        "gpu_memory_mib": gpu_memory,
        "model_memory_mib": model_memory,
        "kv_memory_mib": kv_memory,
        "context_memory_mib": context_memory,
        "start_asleep": start_asleep,
        "crash_seconds": crash_seconds,
        "faults": fault or [],
    }
    try:
        serve(msgspec.convert(options, SimOptions), as_json=json)
    except msgspec.ValidationError as error:
        fail(f"sim-vllm: {error}", UNUSABLE)
    except (OSError, OverflowError, GpuOutOfMemoryError) as error:
        fail(f"sim-vllm {name}: {error}", FAILED)


@app.command(rich_help_panel=TRY)
def simulate(
    trace: Annotated[
        Path,
        typer.Argument(
            help="The load, by its ending: .csv (TIMESTAMP, ContextTokens, GeneratedTokens, and model if there is one), "
            ".jsonl (the gateway's request log), .json (a workload, closed loops too); .gz after it if compressed."
        ),
    ],
    config: Annotated[Path, typer.Option(help="The gateway's configuration: models, costs, policy.")],
    active: Annotated[str | None, typer.Option(help="Model that is awake at the start; default: none.")] = None,
    sleep_seconds: Annotated[
        float | None, typer.Option(min=0, help="What a sleep takes, of models without costs in the configuration.")
    ] = None,
    wake_seconds: Annotated[float | None, typer.Option(min=0, help="What a wake takes, of models without costs.")] = None,
    recompute: Annotated[
        float, typer.Option(min=0, help="Preemption: seconds that a frozen request is held up when it goes on.")
    ] = 0.0,
    prefill: Annotated[float, typer.Option(min=0, help="CSV: seconds before the first token.")] = 0.2,
    tokens_per_second: Annotated[float, typer.Option(min=0.001, help="CSV: tokens that a request gets a second.")] = 40.0,
    speed: Annotated[float, typer.Option(min=0.000001, help="Factor for the rate of arrivals.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many requests.")] = None,
    seed: Annotated[int, typer.Option(help="CSV without models: for the draw, weight 1/k for the k-th model.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write an HTML page: who was active when, and the waits.")] = None,
) -> None:
    """Play a load against every switch policy, in virtual time, and compare their waits with what is possible at best.

    Exit status: 0 done; 2 the load or the configuration cannot be used.
    """
    try:
        run_simulation(
            trace,
            config,
            TraceOptions(prefill, tokens_per_second, speed, limit, seed),
            active=active,
            sleep_seconds=sleep_seconds,
            wake_seconds=wake_seconds,
            recompute=recompute,
            as_json=json,
            plot=plot,
        )
    except LLMuxError as error:
        fail(f"simulate: {error}", UNUSABLE)
