"""A switch policy of your own. Run it with `uvicorn --app-dir examples own_policy:app`.

It gives the awake model's clients some time before their model is taken away: an idle model is left at once, a busy one
when somebody has waited for `patience` seconds.
"""

from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import Defer, LLMuxApp, PolicyContext, PolicyDecision, SwitchContext, SwitchNow, SwitchPolicy


# --8<-- [start:policy]
class PatientPolicy(SwitchPolicy):
    min_active_duration = 0.2  # seconds; for real models take 5 or more
    request_timeout = 60.0
    sleep_level = 1

    def __init__(self, patience: float) -> None:
        self.patience = patience

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        if context.active_in_flight == 0:
            return SwitchNow()
        return Defer(anyio.sleep(max(0.0, self.patience - context.oldest_waiting)))

    async def prepare_switch(self, context: SwitchContext) -> None:
        # Running answers get half a minute to finish; those that take longer are aborted, and their clients told so.
        await context.wait_for_in_flight(timeout=30)


# --8<-- [end:policy]

llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"), policy=PatientPolicy(patience=0.5))
app = Starlette(routes=[Mount("/llm", app=llm)], lifespan=llm.lifespan)
