"""Every policy over the same load, beside the lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from .._estimates import Estimates, ModelCosts
from .._estimates_file import EstimatesFile
from ..config import POLICY_PARAMETERS, Config, PolicyConfig
from ..policy import build_policy
from .bound import Bound, lower_bound
from .engine import simulate
from .errors import SimulationError
from .result import Figures, Result
from .workload import Workload

__all__ = ["Comparison", "PolicyRun", "compare"]


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """One row of the table."""

    policy: str
    configured: bool
    """Whether it is the one of the configuration, with its parameters; the others have their defaults."""
    parameters: Mapping[str, float]
    """The settings that are the policy's own, as they were."""
    figures: Figures
    ratio: float | None
    """Mean wait over the bound's; `None` if there is no bound, it is 0, or requests were lost or refused."""
    result: Result

    @property
    def label(self) -> str:
        """The policy's name; with its parameters and a mark if it is the configured one."""
        if not self.configured:
            return self.policy
        return "* " + " ".join((self.policy, *(f"{name}={value:g}" for name, value in self.parameters.items())))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `llmux-asgi simulate` tells."""

    load: str
    costs: Mapping[str, ModelCosts]
    bound: Bound | None
    """`None`: the load has closed loops."""
    runs: tuple[PolicyRun, ...]
    """The configured policy first."""

    def to_json(self) -> bytes:
        """All of it but the single requests and switches."""
        runs = [
            {
                "policy": run.policy,
                "configured": run.configured,
                "parameters": dict(run.parameters),
                **msgspec.to_builtins(run.figures),
                "ratio": run.ratio,
            }
            for run in self.runs
        ]
        content = {"load": self.load, "costs": dict(self.costs), "bound": self.bound, "policies": runs}
        return msgspec.json.format(msgspec.json.encode(content))


def compare(
    workload: Workload,
    config: Config,
    *,
    active: str | None = None,
    sleep_seconds: float | None = None,
    wake_seconds: float | None = None,
    recompute: float = 0.0,
) -> Comparison:
    """Simulate the configured policy, and all four with their defaults, each once.

    What belongs to every policy (sleep level, time limits, drain and preemption, priorities, queue limits) is the
    configuration's for all of them. `recompute` is as for `simulate`, in seconds. What a sleep and a wake take is, by model:
    what the file of `policy.estimates` says, else `models.NAME.costs`, else `sleep_seconds` and `wake_seconds`, which the
    gateway then is taken not to know beforehand. Raises `SimulationError`.
    """
    if active is not None:
        active = config.aliases.get(active, active)
        if active not in config.models:
            raise SimulationError(f"the model {active!r} is not configured")
    levels = {name: model.sleep_level or config.policy.sleep_level for name, model in config.models.items()}
    seeds = _known_costs(config, levels)
    costs = {}
    for name in (name for name in config.models if name in workload.models or name == active):
        sleep, wake = seeds[name].sleep, seeds[name].wake
        costs[name] = ModelCosts(sleep_seconds if sleep is None else sleep, wake_seconds if wake is None else wake)
        if costs[name].sleep is None or costs[name].wake is None:
            raise SimulationError(
                f"what sleep and wake of the model {name!r} take is not known: give models.{name}.costs in the configuration, "
                "or --sleep-seconds and --wake-seconds"
            )
    timeouts = {name: model.timeouts.request for name, model in config.models.items() if model.timeouts.request is not None}
    bound = _bound(workload, costs, active, config.policy)
    classes = {name: model.priority for name, model in config.models.items() if model.priority is not None}
    limits = {name: model.max_waiting for name, model in config.models.items() if model.max_waiting is not None}

    def run(settings: PolicyConfig, configured: bool) -> PolicyRun:
        policy = build_policy(settings)
        result = simulate(
            workload,
            policy,
            costs,
            active=active,
            seeds=seeds,
            sleep_levels=levels,
            request_timeouts=timeouts,
            priorities=config.priorities,
            default_priorities=classes,
            max_waiting=config.limits.max_waiting,
            queue_limits=limits,
            recompute=recompute,
        )
        figures = result.figures()
        stay = ("min_active_duration",) if settings.min_active_duration is not None else ()
        own = {name: float(getattr(policy, name)) for name in (*POLICY_PARAMETERS[settings.name], *stay)}
        sound = bound is not None and bound.non_anticipating > 0 and not figures.lost and not figures.refused
        ratio = figures.mean_wait / bound.non_anticipating if bound is not None and sound else None
        return PolicyRun(settings.name, configured, own, figures, ratio, result)

    common = ("sleep_level", "request_timeout", "drain", "drain_timeout", "max_freezes", "max_frozen")
    defaults = [PolicyConfig(name=name, **{key: getattr(config.policy, key) for key in common}) for name in POLICY_PARAMETERS]
    # With its defaults the configured one needs no second row.
    chosen = vars(build_policy(config.policy))
    defaults = [each for each in defaults if each.name != config.policy.name or vars(build_policy(each)) != chosen]
    runs = (run(config.policy, configured=True), *(run(settings, configured=False) for settings in defaults))
    return Comparison(workload.name, costs, bound, runs)


def _bound(workload: Workload, costs: Mapping[str, ModelCosts], active: str | None, settings: PolicyConfig) -> Bound | None:
    """The bound for what becomes of running requests by `settings`.

    Preemption waits for them as far as its deadline goes and no further. And a model that has frozen requests is brought back
    for them, before anybody new waits for it: only the bound on those who may do so holds.
    """
    preempts = settings.drain == "preempt"
    waits = settings.drain in ("wait", True) or (preempts and settings.drain_timeout is not None)
    bound = lower_bound(workload, costs, active=active, drain=settings.drain_timeout if waits else 0.0)
    return Bound(bound.clairvoyant, bound.clairvoyant) if bound is not None and preempts else bound


def _known_costs(config: Config, levels: Mapping[str, int]) -> dict[str, ModelCosts]:
    """What the gateway knows at its start."""
    estimates = Estimates(config.models)
    for name, model in config.models.items():
        estimates.seed(name, levels[name], ModelCosts(model.costs.sleep, model.costs.wake))
    if config.policy.estimates is not None:
        EstimatesFile(config.policy.estimates).load_into(estimates)
    return {name: estimates.of(name, level) for name, level in levels.items()}
