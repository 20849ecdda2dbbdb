"""The gateway in virtual time: its own state machine, its own way to ask the policy, and the policy itself.

Only what the gateway awaits is replaced, by events in a queue that is sorted by time: a request arrives or is over, gives
up, a cooldown or a drain's deadline is over, a sleep or a wake is done. Nothing is slept through, no event loop runs, and the
same load gives the same result.

What is left out: an awake model serves any number of requests at once, each in its own service time (vLLM batches); steps
never fail; the gateway itself takes no time.
"""

from __future__ import annotations

import heapq
import inspect
import math
import types
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from .._decision import Decider
from .._estimates import Estimates, ModelCosts
from .._state import Mode, Phase, SwitcherState, Ticket, TicketStatus
from ..policy import Defer, PolicyContext, PolicyDecision, SwitchContext, SwitchPolicy
from .errors import SimulationError
from .result import Outcome, RequestRecord, Result, SwitchRecord
from .workload import Arrival, Script, Workload

__all__ = ["simulate"]

# What happens at one and the same time happens in this order.
_FINISH, _STEP, _ARRIVAL, _GIVE_UP = range(4)


def simulate(
    workload: Workload,
    policy: SwitchPolicy,
    costs: Mapping[str, ModelCosts],
    *,
    active: str | None = None,
    seeds: Mapping[str, ModelCosts] | None = None,
    sleep_levels: Mapping[str, int] | None = None,
    request_timeouts: Mapping[str, float] | None = None,
) -> Result:
    """Play `workload` against `policy` and return what became of each request.

    `costs` is what a sleep and a wake of each model take, in seconds. `active` is the model that is awake at the start
    (`None`: none is). `seeds` are the estimates that the gateway begins with, as `models.NAME.costs` of its configuration;
    `None`: it learns them from the first switches. `sleep_levels` and `request_timeouts` override the policy's, by model.

    Raises `SimulationError` if a model has no costs, or the policy is not pure: if it answers `Defer`, or waits in
    `prepare_switch` for anything but `context.wait_for_in_flight`.
    """
    for model in (*workload.models, *([active] if active is not None else [])):
        known = costs.get(model)
        if known is None or known.sleep is None or known.wake is None:
            raise SimulationError(f"what sleep and wake of the model {model!r} take is not known")
    return _Engine(workload, policy, costs, active, seeds or {}, sleep_levels or {}, request_timeouts or {}).run()


class _Request(Ticket):
    """One request, and its place in the queue."""

    __slots__ = ("client", "finish", "outcome", "service", "wait")

    def __init__(self, arrival: Arrival, now: float, client: _Client) -> None:
        super().__init__(arrival.model, now)
        self.service = arrival.service
        self.client = client
        self.wait = self.finish = math.nan
        self.outcome: Outcome | None = None


class _Client:
    """A script that is being played."""

    __slots__ = ("begun", "coming", "next", "open", "pause", "rounds")

    def __init__(self, script: Script) -> None:
        self.rounds = iter(script.rounds)
        self.pause = script.pause
        self.begun = 0.0
        self.coming: Iterator[Arrival] = iter(())
        self.next: Arrival | None = None
        self.open = 0
        """How many requests of the round are not over yet, those that have not arrived included."""


class _Drain:
    """What `SwitchContext.wait_for_in_flight` asks of the engine: to be resumed when the model is drained, or then."""

    __slots__ = ("timeout",)

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout


class _PurePolicy(SwitchPolicy):
    """The policy, unless it asks for something that takes an event loop."""

    def __init__(self, policy: SwitchPolicy) -> None:
        self._policy = policy

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        decision = self._policy.on_pending_request(context)
        if isinstance(decision, Defer):
            if inspect.iscoroutine(decision.awaitable):
                decision.awaitable.close()
            name = type(self._policy).__name__
            raise SimulationError(f"{name} answers Defer, which cannot be simulated: let it answer Stay(until)")
        return decision


