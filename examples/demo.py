"""The gateway at work, in a minute's reading: `make demo`.

Two simulated vLLM servers share one simulated GPU that has room for one model. A Starlette app with the gateway mounted at
/llm serves both; six clients talk to it through OpenAI's own client, every other request streaming. Afterwards the spans
that the gateway has recorded are shown: what it switched and when, and for how long each request waited.

Every answer is compared with the one that its server gave when it was asked directly. The exit status is 1 if an answer
was lost or wrong, or if the GPU's ledger says that two models were ever awake at once.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from openai import AsyncOpenAI, OpenAIError
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess, start_sims

MODELS = ("qwen", "llama")
CLIENTS = 3  # for each model
ROUNDS = 4  # requests of each client, one after the other
TOKENS = 24
LEAST_SWITCHES = 6
WIDTH = 100
COLORS = {"qwen": "cyan", "llama": "magenta"}
PHASES = ("cooldown", "drain", "sleep", "wake", "ready")


@dataclass
class Outcome:
    """One request as its client saw it."""

    number: int
    model: str
    prompt: str
    stream: bool
    sent: float = 0.0
    first: float = 0.0
    done: float = 0.0
    text: str = ""
    finish_reason: str | None = None
    error: str = ""

    @property
    def trace_id(self) -> int:
        """The trace that the client names in its `traceparent` header, so that the gateway's spans can be found again."""
        return self.number


