# SPDX-License-Identifier: Apache-2.0
"""Calibrated strategies: gates where removing tokens changes the answer least, for a given cost.

`place_gates` puts gates together as if the divergences of single ones added up; `calibrate` checks the whole schedule
on its real divergence and corrects it by bisection of a factor on all ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adatoken3d_ros.lab.cost import Cost, cost_share
from adatoken3d_ros.lab.gates import MAX_GATES, ROUNDING, PlacedGates, cheapest, check_grid, place_gates, unreachable
from adatoken3d_ros.lab.probe import (
    HORIZON_KL,
    RATIOS,
    CalibrationError,
    FloatArray,
    Probe,
    Progress,
    horizon,
    report,
    sensitivity,
    withdrawal_scan,
)
from adatoken3d_ros.pruning.schedule import Schedule, scaled

_COST_STEPS = 40
DIVERGENCE_STEPS = 8


def bisect(accept: Callable[[float], bool], good: float, bad: float, steps: int) -> float:
    """The accepted value that `steps` halvings bring closest to `bad`; `good` is accepted (not asked again)."""
    if accept(bad):
        return bad
    for _ in range(steps):
        middle = 0.5 * (good + bad)
        if accept(middle):
            good = middle
        else:
            bad = middle
    return good


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated schedule and how it came about.

    Attributes:
        schedule: what to use.
        planned: what the dynamic programming proposed.
        factor: on the planned ratios.
        divergence: measured, of `schedule`.
        planned_divergence: measured, of the planned schedule.
        cost: cost share of `schedule`.
        limit: the cost share asked for; `cost` is above it where only that kept the divergence within its limit.
        sensitivity: (len(layers), len(ratios)), of single gates, measured or foreseen.
        withdrawal: (L + 1,), or None if it was not asked for.
    """

    schedule: Schedule
    planned: PlacedGates
    factor: float
    divergence: float
    planned_divergence: float
    cost: float
    limit: float
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    sensitivity: FloatArray
    withdrawal: FloatArray | None

    @property
    def within_limit(self) -> bool:
        return self.cost <= self.limit + ROUNDING


def calibrate(
    probe: Probe,
    cost: Cost,
    limit: float,
    *,
    max_gates: int = MAX_GATES,
    ratios: Sequence[float] = RATIOS,
    first: int = 1,
    foresee: Callable[[Sequence[int], Sequence[float]], FloatArray] | None = None,
    withdraw: bool = False,
    eta: float = HORIZON_KL,
    max_divergence: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """The schedule with a cost share of at most `limit` that moves the answers least.

    The ratios planned on the grid are first scaled up until the limit is used up (more tokens never hurt), then, if
    the measured divergence is above `max_divergence`, scaled up further until it is not, whatever that costs; a
    withdrawal that alone is too much is given up.

    Args:
        first: gates may be before this layer and all behind it.
        foresee: what single gates lose, (layers, ratios) -> (len(layers), len(ratios)); None: it is measured.

    Raises:
        CalibrationError: for a limit that no schedule keeps, or a value that makes no sense.
    """
    n_layers = probe.n_layers
    if not 0.0 < limit < 1.0:
        raise CalibrationError(f"a cost share of {limit} is outside (0, 1)")
    if max_divergence is not None and not max_divergence > 0:
        raise CalibrationError(f"max_divergence {max_divergence} must be positive")

    def stage(name: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    layers, ratios = tuple(range(first, n_layers)), tuple(ratios)
    check_grid(np.zeros((len(layers), len(ratios))), layers, ratios, max_gates, n_layers)
    withdrawal = withdrawal_scan(probe, stage("withdrawal")) if withdraw else None
    withdraw_layer = None if withdrawal is None else horizon(withdrawal, eta)
    if withdraw_layer is not None:
        layers = tuple(layer for layer in layers if layer < withdraw_layer)
    # Found out now, not after the long measurement.
    if cost_share(cost, smallest := cheapest(layers, ratios, withdraw_layer), n_layers) > limit:
        raise CalibrationError(unreachable(limit, smallest, cost, n_layers))
    gaps = foresee(layers, ratios) if foresee else sensitivity(probe, layers, ratios, stage("sensitivity"))
    planned = place_gates(
        gaps, layers, ratios, cost, limit, n_layers, max_gates=max_gates, withdraw_layer=withdraw_layer
    )
    base = planned.schedule
    highest = 1.0 / ratios[-1]
    report(stage("check"), 0, 1)
    factor = bisect(lambda f: cost_share(cost, scaled(base, f), n_layers) <= limit, 1.0, highest, _COST_STEPS)
    divergence = probe.divergence(scaled(base, factor))
    if max_divergence is not None and divergence > max_divergence:
        if base.withdraw_layer is not None and withdrawal is not None and withdrawal[withdraw_layer] > max_divergence:
            base = Schedule(base.stages)
        factor = bisect(
            lambda f: probe.divergence(scaled(base, f)) <= max_divergence, highest, factor, DIVERGENCE_STEPS
        )
        divergence = probe.divergence(scaled(base, factor))
    report(stage("check"), 1, 1)
    final = scaled(base, factor)
    return Calibration(
        schedule=final,
        planned=planned,
        factor=factor,
        divergence=divergence,
        planned_divergence=probe.divergence(planned.schedule),
        cost=cost_share(cost, final, n_layers),
        limit=limit,
        layers=layers,
        ratios=ratios,
        sensitivity=gaps,
        withdrawal=withdrawal,
    )
