"""What a switch through the gateway costs beyond the server's own sleep and wake: `make bench-switch`.

Two simulated servers whose sleep and wake take a known time. Round by round, side by side in one run:

    by hand    POST /sleep to the one, POST /wake_up to the other, and a one-token request to it
    gateway    the same request through the gateway, which has to switch for it

The difference is what the gateway adds: two proofs of state, queue, policy, spans, relay.
"""

from __future__ import annotations

import statistics
import time

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimOptions, start_sims
from tests.support.serve import serve

ROUNDS = 60
STEP_SECONDS = 0.05


def main() -> None:
    """Run the benchmark and print medians and quartiles in milliseconds."""
    options = [
        SimOptions(name=name, sleep_seconds=STEP_SECONDS, wake_seconds=STEP_SECONDS, start_asleep=level)
        for name, level in (("a", 0), ("b", 1))
    ]
    with start_sims(*options) as servers, httpx.Client(timeout=30) as client:
        config = {"models": {p.name: {"url": p.url} for p in servers}, "policy": {"min_active_duration": 0}}
        llm = LLMuxApp(config)
        with serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)) as url:
            by_hand: list[float] = []
            gateway: list[float] = []
            client.post(f"{url}/llm/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 1})
            for index in range(ROUNDS):
                source, target = servers if index % 2 == 0 else servers[::-1]
                body = {"model": target.name, "prompt": "x", "max_tokens": 1}
                begun = time.perf_counter()
                client.post(f"{url}/llm/v1/completions", json=body).raise_for_status()
                gateway.append(time.perf_counter() - begun)
                # Back by hand, and there again by hand; then the gateway is told to look.
                client.post(target.url + "/sleep").raise_for_status()
                client.post(source.url + "/wake_up").raise_for_status()
                begun = time.perf_counter()
                client.post(source.url + "/sleep").raise_for_status()
                client.post(target.url + "/wake_up").raise_for_status()
                client.post(target.url + "/v1/completions", json=body).raise_for_status()
                by_hand.append(time.perf_counter() - begun)
    added = [1000 * (mine - theirs) for mine, theirs in zip(gateway, by_hand, strict=True)]
    for name, values in (("by hand", by_hand), ("gateway", gateway)):
        low, middle, high = (1000 * value for value in statistics.quantiles(values, n=4))
        print(f"{name:8} median {middle:6.1f} ms   quartiles {low:6.1f} .. {high:6.1f}")
    low, middle, high = statistics.quantiles(added, n=4)
    print(f"{'added':8} median {middle:6.1f} ms   quartiles {low:6.1f} .. {high:6.1f}   ({ROUNDS} switches)")


if __name__ == "__main__":
    main()