async def chat(client: AsyncOpenAI, outcome: Outcome) -> None:
    outcome.sent = time.time()
    headers = {"traceparent": f"00-{outcome.trace_id:032x}-{outcome.number:016x}-01"}
    try:
        if outcome.stream:
            stream = await client.chat.completions.create(
                model=outcome.model,
                messages=[{"role": "user", "content": outcome.prompt}],
                max_tokens=TOKENS,
                stream=True,
                extra_headers=headers,
            )
            async with stream:
                async for chunk in stream:
                    outcome.first = outcome.first or time.time()
                    for choice in chunk.choices:
                        outcome.text += choice.delta.content or ""
                        outcome.finish_reason = choice.finish_reason or outcome.finish_reason
        else:
            answer = await client.chat.completions.create(
                model=outcome.model,
                messages=[{"role": "user", "content": outcome.prompt}],
                max_tokens=TOKENS,
                extra_headers=headers,
            )
            outcome.text = answer.choices[0].message.content or ""
            outcome.finish_reason = answer.choices[0].finish_reason
    except (OpenAIError, httpx.HTTPError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"
    outcome.done = time.time()


def plan() -> list[list[Outcome]]:
    """What each client will send."""
    sequences: list[list[Outcome]] = []
    number = 0
    for index in range(CLIENTS):
        for model in MODELS:
            sequence: list[Outcome] = []
            for turn in range(ROUNDS):
                number += 1
                sequence.append(Outcome(number, model, f"Client {index}, question {turn}?", stream=number % 2 == 1))
            sequences.append(sequence)
    return sequences


async def run_clients(url: str, sequences: list[list[Outcome]]) -> None:
    async def run(client: AsyncOpenAI, sequence: list[Outcome]) -> None:
        for outcome in sequence:
            await chat(client, outcome)

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        await asyncio.gather(*(run(client, sequence) for sequence in sequences))


def ask_directly(sims: Sequence[SimProcess], prompts: Iterable[str]) -> dict[tuple[str, str], str]:
    """The right answers: each server is woken by hand, asked everything, and put to sleep."""

    def ask(prompt: str) -> str:
        body = {"model": sim.name, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}
        answer = server.post("/v1/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    prompts = sorted(set(prompts))
    answers: dict[tuple[str, str], str] = {}
    for sim in sims:
        with httpx.Client(base_url=sim.url, trust_env=False, timeout=30) as server, ThreadPoolExecutor() as threads:
            server.post("/wake_up").raise_for_status()
            answers |= {(sim.name, prompt): answer for prompt, answer in zip(prompts, threads.map(ask, prompts), strict=True)}
            server.post("/sleep", params={"level": 1}).raise_for_status()
    return answers


@contextmanager
def host(app: Starlette) -> Iterator[str]:
    """Serve `app` in a thread of its own."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    started = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(uvicorn.Config(app, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        started.wait(10)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


# What the spans tell


def seconds(span: ReadableSpan) -> float:
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e9


def attribute(span: ReadableSpan, name: str) -> str:
    return str((span.attributes or {}).get(name, ""))


def named(spans: Iterable[ReadableSpan], name: str) -> list[ReadableSpan]:
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_time or 0)


def children(spans: Iterable[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    found = (span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id)
    return sorted(found, key=lambda span: span.start_time or 0)


def problems(outcomes: Sequence[Outcome], right: dict[tuple[str, str], str], switches: int, ledger: GpuLedger) -> list[str]:
    """All that must not be."""
    found = [f"request {outcome.number} was lost: {outcome.error}" for outcome in outcomes if outcome.error]
    found += [
        f"request {outcome.number} got a wrong answer ({outcome.finish_reason}): {outcome.text!r}"
        for outcome in outcomes
        if not outcome.error and (outcome.text, outcome.finish_reason) != (right[outcome.model, outcome.prompt], "length")
    ]
    if switches < LEAST_SWITCHES:
        found.append(f"only {switches} switches, {LEAST_SWITCHES} were expected")
    if (most := ledger.max_awake()) > 1:
        found.append(f"{most} models were awake at once")
    asleep = [event.model for event in ledger.events() if event.event == "request_while_asleep"]
    if asleep:
        found.append(f"{len(asleep)} requests reached a sleeping server: {sorted(set(asleep))}")
    return found


def untraced(outcomes: Sequence[Outcome], spans: Sequence[ReadableSpan]) -> list[str]:
    """Requests that left no span, or one that does not say for how long they waited."""
    traced = {span.context.trace_id for span in named(spans, "llmux.request") if attribute(span, "llmux.queue_time")}
    return [f"request {outcome.number} has no span with its wait" for outcome in outcomes if outcome.trace_id not in traced]


# What is printed


def milliseconds(value: float) -> str:
    return f"{value * 1000:,.0f}"


def model_text(name: str) -> Text:
    return Text(name or "(none)", style=COLORS.get(name, "dim"))


def switch_table(spans: Sequence[ReadableSpan], start: float) -> Table:
    table = Table(title="Switches, times in ms", caption="at: since the first request; n: requests that waited for it")
    table.add_column("#", justify="right", style="dim")
    table.add_column("at", justify="right")
    table.add_column("from")
    table.add_column("to")
    table.add_column("n", justify="right")
    for phase in (*PHASES, "in all"):
        table.add_column(phase, justify="right")
    table.add_column("outcome")
    for index, switch in enumerate(named(spans, "llmux.switch"), start=1):
        took = dict.fromkeys(PHASES, "")
        for child in children(spans, switch):
            took[child.name] = milliseconds(seconds(child))
        table.add_row(
            str(index),
            milliseconds((switch.start_time or 0) / 1e9 - start),
            model_text(attribute(switch, "llmux.switch.from")),
            model_text(attribute(switch, "llmux.switch.to")),
            attribute(switch, "llmux.switch.waiting"),
            *took.values(),
            Text(milliseconds(seconds(switch)), style="bold"),
            attribute(switch, "llmux.switch.outcome"),
        )
    return table


def gpu_timeline(ledger: GpuLedger, start: float, end: float) -> Table:
    """A line for each model: when its memory was on the GPU, as the ledger has it."""
    columns = WIDTH - 16
    table = Table(
        title="The GPU", caption="━ awake   ╌ going to sleep or waking   · asleep", show_header=False, box=None, padding=(0, 1)
    )
    for model in MODELS:
        line = ["·"] * columns
        symbol, since = "·", start
        ends = [(event.wall, event.event) for event in ledger.events() if event.model == model]
        for at, event in [*ends, (end, "end")]:
            first, last = (int((moment - start) / (end - start) * columns) for moment in (since, at))
            line[max(0, first) : max(0, last)] = symbol * (max(0, last) - max(0, first))
            symbol = {"sleep_begin": "╌", "wake_begin": "╌", "wake_end": "━", "sleep_end": "·", "start": "·"}.get(event, symbol)
            since = at
        table.add_row(model_text(model), Text("".join(line[:columns]), style=COLORS[model]))
    table.add_row("", f"0{f'{end - start:.1f} s':>{columns - 1}}", style="dim")
    return table


def request_table(spans: Sequence[ReadableSpan], outcomes: Sequence[Outcome], start: float) -> Table:
    table = Table(
        title="Requests, times in ms", caption="waited: for the model, as the gateway has it; the rest as the client saw it"
    )
    for name in ("#", "model", "sent at", "waited", "first chunk", "answered", "", "answer"):
        table.add_column(name, justify="left" if name in ("model", "", "answer") else "right", no_wrap=True)
    by_trace = {span.context.trace_id: span for span in named(spans, "llmux.request")}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.sent):
        span = by_trace.get(outcome.trace_id)
        waited = float(attribute(span, "llmux.queue_time") or 0) if span else 0.0
        bar = Text("▒" * round(waited * 10), style="yellow")
        answer = outcome.error or outcome.text.strip()
        table.add_row(
            str(outcome.number),
            model_text(outcome.model),
            milliseconds(outcome.sent - start),
            milliseconds(waited),
            milliseconds(outcome.first - outcome.sent) if outcome.stream and outcome.first else "",
            milliseconds(outcome.done - outcome.sent),
            bar,
            Text(answer[:20] + "…", style="bold red" if outcome.error else "dim"),
        )
    return table


def span_tree(spans: Sequence[ReadableSpan]) -> Tree:
    """The trace of the first request that had to have a model put to sleep."""

    def label(span: ReadableSpan) -> Text:
        shown = {
            key.removeprefix("llmux."): value for key, value in (span.attributes or {}).items() if key.startswith("llmux.")
        }
        if "queue_time" in shown:
            shown["queue_time"] = f"{float(str(shown['queue_time'])):.3f}"
        details = " ".join(f"{key.removeprefix('switch.')}={value}" for key, value in shown.items())
        text = Text.assemble((span.name, "bold"), f" {milliseconds(seconds(span))} ms ", (details, "dim"))
        if span.links:
            text.append(f" · {len(span.links)} link{'s' if len(span.links) > 1 else ''}", style="yellow")
        return text

    def grow(tree: Tree, span: ReadableSpan) -> Tree:
        for child in children(spans, span):
            grow(tree.add(label(child)), child)
        return tree

    requests = named(spans, "llmux.request")
    leaders = [span for span in requests if any(attribute(s, "llmux.switch.from") for s in children(spans, span))]
    root = (leaders or requests)[0]
    return grow(Tree(label(root)), root)


def main() -> int:
    console = Console(width=WIDTH)
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    sequences = plan()
    outcomes = [outcome for sequence in sequences for outcome in sequence]

    with tempfile.TemporaryDirectory() as folder:
        ledger = GpuLedger(Path(folder) / "gpu")
        options = (
            SimOptions(
                name=model,
                gpu=str(Path(folder) / "gpu"),
                start_asleep=1,
                tokens_per_second=120,
                sleep_seconds=0.08,
                wake_seconds=0.15,
            )
            for model in MODELS
        )
        console.print(f"Two simulated vLLM servers, {' and '.join(MODELS)}, on one GPU that has room for one of them.")
        with start_sims(*options) as sims:
            right = ask_directly(sims, (outcome.prompt for outcome in outcomes))
            config = {
                "models": {sim.name: {"url": sim.url} for sim in sims},
                "policy": {"quantum": 0.5, "linger": 0.05},  # short turns: there are switches to be seen
            }
            llm = LLMuxApp(config, tracer_provider=provider)
            with host(Starlette(routes=[Mount("/llm", app=llm)], lifespan=llm.lifespan)) as url:
                console.print(
                    f"The gateway is mounted at {url}/llm. {len(sequences)} clients send {len(outcomes)} requests …\n"
                )
                start = time.time()
                asyncio.run(run_clients(f"{url}/llm", sequences))
                end = time.time()
        spans = exporter.get_finished_spans()
        switches = [span for span in named(spans, "llmux.switch") if attribute(span, "llmux.switch.outcome") == "completed"]
        found = problems(outcomes, right, len(switches), ledger)
        found += untraced(outcomes, spans)
        for table in switch_table(spans, start), gpu_timeline(ledger, start, end), request_table(spans, outcomes, start):
            console.print(table, "")
    console.print("The spans of a request that a switch was begun for:", style="italic")
    console.print(span_tree(spans))
    if found:
        console.print("", *found, sep="\n", style="bold red")
        return 1
    answered = f"{len(outcomes)} requests, all answered as they should be"
    console.print(
        f"\n{answered}; {len(switches)} switches in {end - start:.1f} s; one model awake at a time.", style="bold green"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