class _Engine:
    """One run. What `Driver`, `Steps` and `ModelSwitcher` do with awaits is done here with events."""

    def __init__(
        self,
        workload: Workload,
        policy: SwitchPolicy,
        costs: Mapping[str, ModelCosts],
        active: str | None,
        seeds: Mapping[str, ModelCosts],
        sleep_levels: Mapping[str, int],
        request_timeouts: Mapping[str, float],
    ) -> None:
        models = tuple(dict.fromkeys((*costs, *workload.models)))
        self._policy = policy
        self._sleeps = {model: each.sleep or 0.0 for model, each in costs.items()}
        self._wakes = {model: each.wake or 0.0 for model, each in costs.items()}
        self._levels = {model: sleep_levels.get(model, policy.sleep_level) for model in models}
        self._timeouts = {model: request_timeouts.get(model, policy.request_timeout) for model in models}
        self._now = 0.0
        self._state = SwitcherState(models)
        self._estimates = Estimates(models)
        for model, each in seeds.items():
            self._estimates.seed(model, self._levels.get(model, policy.sleep_level), each)
        self._costs: tuple[Mapping[str, float], Mapping[str, float]] | None = None
        self._decider = Decider(
            _PurePolicy(policy), self._state, lambda: self._now, self._blame, lambda: None, self._estimated_costs
        )

        self._events: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._pushed = 0
        self._changed = False
        self._ask_at = math.inf
        """When the policy is asked again although nothing has changed."""
        self._preparation: Generator[object, object, object] | None = None
        """The policy's `prepare_switch`, waiting for the drain."""
        self._stage = 0
        """Counts the stages of the switches, so that the end of one that was left is told from that of the present one."""

        self._requests: list[_Request] = []
        self._running: dict[str, dict[_Request, None]] = {model: {} for model in models}
        self._switches: list[SwitchRecord] = []
        self._origin: str | None = None
        self._begun = 0.0
        self._committed: float | None = None
        self._served = self._serving = 0.0
        self._in_flight = 0

        self._active_at_start = active
        self._state.inquire()
        self._state.adopt(active)
        for script in workload.scripts:
            self._at(script.start, _ARRIVAL, self._begin_round, _Client(script))

    def run(self) -> Result:
        """Let all of it happen."""
        events, pop = self._events, heapq.heappop
        while events or self._ask_at < math.inf:
            if events and events[0][0] <= self._ask_at:
                now = self._now = events[0][0]
                while events and events[0][0] == now:
                    event = pop(events)
                    event[3](event[4])
            else:
                self._now = self._ask_at
                self._changed = True
            if self._changed:
                self._decide()
        if waiting := self._state.waiting_models():
            raise SimulationError(
                f"{type(self._policy).__name__} lets requests for {waiting} wait for ever: it answers Stay() and nothing "
                "changes any more"
            )
        records = (RequestRecord(r.model, r.since, r.wait, r.finish, r.outcome or Outcome.ANSWERED) for r in self._requests)
        return Result(type(self._policy).__name__, tuple(records), tuple(self._switches), self._active_at_start, self._served)

    def _at(self, time: float, rank: int, what: Callable[[Any], None], whom: object) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (time, rank, self._pushed, what, whom))

    # Clients

    def _begin_round(self, client: _Client) -> None:
        arrivals = next(client.rounds, None)
        if arrivals is None:
            return
        client.begun, client.open = self._now, len(arrivals)
        client.coming = iter(sorted(arrivals, key=lambda arrival: arrival.offset))
        if arrivals:
            self._await_next(client)
        else:
            self._at(self._now + client.pause, _ARRIVAL, self._begin_round, client)

    def _await_next(self, client: _Client) -> None:
        client.next = next(client.coming, None)
        if client.next is not None:
            self._at(client.begun + client.next.offset, _ARRIVAL, self._arrive, client)

    def _arrive(self, client: _Client) -> None:
        assert client.next is not None  # noqa: S101 - for the type checker
        request = _Request(client.next, self._now, client)
        self._requests.append(request)
        self._await_next(client)
        if self._state.try_admit(request.model):
            self._serve(request)
            return
        self._state.enqueue(request)
        self._changed = True
        timeout = self._timeouts[request.model]
        if timeout is not None:
            self._at(self._now + timeout, _GIVE_UP, self._give_up, request)

    def _serve(self, request: _Request) -> None:
        now = self._now
        request.wait = now - request.since
        self._running[request.model][request] = None
        if not self._in_flight:
            self._serving = now
        self._in_flight += 1
        self._at(now + request.service, _FINISH, self._finish, request)

    def _finish(self, request: _Request) -> None:
        if request.outcome is None:  # else it was cut
            self._release(request, Outcome.ANSWERED)

    def _release(self, request: _Request, outcome: Outcome) -> None:
        now, model = self._now, request.model
        del self._running[model][request]
        self._in_flight -= 1
        if not self._in_flight:
            self._served += now - self._serving
        last = self._state.release(model, now)
        self._changed = True
        self._close(request, outcome)
        if last and self._preparation is not None and model == self._state.active:
            self._resume(True)

    def _give_up(self, request: _Request) -> None:
        """Its time limit has passed."""
        if request.status is not TicketStatus.WAITING:
            return
        self._state.leave(request)
        self._changed = True
        request.wait = self._now - request.since
        self._close(request, Outcome.LOST)
        state = self._state
        if state.target == request.model and state.phase in (Phase.COOLDOWN, Phase.DRAIN) and not state.depth(request.model):
            self._abandon()

    def _close(self, request: _Request, outcome: Outcome) -> None:
        request.outcome, request.finish = outcome, self._now
        client = request.client
        client.open -= 1
        if not client.open:
            self._at(self._now + client.pause, _ARRIVAL, self._begin_round, client)

    # Decisions

    def _decide(self) -> None:
        self._changed = False
        self._ask_at = math.inf
        if self._state.mode not in (Mode.ACTIVE, Mode.IDLE):
            return
        target = self._decider.choose()
        if target is not None:
            self._switch(target)
        elif self._decider.ask_again_at < math.inf:
            self._ask_at = max(self._decider.ask_again_at, self._now + 0.001)  # as the driver does

    def _blame(self, model: str, what: str, exc: Exception | None = None) -> None:
        if isinstance(exc, SimulationError):
            raise exc
        raise SimulationError(f"{type(self._policy).__name__} failed for the model {model!r}: {what}") from exc

    def _estimated_costs(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        if self._costs is None:
            self._costs = self._estimates.sleep_costs(self._levels), self._estimates.wake_costs(self._levels)
        return self._costs

    # One switch

    def _switch(self, to: str) -> None:
        state = self._state
        rest = state.active_since + self._policy.min_active_duration - self._now if state.active is not None else 0.0
        state.begin(to)
        self._origin, self._begun, self._committed = state.active, self._now, None
        self._stage += 1
        if rest > 0:
            self._at(self._now + rest, _STEP, self._drain, self._stage)
        else:
            self._drain(self._stage)

    def _drain(self, stage: int) -> None:
        if stage != self._stage:
            return
        state, origin = self._state, self._state.active
        state.drain()
        context = SwitchContext(origin, str(state.target), lambda: state.in_flight(origin), self._wait_for_in_flight)
        self._preparation = self._policy.prepare_switch(context).__await__()
        self._resume(None)

    @types.coroutine
    def _wait_for_in_flight(self, timeout: float | None) -> Generator[_Drain, bool, bool]:
        if not self._state.in_flight(self._state.active):
            return True
        return (yield _Drain(timeout))

    def _resume(self, value: bool | None) -> None:
        """Let `prepare_switch` go on until it waits again or is done."""
        assert self._preparation is not None  # noqa: S101 - for the type checker
        self._stage += 1
        name = f"{type(self._policy).__name__}.prepare_switch"
        try:
            wanted = self._preparation.send(value)
        except StopIteration:
            self._preparation = None
            self._commit()
            return
        except Exception as exc:
            # An event loop is missing, for one. Whatever it is: the policy is the user's code.
            raise SimulationError(f"{name} raised {exc!r}; it may wait for nothing but in-flight requests") from exc
        if not isinstance(wanted, _Drain):
            self._preparation.close()
            raise SimulationError(f"{name} waits for something other than wait_for_in_flight, which cannot be simulated")
        if wanted.timeout is not None:
            self._at(self._now + wanted.timeout, _STEP, self._deadline, self._stage)

    def _deadline(self, stage: int) -> None:
        if stage == self._stage and self._preparation is not None:
            self._resume(False)

    def _commit(self) -> None:
        state, origin = self._state, self._state.active
        if not state.commit():
            self._abandon()
            return
        self._committed = self._now
        if origin is None:
            self._wake(None)
            return
        for request in list(self._running[origin]):
            self._release(request, Outcome.CUT)
        self._at(self._now + self._sleeps[origin], _STEP, self._wake, origin)

    def _wake(self, origin: str | None) -> None:
        """The outgoing model is asleep."""
        state, to = self._state, str(self._state.target)
        if origin is not None:
            self._estimates.sleep_took(origin, self._levels[origin], self._sleeps[origin])
            self._costs = None
        state.wake()
        if not state.depth(to):
            self._abandon()
            return
        state.wake_up()
        self._at(self._now + self._wakes[to], _STEP, self._complete, to)

    def _complete(self, to: str) -> None:
        self._state.ready()
        self._estimates.wake_took(to, self._levels[to], self._wakes[to])
        self._costs = None
        self._switches.append(SwitchRecord(self._origin, to, self._begun, self._committed, self._now, completed=True))
        self._grant(self._state.complete(self._now))

    def _abandon(self) -> None:
        self._stage += 1
        if self._preparation is not None:
            self._preparation.close()
            self._preparation = None
        to = str(self._state.target)
        self._switches.append(SwitchRecord(self._origin, to, self._begun, self._committed, self._now, completed=False))
        self._grant(self._state.abandon())

    def _grant(self, granted: list[Ticket]) -> None:
        self._changed = True
        for request in granted:
            assert isinstance(request, _Request)  # noqa: S101 - for the type checker
            self._serve(request)
