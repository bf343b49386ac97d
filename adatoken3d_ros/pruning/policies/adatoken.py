# SPDX-License-Identifier: Apache-2.0
"""`adatoken`: AdaToken-3D as its paper means it and its code does not run (arXiv 2505.12782)."""

from __future__ import annotations

from dataclasses import dataclass

from adatoken3d_ros.pruning.decay import Decay, gates_on_curve
from adatoken3d_ros.pruning.policies.fastv import FastV
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one

# B (L - 1) of the decay that saves 63 % of the exact prefill of LLaVA-3D-7B with end share 0.10 and ten gates.
CLAIMED_FALL = 3.6


@dataclass(frozen=True)
class AdaToken(FastV):
    """Ranked by the attention of the last question row, read off cached keys; many gates that follow an exponential
    decay of the kept share down to `end_share` at the last layer; positions kept.

    A model's own decay is fitted to what its layers contribute (`decay.adatoken_schedule`); without a fit it falls as
    fast as the paper's claim of 63 % fewer operations asks at 7B.

    Attributes:
        end_share: share of the spatial tokens left at the last layer, the method's single knob.
        max_gates: most gates of the default schedule; ten, as in the release's longest list.
    """

    name: str = "adatoken"
    end_share: float = 0.10
    max_gates: int = 10
    kept = staticmethod(at_least_one)

    def default_schedule(self, n_layers: int) -> Schedule:
        if n_layers < 2:
            return Schedule()
        return gates_on_curve(Decay(CLAIMED_FALL / (n_layers - 1), self.end_share, n_layers).curve(), self.max_gates)
