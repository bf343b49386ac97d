# SPDX-License-Identifier: Apache-2.0
"""For every policy and every budget of operations or of tokens, the schedules that just keep it.

A policy has one knob, and sometimes a few settings beside it that its authors chose by hand for other models. The knob
is turned until the exact prefill operations, scoring included, are those of the budget; each setting gives one
candidate, and the benchmark takes the one that moves the answers least in rooms set aside for that. So every rival is
at its best, and `ours` has no more than the others: it too is fitted to the model on those rooms.

    coarse_voxel, one_per_voxel, divprune, visionzip, holov, evs
                             share kept before the first layer
    cdpruner                 the same, by relevance as published or not negated
    framefusion              the same, or a factor on the shares of its schedule
    sparsevlm                a factor on the shares of its list for 192 tokens, with recycling or without
    transprune               a factor on the shares of its schedule, with attention or without
    bypass                   a factor on the shares of the schedule of `ours`
    fastv                    share kept from one layer on; the layer: its own scaled to this depth, 2 or 3
    pyramiddrop              k, k^2, k^3 after its three layers; these scaled to this depth, or at 1/2, 1/4 of it
    adatoken_release         a power of the released ratios; layers as above (`_original`: positions kept)
    adatoken                 share at the last layer; the rate of decay fitted to what the layers contribute, the
                             paper's, or one three times as steep
    ours_default             a factor on the ratios of its own schedule, with its default options
    ours                     the same with the options that suit the model; a share k before the first layer, alone or
                             with k^1.5 and k^2 later; gates planned from what each alone does to the answers, without
                             and with the layer from which on no spatial token is left
    ours_shipped             what lies in the model's folder for that budget, as it is (`_frontier_fit.shipped`)
    random                   on the schedules of `ours`: the control
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from adatoken3d_ros.lab.calibration import bisect
from adatoken3d_ros.lab.cost import Cost
from adatoken3d_ros.lab.gates import MAX_GATES, place_gates
from adatoken3d_ros.lab.probe import CalibrationError, FloatArray
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.pruning.decay import Decay, gates_on_curve
from adatoken3d_ros.pruning.flops import prefill_flops, scoring_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.policies.adatoken import CLAIMED_FALL
from adatoken3d_ros.pruning.policies.pyramiddrop import RELEASED_LISTS
from adatoken3d_ros.pruning.schedule import Schedule, scaled, scaled_to_depth
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import DecoderSize, Policy

RIVALS = (
    "random",
    "coarse_voxel",
    "one_per_voxel",
    "fastv",
    "pyramiddrop",
    "adatoken_release",
    "adatoken_release_original",
    "adatoken",
    "divprune",
    "cdpruner",
    "visionzip",
    "holov",
    "sparsevlm",
    "evs",
    "framefusion",
    "transprune",
    "bypass",
)
CONTESTANTS = (*RIVALS, "ours_default", "ours")
SHIPPED = "ours_shipped"  # beside them, where the model has any
_STEPS = 20  # halvings of a knob
_SHRINK = (1.0, 0.5, 0.25)
_GATES = 10


class Work(Protocol):
    """What a budget is a share of."""

    def share(self, policy: Policy, schedule: Schedule) -> float:
        """Of what it is without pruning."""
        ...


class Operations:
    """Exact prefill operations of some prompts under a schedule, scoring included."""

    def __init__(self, decoder: DecoderSize, sizes: Sequence[tuple[int, int, int]]) -> None:
        """sizes: (spatial tokens, other tokens, those of the question) of each prompt."""
        self._decoder, self._sizes = decoder, tuple(sizes)
        self._full = self._of(make_policy("none"), Schedule())

    def share(self, policy: Policy, schedule: Schedule) -> float:
        """Of what they are without pruning."""
        return self._of(policy, schedule) / self._full

    def _of(self, policy: Policy, schedule: Schedule) -> float:
        n_layers = self._decoder.n_layers
        return sum(
            operations(
                self._decoder, policy, schedule.counts(n_spatial, n_layers, policy.kept), n_spatial, n_text, n_question
            )
            for n_spatial, n_text, n_question in self._sizes
        )


@dataclass(frozen=True)
class Tokens:
    """Spatial tokens that a layer sees, mean over the layers, of a prompt that has `n_spatial`."""

    n_spatial: int
    n_layers: int

    def share(self, policy: Policy, schedule: Schedule) -> float:
        """Of all of them."""
        return sum(schedule.counts(self.n_spatial, self.n_layers, policy.kept)) / (self.n_layers * self.n_spatial)

    def fitted(self, strategy: Strategy, count: int) -> Strategy:
        """The strategy with its ratios times the factor at which a layer sees at most `count` tokens on average."""
        policy = make_rival(strategy.policy, **strategy.options)
        base = strategy.schedule

        def share(schedule: Schedule) -> float:
            return self.share(policy, schedule)

        if count >= self.n_spatial or not base.stages:
            return strategy if count < self.n_spatial else replace(strategy, schedule=Schedule())
        most = 1.0 / min(stage.ratio for stage in base.stages)
        schedule = solve(lambda factor: scaled(base, factor), share, count / self.n_spatial, 1e-3, most)
        return replace(strategy, schedule=schedule or base)


def operations(
    decoder: DecoderSize,
    policy: Policy,
    counts: Sequence[int],
    n_spatial: int,
    n_text: int,
    n_question: int,
    rows: Sequence[int] = (),
) -> float:
    """Exact prefill operations of one prompt whose layers saw `counts` spatial tokens, scoring included.

    rows: all that each layer saw, if less than all others beside them.
    """
    scoring = scoring_flops(policy, decoder, n_spatial, counts, n_text, n_question, rows)
    return prefill_flops(decoder, rows or counts, 0 if rows else n_text) + scoring


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was measured of the model, in rooms set aside.

    Attributes:
        rate: of the decay that fits what its layers contribute.
        options: of `ours`.
        layers, ratios, gaps: divergence (len(layers), len(ratios)) of single gates of `ours`.
        withdrawal: (L + 1,) divergence when no spatial token is left from a layer on.
        cost: of a layer.
    """

    rate: float
    options: dict[str, Any]
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    gaps: FloatArray
    withdrawal: FloatArray
    cost: Cost
    notes: dict[str, Any] = field(default_factory=dict)


