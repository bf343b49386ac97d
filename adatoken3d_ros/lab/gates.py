# SPDX-License-Identifier: Apache-2.0
"""Where gates go: the least sum of the single gates' divergences for a given cost, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.cost import Cost, cost_share
from adatoken3d_ros.lab.probe import CalibrationError, FloatArray
from adatoken3d_ros.pruning.schedule import Schedule, Stage

MAX_GATES = 4
ROUNDING = 1e-9  # of cost shares


@dataclass(frozen=True)
class PlacedGates:
    """A schedule, the sum of its gates' divergences and its cost as a share of the unpruned model's."""

    schedule: Schedule
    divergence: float
    cost: float


def place_gates(
    divergences: FloatArray,
    layers: Sequence[int],
    ratios: Sequence[float],
    cost: Cost,
    limit: float,
    n_layers: int,
    *,
    max_gates: int = MAX_GATES,
    withdraw_layer: int | None = None,
) -> PlacedGates:
    """The gates with the least sum of divergences whose cost share is at most `limit`.

    Walks through the layers; for each (gates so far, present ratio) it keeps every partial schedule that no other beats
    in both cost and divergence, so the result is exact. divergences (len(layers), len(ratios)) as `sensitivity` gives
    them; layers rise, ratios fall. Raises CalibrationError if no schedule is cheap enough.
    """
    check_grid(divergences, layers, ratios, max_gates, n_layers)
    end = n_layers if withdraw_layer is None else min(withdraw_layer, n_layers)
    # Level 0 keeps everything, level j keeps ratios[j - 1].
    level_cost = [cost.of_layer(ratio) for ratio in (1.0, *ratios)]
    budget = limit * n_layers - (n_layers - end) * cost.of_layer(0.0)
    row_of = {layer: row for row, layer in enumerate(layers)}
    fronts = {(0, 0): Front(np.zeros(1), np.zeros(1), np.zeros((1, max_gates, 2), dtype=np.int64))}
    for layer in range(end):
        parts = {state: [front] for state, front in fronts.items()}
        for (gates, level), front in fronts.items():
            if layer in row_of and gates < max_gates:
                for lower in range(level + 1, len(level_cost)):
                    gated = front.with_gate(gates, layer, lower, divergences[row_of[layer], lower - 1])
                    parts.setdefault((gates + 1, lower), []).append(gated)
        most = budget - (end - layer - 1) * min(level_cost)
        grown = {state: Front.best(some).after_layer(level_cost[state[1]], most) for state, some in parts.items()}
        fronts = {state: front for state, front in grown.items() if len(front.cost)}
    if not fronts or budget < -ROUNDING:
        raise CalibrationError(unreachable(limit, cheapest(layers, ratios, withdraw_layer), cost, n_layers))
    # Rising order of gates, then ratios: of equally good schedules the simplest is taken.
    gates, front = min(((state[0], fronts[state]) for state in sorted(fronts)), key=lambda one: one[1].divergence.min())
    best = int(front.divergence.argmin())
    stages = tuple(Stage(int(layer), float(ratios[level - 1])) for layer, level in front.gates[best, :gates])
    schedule = Schedule(stages, withdraw_layer)
    return PlacedGates(schedule, float(front.divergence[best]), cost_share(cost, schedule, n_layers))


def cheapest(layers: Sequence[int], ratios: Sequence[float], withdraw_layer: int | None) -> Schedule:
    """The strongest gate as early as one may be."""
    return Schedule(tuple(Stage(layer, ratios[-1]) for layer in layers[:1]), withdraw_layer)


def unreachable(limit: float, cheapest: Schedule, cost: Cost, n_layers: int) -> str:
    """What is wrong with a limit that no schedule keeps."""
    least = cost_share(cost, cheapest, n_layers)
    return (
        f"a cost of at most {limit:.3f} of the unpruned one cannot be reached: the least is {least:.3f}, by {cheapest}"
    )


@dataclass(frozen=True, eq=False)
class Front:
    """n partial schedules: cost (n,), divergence (n,), and the (layer, level) of each gate (n, max_gates, 2)."""

    cost: FloatArray
    divergence: FloatArray
    gates: NDArray[np.int64]

    @classmethod
    def best(cls, parts: list[Front]) -> Front:
        """Those that no other equals or beats in both cost and divergence; of equal ones the first."""
        cost, divergence, gates = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("cost", "divergence", "gates")
        )
        order = np.lexsort((divergence, cost))
        least_before = np.concatenate([[np.inf], np.minimum.accumulate(divergence[order])[:-1]])
        keep = order[divergence[order] < least_before]
        return cls(cost[keep], divergence[keep], gates[keep])

    def with_gate(self, index: int, layer: int, level: int, divergence: float) -> Front:
        gates = self.gates.copy()
        gates[:, index] = layer, level
        return Front(self.cost, self.divergence + divergence, gates)

    def after_layer(self, layer_cost: float, most: float) -> Front:
        cost = self.cost + layer_cost
        keep = cost <= most + ROUNDING
        return Front(cost[keep], self.divergence[keep], self.gates[keep])


def check_grid(
    divergences: FloatArray, layers: Sequence[int], ratios: Sequence[float], max_gates: int, n_layers: int
) -> None:
    """Raises CalibrationError for what `place_gates` cannot read."""
    if divergences.shape != (len(layers), len(ratios)) or not ratios:
        raise CalibrationError(f"{divergences.shape} divergences for {len(layers)} layers and {len(ratios)} ratios")
    if not (np.isfinite(divergences).all() and (divergences >= 0).all()):
        raise CalibrationError("divergences must be finite and at least 0")
    if list(layers) != sorted(set(layers)) or any(not 0 <= layer < n_layers for layer in layers):
        raise CalibrationError(f"gate layers {list(layers)} must rise within a model of {n_layers} layers")
    if list(ratios) != sorted(set(ratios), reverse=True) or not 0.0 < ratios[-1] <= ratios[0] < 1.0:
        raise CalibrationError(f"keep ratios {list(ratios)} must fall within (0, 1)")
    if not 1 <= max_gates <= MAX_GATES:
        raise CalibrationError(f"{max_gates} gates: between 1 and {MAX_GATES} are possible")
