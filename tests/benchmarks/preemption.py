"""What preemption is worth on a real vLLM: `make bench-preemption`.

A request for the model `b` comes while `a` is at an answer that takes about a minute. How long until its first token, with
`drain: wait` and with `drain: preempt`, one after the other in one run? And is the answer of `a` the undisturbed one?

The model of `a` has more and wider layers than that of the tests, so that it is slow enough on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.contract.driver import Stream
from tests.e2e.conftest import Prompt
from tests.real.environment import cache_root, ensure_environment
from tests.real.server import RealServer
from tests.real.tiny_model import ensure_model
from tests.support.gateway_process import gateway_process

SHORT = Prompt(chat=True, stream=True, text="in short", max_tokens=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48, help="layers of the slow model")
    parser.add_argument("--hidden", type=int, default=512, help="its hidden size, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=900, help="tokens of the long answer")
    arguments = parser.parse_args()
    long = Prompt(chat=True, stream=True, text="tell me of sleep", max_tokens=arguments.tokens)
    interpreter, models = ensure_environment(), cache_root() / "models"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slow = ensure_model(interpreter, models, 1, layers=arguments.layers, hidden=arguments.hidden)
        quick = ensure_model(interpreter, models, 2)
        servers = [RealServer(name, model, interpreter, folder / name) for name, model in (("a", slow), ("b", quick))]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait_ready()
        servers[1].call("POST", "/sleep?level=1")
        undisturbed, seconds = whole_answer(servers[0].url + "/v1", long)
        print(f"the long answer takes {seconds:.1f} s when nobody disturbs it")
        waits: dict[str, float] = {}
        for drain in ("wait", "preempt"):
            config = {
                "models": {server.name: {"url": server.url} for server in servers},
                "policy": {"name": "gated_quantum", "drain": drain, "request_timeout": None},
            }
            with gateway_process(config) as gateway:
                waits[drain], answer, total = disturbed(gateway.url + "/llm/v1", long)
            same = "equal to the undisturbed one" if answer == undisturbed else "NOT THE SAME"
            print(f"drain: {drain:8} first token of b after {waits[drain]:6.2f} s; the answer of a took {total:.1f} s, {same}")
            if answer != undisturbed:
                return 1
        print(f"with preemption the first token comes {waits['wait'] / waits['preempt']:.0f} times sooner")
    return 0


def whole_answer(url: str, prompt: Prompt) -> tuple[str, float]:
    with httpx.Client(base_url=url, timeout=600) as client:
        begun = time.monotonic()
        stream = Stream(client, prompt.path, prompt.body("a")).end(600)
        assert stream.closed_with_done
        return stream.text, time.monotonic() - begun


def disturbed(url: str, prompt: Prompt) -> tuple[float, str, float]:
    """Seconds until the first token of b, the answer of a, and what that took."""
    with httpx.Client(base_url=url, timeout=600) as client:
        begun = time.monotonic()
        stream = Stream(client, prompt.path, prompt.body("a"))
        assert stream.wait_for_events(5)
        asked = time.monotonic()
        other = Stream(client, SHORT.path, SHORT.body("b"))
        assert other.wait_for_events(1, 600)
        waited = time.monotonic() - asked
        other.end()
        stream.end(600)
        assert stream.closed_with_done
        return waited, stream.text, time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
