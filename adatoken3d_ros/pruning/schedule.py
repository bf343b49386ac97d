# SPDX-License-Identifier: Apache-2.0
"""How many spatial tokens each decoder layer sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


class ScheduleError(ValueError):
    """A schedule that no model can run; the message names the offending value."""


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

    def check(self, n_layers: int) -> None:
        """Raises ScheduleError if a gate lies past the end of a model with `n_layers` (n_layers itself: a no-op)."""
        for layer in [s.layer for s in self.stages] + [self.withdraw_layer or 0]:
            if layer > n_layers:
                raise ScheduleError(f"gate layer {layer} is outside a model of {n_layers} layers")

    def counts(self, n_spatial: int, n_layers: int) -> tuple[int, ...]:
        """Spatial tokens seen by each of `n_layers` layers, of `n_spatial` at the start."""
        self.check(n_layers)
        counts = [n_spatial] * n_layers
        for stage in self.stages:
            kept = min(n_spatial, max(1, math.floor(stage.ratio * n_spatial + 1e-9)))
            counts[stage.layer :] = [kept] * (n_layers - stage.layer)
        if self.withdraw_layer is not None:
            counts[self.withdraw_layer :] = [0] * (n_layers - self.withdraw_layer)
        return tuple(counts)
