"""The gateway in virtual time: its own state machine, its own way to ask the policy, and the policy itself.

Only what the gateway awaits is replaced, by events in a queue that is sorted by time: a request arrives or is over, gives
up, a cooldown or a drain's deadline is over, a sleep or a wake is done, a request was frozen for too long. Nothing is slept
through, no event loop runs, and the same load gives the same result.

What is left out: an awake model serves any number of requests at once, each in its own service time (vLLM batches); steps
never fail; the gateway itself takes no time.
"""

from __future__ import annotations

import math
import types
from collections.abc import Generator, Mapping
from functools import partial

from .._admission import Priorities, QueueLimits
from .._decision import Decider
from .._estimates import Estimates, ModelCosts
from .._state import Mode, Phase, SwitcherState, Ticket, TicketStatus
from ..exceptions import QueueFullError
from ..policy import SwitchContext, SwitchPolicy
from ._agenda import GIVE_UP, STEP, Agenda
from ._clients import Clients, Request
from ._pure import Drained, PurePolicy, Released
from ._serving import Serving
from .errors import SimulationError
from .result import Outcome, RequestRecord, Result, SwitchRecord
from .workload import Workload

__all__ = ["simulate"]


def simulate(
    workload: Workload,
    policy: SwitchPolicy,
    costs: Mapping[str, ModelCosts],
    *,
    active: str | None = None,
    seeds: Mapping[str, ModelCosts] | None = None,
    sleep_levels: Mapping[str, int] | None = None,
    request_timeouts: Mapping[str, float] | None = None,
    priorities: Mapping[str, float] | None = None,
    default_priorities: Mapping[str, str] | None = None,
    max_waiting: int | None = None,
    queue_limits: Mapping[str, int] | None = None,
    recompute: float = 0.0,
) -> Result:
    """Play `workload` against `policy` and return what became of each request.

    `costs` is what a sleep and a wake of each model take, in seconds. `active` is the model that is awake at the start
    (`None`: none is). `seeds` are the estimates that the gateway begins with, as `models.NAME.costs` of its configuration;
    `None`: it learns them from the first switches. `sleep_levels` and `request_timeouts` override the policy's, by model.

    `priorities` are the priority classes with their head starts in seconds, `default_priorities` the class of a model's
    requests that name none, by model. `max_waiting` is how many requests may wait for all models together, `queue_limits` how
    many by model; `None`: no limit. `recompute` is for how many seconds a frozen request is held up when it goes on: vLLM
    computes its KV cache anew.

    Raises `SimulationError` if a model has no costs or a priority class does not exist, or the policy is not pure: if it
    answers `Defer`, or waits in `prepare_switch` for anything but what the context offers.
    """
    for model in (*workload.models, *([active] if active is not None else [])):
        known = costs.get(model)
        if known is None or known.sleep is None or known.wake is None:
            raise SimulationError(f"what sleep and wake of the model {model!r} take is not known")
    for priority in workload.priorities:
        if priority not in (priorities or {}):
            raise SimulationError(f"the priority {priority!r} is not configured")
    return _Engine(
        workload,
        policy,
        costs,
        active,
        seeds or {},
        sleep_levels or {},
        request_timeouts or {},
        Priorities(priorities or {}, default_priorities or {}),
        QueueLimits(max_waiting, queue_limits or {}),
        recompute,
    ).run()


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
        priorities: Priorities,
        limits: QueueLimits,
        recompute: float,
    ) -> None:
        models = tuple(dict.fromkeys((*costs, *workload.models)))
        self._policy = policy
        self._sleeps = {model: each.sleep or 0.0 for model, each in costs.items()}
        self._wakes = {model: each.wake or 0.0 for model, each in costs.items()}
        self._levels = {model: sleep_levels.get(model, policy.sleep_level) for model in models}
        self._timeouts = {model: request_timeouts.get(model, policy.request_timeout) for model in models}
        self._limits = limits
        self._agenda = Agenda()
        self._state = SwitcherState(models)
        self._estimates = Estimates(models)
        for model, each in seeds.items():
            self._estimates.seed(model, self._levels.get(model, policy.sleep_level), each)
        self._costs: tuple[Mapping[str, float], Mapping[str, float]] | None = None
        self._decider = Decider(
            PurePolicy(policy), self._state, lambda: self._agenda.now, self._blame, lambda: None, self._estimated_costs
        )
        self._clients = Clients(self._agenda, priorities, self._arrive)
        self._serving = Serving(self._agenda, models, recompute, partial(self._release, outcome=Outcome.ANSWERED), self._expire)

        self._changed = False
        self._ask_at = math.inf
        """When the policy is asked again although nothing has changed."""
        self._preparation: Generator[object, object, object] | None = None
        """The policy's `prepare_switch`, waiting for requests to be over."""
        self._awaited: Drained | Released | None = None
        """What it waits for."""
        self._stage = 0
        """Counts the stages of the switches, so that the end of one that was left is told from that of the present one."""
        self._freeze_limit: float | None = None
        """For how long the requests of the outgoing model may be frozen in the present switch; `None`: they are not."""

        self._switches: list[SwitchRecord] = []
        self._origin: str | None = None
        self._begun = 0.0
        self._committed: float | None = None

        self._active_at_start = active
        self._state.inquire()
        self._state.adopt(active)
        for script in workload.scripts:
            self._clients.play(script)

    def run(self) -> Result:
        """Let all of it happen."""
        agenda = self._agenda
        while min(agenda.next_time, self._ask_at) < math.inf:
            if agenda.next_time <= self._ask_at:
                agenda.advance()
            else:
                agenda.now = self._ask_at
                self._changed = True
            if self._changed:
                self._decide()
        if waiting := self._state.waiting_models():
            raise SimulationError(
                f"{type(self._policy).__name__} lets requests for {waiting} wait for ever: it answers Stay() and nothing "
                "changes any more"
            )
        records = (
            RequestRecord(r.model, r.since, r.wait, r.finish, r.outcome, r.priority, r.freezes, r.frozen)
            for r in self._clients.requests
            if r.outcome is not None  # all have one by now
        )
        name = type(self._policy).__name__
        return Result(name, tuple(records), tuple(self._switches), self._active_at_start, self._serving.seconds)

    # Requests

    def _arrive(self, request: Request) -> None:
        model = request.model
        if self._state.try_admit(model, request.head_start):
            self._serving.start(request)
            return
        try:
            self._limits.check(self._state, model, lambda: 0.0)
        except QueueFullError:
            request.wait = 0.0
            self._close(request, Outcome.REFUSED)
            return
        self._state.enqueue(request)
        self._changed = True
        timeout = self._timeouts[model]
        if timeout is not None:
            self._agenda.at(self._agenda.now + timeout, GIVE_UP, self._give_up, request)

    def _release(self, request: Request, outcome: Outcome) -> None:
        """A request that runs is over."""
        model = request.model
        self._serving.end(request)
        last = self._state.release(model, self._agenda.now, request.head_start)
        self._changed = True
        self._close(request, outcome)
        if model != self._state.active:
            return
        if last and isinstance(self._awaited, Drained):
            self._resume(True)
        elif isinstance(self._awaited, Released):
            # Once all that end at this time have ended.
            self._agenda.at(self._agenda.now, STEP, self._go_on, self._stage)

    def _expire(self, request: Request) -> None:
        """It was frozen for as long as a request may be."""
        self._serving.end(request)
        self._state.release_frozen(request.model, self._agenda.now, request.head_start)
        self._close(request, Outcome.EXPIRED)
        self._waits_no_more(request.model)

    def _give_up(self, request: Request) -> None:
        """Its time limit has passed."""
        if request.status is not TicketStatus.WAITING:
            return
        self._state.leave(request)
        request.wait = self._agenda.now - request.since
        self._close(request, Outcome.LOST)
        self._waits_no_more(request.model)

    def _waits_no_more(self, model: str) -> None:
        """One request less waits for `model`. If none does, a switch to it is given up as long as it can be."""
        self._changed = True
        state = self._state
        if state.target == model and state.phase in (Phase.COOLDOWN, Phase.DRAIN) and not state.depth(model):
            self._abandon()

    def _close(self, request: Request, outcome: Outcome) -> None:
        request.outcome, request.finish = outcome, self._agenda.now
        self._clients.over(request)

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
            self._ask_at = max(self._decider.ask_again_at, self._agenda.now + 0.001)  # as the driver does

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
        rest = state.active_since + self._policy.min_active_duration - self._agenda.now if state.active is not None else 0.0
        state.begin(to)
        self._origin, self._begun, self._committed = state.active, self._agenda.now, None
        self._freeze_limit = None
        self._stage += 1
        if rest > 0:
            self._agenda.at(self._agenda.now + rest, STEP, self._drain, self._stage)
        else:
            self._drain(self._stage)

    def _drain(self, stage: int) -> None:
        if stage != self._stage:
            return
        state, origin = self._state, self._state.active
        state.drain()
        context = SwitchContext(
            origin, str(state.target), lambda: state.in_flight(origin), self._wait_for_in_flight, self._preempt
        )
        self._preparation = self._policy.prepare_switch(context).__await__()
        self._resume(None)

    @types.coroutine
    def _wait_for_in_flight(self, timeout: float | None) -> Generator[Drained, bool, bool]:
        if not self._state.in_flight(self._state.active):
            return True
        return (yield Drained(timeout))

    async def _preempt(self, max_freezes: int, max_frozen: float) -> None:
        origin = self._state.active
        if origin is None:
            return
        while any(request.freezes >= max_freezes for request in self._serving.running(origin)):
            await self._until_release()
        self._freeze_limit = max_frozen

    @types.coroutine
    def _until_release(self) -> Generator[Released, None, None]:
        yield Released()

    def _resume(self, value: bool | None) -> None:
        """Let `prepare_switch` go on until it waits again or is done."""
        assert self._preparation is not None  # noqa: S101 - for the type checker
        self._stage += 1
        self._awaited = None
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
        if not isinstance(wanted, (Drained, Released)):
            self._preparation.close()
            raise SimulationError(f"{name} waits for something other than running requests, which cannot be simulated")
        self._awaited = wanted
        if isinstance(wanted, Drained) and wanted.timeout is not None:
            self._agenda.at(self._agenda.now + wanted.timeout, STEP, self._go_on, self._stage)

    def _go_on(self, stage: int) -> None:
        """A deadline has passed, or a request is over."""
        if stage == self._stage and self._preparation is not None:
            self._resume(False)

    def _commit(self) -> None:
        state, origin = self._state, self._state.active
        if not state.commit():
            self._abandon()
            return
        self._committed = self._agenda.now
        if origin is None:
            self._wake(None)
            return
        if self._freeze_limit is not None:
            self._serving.stop(origin)
        for request in self._serving.running(origin):
            self._release(request, Outcome.CUT)
        self._agenda.at(self._agenda.now + self._sleeps[origin], STEP, self._wake, origin)

    def _wake(self, origin: str | None) -> None:
        """The outgoing model is asleep."""
        state, to = self._state, str(self._state.target)
        if origin is not None:
            self._estimates.sleep_took(origin, self._levels[origin], self._sleeps[origin])
            self._costs = None
            if self._freeze_limit is not None and state.in_flight(origin):
                state.freeze(self._agenda.now)
                self._serving.freeze(origin, self._freeze_limit)
        state.wake()
        if not state.depth(to):
            self._abandon()
            return
        state.wake_up()
        self._agenda.at(self._agenda.now + self._wakes[to], STEP, self._complete, to)

    def _complete(self, to: str) -> None:
        self._state.ready()
        self._estimates.wake_took(to, self._levels[to], self._wakes[to])
        self._costs = None
        self._switches.append(SwitchRecord(self._origin, to, self._begun, self._committed, self._agenda.now, completed=True))
        self._serving.thaw(to)
        self._grant(self._state.complete(self._agenda.now))

    def _abandon(self) -> None:
        self._stage += 1
        if self._preparation is not None:
            self._preparation.close()
            self._preparation = self._awaited = None
        to = str(self._state.target)
        self._switches.append(SwitchRecord(self._origin, to, self._begun, self._committed, self._agenda.now, completed=False))
        self._grant(self._state.abandon())

    def _grant(self, granted: list[Ticket]) -> None:
        self._changed = True
        for request in granted:
            assert isinstance(request, Request)  # noqa: S101 - for the type checker
            self._serving.start(request)