def solve(
    make: Callable[[float], Schedule], share: Callable[[Schedule], float], target: float, low: float, high: float
) -> Schedule | None:
    """The schedule of the largest knob in [low, high] whose share is at most `target`; None if the lowest costs more.

    make: a schedule by knob; more of it never costs less.
    """
    if share(make(low)) > target:
        return None
    return make(bisect(lambda knob: share(make(knob)) <= target, low, high, _STEPS))


def candidates(name: str, target: float, work: Work, n_layers: int, fitted: Fitted) -> list[Strategy]:
    """One schedule for each setting of the contestant with which its knob reaches the target; none if no setting can.

    `random` has none of its own. Raises ValueError for a name that is no contestant.
    """
    policy_name = "ours" if name == "ours_default" else name
    found = []
    for setting, options in _settings(name, fitted):
        policy = make_rival(policy_name, **options)

        def share(schedule: Schedule, policy: Policy = policy) -> float:
            return work.share(policy, schedule)

        for gates, make, low, high in _families(name, n_layers, target, fitted):
            schedule = solve(make, share, target, low, high)
            if schedule is not None:
                info = {"target": target, "setting": gates + setting}
                found.append(Strategy(f"{name} at {target:g}", policy_name, schedule, options=options, info=info))
    return found


def _settings(name: str, fitted: Fitted) -> list[tuple[str, dict[str, Any]]]:
    """(what to say of them, options) of each way to set the contestant beside its schedule."""
    if name == "cdpruner":
        return [("", {}), (", relevance not negated", {"negate": False})]
    if name == "sparsevlm":
        return [("", {}), (", without recycling", {"recycle": False})]
    if name == "transprune":
        return [("", {}), (", without attention", {"attention": False})]
    return [("", fitted.options if name == "ours" else {})]


_Family = tuple[str, Callable[[float], Schedule], float, float]


