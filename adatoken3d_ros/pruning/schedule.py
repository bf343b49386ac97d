# SPDX-License-Identifier: Apache-2.0
"""How many spatial tokens each decoder layer sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

KeepCount = Callable[[float, int], int]  # (ratio, tokens at the start) -> tokens that a stage of this ratio leaves


class ScheduleError(ValueError):
    """A schedule that no model can run; the message names the offending value."""


def at_least_one(ratio: float, n_spatial: int) -> int:
    """Our count: rounded down, as a person would with the decimal ratio, and never none while there is one."""
    return min(n_spatial, max(1, math.floor(ratio * n_spatial + 1e-9)))


def truncated(ratio: float, n_spatial: int) -> int:
    """PyramidDrop's count, and so that of AdaToken-3D's release: 0.29 of 100 is 28, because the product is 28.99..."""
    return int(n_spatial * ratio)


def rounded(ratio: float, n_spatial: int) -> int:
    """DivPrune's count: to the nearest, halves to even."""
    return round(ratio * n_spatial)


def rounded_from_removed(ratio: float, n_spatial: int) -> int:
    """FastV's count: it is told the share that goes, so 0.1 of 15 is the nearest to 15 * (1 - 0.9) = 1.499...: 1."""
    return round(n_spatial * (1 - (1 - ratio)))


@dataclass(frozen=True)
class Stage:
    """From decoder layer `layer` (0-based) on, `ratio` of the original spatial tokens remain."""

    layer: int
    ratio: float

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ScheduleError(f"gate layer {self.layer} is negative")
        if not 0.0 < self.ratio <= 1.0:
            raise ScheduleError(f"keep ratio {self.ratio} at layer {self.layer} is outside (0, 1]")


@dataclass(frozen=True)
class Schedule:
    """Stages with rising layers and ratios that never rise, and an optional layer from which no spatial token is left.

    Ratios are relative to the original number of spatial tokens, as in PyramidDrop and AdaToken-3D.
    """

    stages: tuple[Stage, ...] = ()
    withdraw_layer: int | None = None

    def __post_init__(self) -> None:
        for a, b in pairwise(self.stages):
            if b.layer <= a.layer:
                raise ScheduleError(f"gate layers must rise: {b.layer} follows {a.layer}")
            if b.ratio > a.ratio:
                raise ScheduleError(f"keep ratios must not rise: {b.ratio} follows {a.ratio}")
        if self.withdraw_layer is not None and self.withdraw_layer < 0:
            raise ScheduleError(f"withdraw layer {self.withdraw_layer} is negative")

    @classmethod
    def of(cls, layers: list[int], ratios: list[float], withdraw_layer: int | None = None) -> Schedule:
        """From two lists, e.g. layers [8, 16, 24] and ratios [0.5, 0.25, 0.125]."""
        if len(layers) != len(ratios):
            raise ScheduleError(f"{len(layers)} gate layers but {len(ratios)} keep ratios")
        return cls(tuple(Stage(layer, ratio) for layer, ratio in zip(layers, ratios, strict=True)), withdraw_layer)

    def check(self, n_layers: int, first_gate: int = 0) -> None:
        """Raises ScheduleError if a gate lies past the end of a model with `n_layers` (n_layers itself: a no-op), or
        before `first_gate`, the first layer before which the model lets tokens go.
        """
        gates = [s.layer for s in self.stages if s.ratio < 1.0 or s.layer > n_layers]
        for layer in [*gates, *([] if self.withdraw_layer is None else [self.withdraw_layer])]:
            if layer > n_layers:
                raise ScheduleError(f"gate layer {layer} is outside a model of {n_layers} layers")
            if layer < first_gate:
                raise ScheduleError(f"gate layer {layer} is before layer {first_gate}, this model's first for a gate")

    def not_before(self, first_gate: int) -> Schedule:
        """With earlier gates moved to layer `first_gate`; of those that fall together the last one counts."""
        ratios = {max(first_gate, stage.layer): stage.ratio for stage in self.stages}
        withdraw = None if self.withdraw_layer is None else max(first_gate, self.withdraw_layer)
        return Schedule.of(list(ratios), list(ratios.values()), withdraw)

    def ratios(self, n_layers: int) -> tuple[float, ...]:
        """Share of the spatial tokens that each of `n_layers` layers sees, 0 where they are withdrawn."""
        self.check(n_layers)
        ratios = [1.0] * n_layers
        for stage in self.stages:
            ratios[stage.layer :] = [stage.ratio] * (n_layers - stage.layer)
        if self.withdraw_layer is not None:
            ratios[self.withdraw_layer :] = [0.0] * (n_layers - self.withdraw_layer)
        return tuple(ratios)

    def counts(self, n_spatial: int, n_layers: int, kept: KeepCount = at_least_one) -> tuple[int, ...]:
        """Spatial tokens seen by each of `n_layers` layers, of `n_spatial` at the start, as `kept` counts them."""
        return tuple(kept(ratio, n_spatial) if ratio > 0 else 0 for ratio in self.ratios(n_layers))


def in_buckets(counts: Any, n_spatial: Any, others: int, bucket: int) -> NDArray[Any]:
    """(..., L) spatial tokens of each layer, rounded up so that they and the `others` rows are a multiple of `bucket`.

    None exceeds the n_spatial (...) at the start, and none that a layer has withdrawn comes back. Counts that do not
    rise with depth do not afterwards.

    Raises:
        ScheduleError: for a bucket below 1.
    """
    if bucket < 1:
        raise ScheduleError(f"a bucket of {bucket} rows")
    counts = np.asarray(counts)
    rounded_up = -(-(counts + others) // bucket) * bucket - others
    return np.where(counts > 0, np.minimum(rounded_up, np.asarray(n_spatial)[..., None]), counts)


def scaled_to_depth(layers_of_32: list[int], ratios: list[float], n_layers: int) -> Schedule:
    """A schedule for 32 layers on `n_layers`; gates that fall together take the later ratio, none moves to layer 0."""
    stages: dict[int, float] = {}
    for layer, ratio in zip(layers_of_32, ratios, strict=True):
        stages[max(min(layer, 1), layer * n_layers // 32)] = ratio
    return Schedule.of(list(stages), list(stages.values()))


def scaled(schedule: Schedule, factor: float) -> Schedule:
    """The schedule with all keep ratios times `factor`, 1e-6 to 1, rounded to six decimals for people to read."""
    stages = tuple(Stage(stage.layer, max(1e-6, round(min(1.0, stage.ratio * factor), 6))) for stage in schedule.stages)
    return Schedule(stages, schedule.withdraw_layer)
