# SPDX-License-Identifier: Apache-2.0
"""The controls of every comparison: nothing pruned, and a random choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adatoken3d_ros.pruning.policies.ours import Ours
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection


@dataclass(frozen=True)
class Unpruned:
    """`none`: every token stays; its schedule has no gate (it may withdraw)."""

    name: str = "none"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        raise PolicyError(
            f"policy none was given a gate at layer {view.layer} that keeps {view.n_keep} of {view.n_total}"
        )

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule()

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 0.0


@dataclass(frozen=True)
class Random:
    """`random`: a seeded uniform choice, by default on the schedule of `ours`."""

    seed: int = 0
    name: str = "random"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        generator = torch.Generator().manual_seed(self.seed * 1009 + view.layer)
        keep = torch.randperm(len(view.alive), generator=generator)[: view.n_keep].sort().values
        return Selection(keep.to(view.alive.device))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Ours().default_schedule(n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 0.0