def _families(name: str, n_layers: int, target: float, fitted: Fitted) -> list[_Family]:
    """(setting, schedule by knob, least knob, largest knob) of each setting."""
    if name in ("coarse_voxel", "one_per_voxel", "divprune", "cdpruner", "visionzip", "holov", "evs"):
        return [_first_layer()]
    if name == "framefusion":
        return [_first_layer(), _scaled("its own schedule", make_rival(name).default_schedule(n_layers))]
    if name in ("sparsevlm", "transprune", "bypass"):
        return [_scaled("its own schedule", make_rival(name).default_schedule(n_layers))]
    if name == "fastv":
        own = scaled_to_depth([2], [0.5], n_layers).stages[0].layer
        layers = sorted({layer for layer in (own, 2, 3) if layer < n_layers})
        return [(f"from layer {g} on", lambda r, g=g: Schedule.of([g], [r]), 2e-3, 1.0) for g in layers]  # type: ignore[misc]
    if name == "pyramiddrop":
        return [
            (f"layers times {s:g}", lambda k, s=s: _at([8, 16, 24], [k, k**2, k**3], s, n_layers), 0.02, 1.0)  # type: ignore[misc]
            for s in _SHRINK
        ]
    if name in ("adatoken_release", "adatoken_release_original"):
        return [(f"layers times {s:g}", lambda k, s=s: _released(k, s, n_layers), 0.05, 1.0) for s in _SHRINK]  # type: ignore[misc]
    if name == "adatoken":
        paper = CLAIMED_FALL / (n_layers - 1)
        return [
            (f"rate {rate:.3g}, {what}", lambda a, b=rate: _decaying(b, a, n_layers), 5e-3, 0.995)  # type: ignore[misc]
            for what, rate in (("fitted", fitted.rate), ("the paper's", paper), ("steep", 3 * paper))
        ]
    if name == "ours_default":
        return [_scaled("its own schedule", make_policy("ours").default_schedule(n_layers))]
    if name == "ours":
        own_ratios = _scaled("its own schedule", make_policy("ours").default_schedule(n_layers))
        return [
            own_ratios,
            _first_layer(),
            (
                "before the first layer, then by attention",
                lambda k: _at([0, 8, 16], [k, k**1.5, k**2], 1.0, n_layers),
                0.02,
                1.0,
            ),
            *(_scaled(*planned) for planned in _planned(n_layers, target, fitted)),
        ]
    raise ValueError(f"{name!r} is no contestant with schedules of its own")


def _first_layer() -> _Family:
    return "before the first layer", lambda ratio: Schedule.of([0], [ratio]), 2e-3, 1.0


def _scaled(setting: str, base: Schedule) -> _Family:
    return setting, lambda factor: scaled(base, factor), 0.02, 1.0 / min((s.ratio for s in base.stages), default=1.0)


def _at(layers: list[int], ratios: list[float], shrink: float, n_layers: int) -> Schedule:
    return scaled_to_depth([int(layer * shrink) for layer in layers], [max(r, 1e-6) for r in ratios], n_layers)


def _released(knob: float, shrink: float, n_layers: int) -> Schedule:
    layers, ratios = RELEASED_LISTS["ate"]
    return _at(list(layers), [ratio ** ((1 - knob) / knob) for ratio in ratios], shrink, n_layers)


def _decaying(rate: float, end_share: float, n_layers: int) -> Schedule:
    return gates_on_curve(Decay(rate, end_share, n_layers).curve(), _GATES)


def _planned(n_layers: int, target: float, fitted: Fitted) -> list[tuple[str, Schedule]]:
    """The gates with the least sum of divergences within the target, without a withdrawal and with the best one."""
    found: dict[bool, tuple[float, Schedule]] = {}
    for withdraw in (None, *range(1, n_layers)):
        rows = [k for k, layer in enumerate(fitted.layers) if withdraw is None or layer < withdraw]
        try:
            one = place_gates(
                fitted.gaps[rows],
                [fitted.layers[k] for k in rows],
                fitted.ratios,
                fitted.cost,
                target,
                n_layers,
                max_gates=MAX_GATES,
                withdraw_layer=withdraw,
            )
        except CalibrationError:  # not within the target
            continue
        divergence = one.divergence + (0.0 if withdraw is None else float(fitted.withdrawal[withdraw]))
        best = found.get(withdraw is not None, (np.inf, Schedule()))
        if divergence < best[0]:
            found[withdraw is not None] = divergence, one.schedule
    return [("planned, with a withdrawal" if late else "planned", schedule) for late, (_, schedule) in found.items()]
