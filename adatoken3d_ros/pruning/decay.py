# SPDX-License-Identifier: Apache-2.0
"""AdaToken-3D's schedule (arXiv 2505.12782): a decay fitted to what the layers contribute, and gates that follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from adatoken3d_ros.pruning.schedule import Schedule

FloatArray = NDArray[np.float64]


class DecayError(ValueError):
    """Contributions, an end share or a number of gates that no decay fits; the message names the value."""


@dataclass(frozen=True)
class Decay:
    """f(x) = A exp(-B (x - C)) + D over layers x = 1..L with f(1) = 1 and f(L) = end_share.

    Only B shapes the curve: C = 1 can be chosen freely (it scales A), and the two conditions give A and D.
    error: the sum of squares that the fit left.
    correlation: of the curve with the contributions; near 1 if they decay as the method expects, negative if they rise.
    """

    B: float
    end_share: float
    n_layers: int
    error: float = 0.0
    correlation: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.end_share < 1.0:
            raise DecayError(f"end share {self.end_share} is outside (0, 1)")

    @property
    def A(self) -> float:
        return (1.0 - self.end_share) / -math.expm1(-self.B * (self.n_layers - 1))

    @property
    def C(self) -> float:
        return 1.0

    @property
    def D(self) -> float:
        return 1.0 - self.A

    def curve(self) -> FloatArray:
        """(L,) share of tokens at decoder layers 0..L-1, which are x = 1..L; falls from 1 to end_share."""
        return _decay_curve(self.B, self.end_share, self.n_layers)


def _decay_curve(rate: float, end_share: float, n_layers: int) -> FloatArray:
    x = np.arange(1, n_layers + 1)
    fallen = np.expm1(-rate * (x - 1)) / np.expm1(-rate * (n_layers - 1))
    return 1.0 - (1.0 - end_share) * fallen


# B times L - 1: from a straight line to a curve that has fallen within the first layers.
_RATES = np.geomspace(1e-4, 100.0, 400)


def fit_decay(contribution: FloatArray, end_share: float = 0.10) -> Decay:
    """Fits the decay to the contributions (L,) of the layers: least squares of values and of slopes between layers.

    B is positive, so the curve always decays, fast at first; contributions that do not are fitted as well as that
    allows (those that fall late by nearly a straight line), and the error tells. Raises DecayError.
    """
    contribution = np.asarray(contribution, dtype=np.float64)
    n_layers = len(contribution)
    if contribution.ndim != 1 or n_layers < 2 or not np.isfinite(contribution).all():
        raise DecayError(f"a fit needs finite contributions of at least two layers, not {contribution!r}")
    if not 0.0 < end_share < 1.0:
        raise DecayError(f"end share {end_share} is outside (0, 1)")

    def error(log_rate: float) -> float:
        curve = _decay_curve(math.exp(log_rate) / (n_layers - 1), end_share, n_layers)
        return float(np.sum((curve - contribution) ** 2) + np.sum((np.diff(curve) - np.diff(contribution)) ** 2))

    # The error may have several valleys: the lowest grid point tells which one to descend.
    grid = np.log(_RATES)
    best = int(np.argmin([error(rate) for rate in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(error, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    decay = Decay(math.exp(found.x) / (n_layers - 1), end_share, n_layers, float(found.fun))
    return replace(decay, correlation=_correlation(decay.curve(), contribution))


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if np.ptp(b) < 1e-9:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def gates_on_curve(curve: FloatArray, n_gates: int) -> Schedule:
    """The staircase with at most n_gates steps that follows a falling curve (L,) from above with the least excess.

    A gate before layer g keeps the curve's share at g, as the method has it, so no layer sees fewer tokens than the
    curve says. Of all choices of gate layers the one with the smallest sum over layers of (staircase - curve) is
    taken, by dynamic programming; among equals the earliest gates.
    """
    n_layers = len(curve)
    if n_gates < 1:
        raise DecayError(f"{n_gates} gates: at least one is needed")
    n_gates = min(n_gates, n_layers - 1)
    # best[k][g]: least sum of the staircase over layers g.., when a gate stands at g and k more may follow.
    tails = curve * np.arange(n_layers, 0, -1)
    best, following = [tails], []
    for _ in range(n_gates - 1):
        gaps = np.arange(n_layers)[None, :] - np.arange(n_layers)[:, None]
        after = np.where(gaps > 0, gaps * curve[:, None] + best[-1][None, :], np.inf)
        choice = after.argmin(axis=1)
        # The last layer has no layer after it.
        best.append(np.append(after.min(axis=1)[:-1], tails[-1]))
        following.append(choice)
    layer = 1 + int(np.argmin(np.arange(1, n_layers) + best[-1][1:]))
    layers = [layer]
    for choice in reversed(following):
        if layer == n_layers - 1:
            break
        layer = int(choice[layer])
        layers.append(layer)
    # Where the curve is flat, a gate would remove nothing.
    by_ratio: dict[float, int] = {1.0: 0}
    for at in layers:
        by_ratio.setdefault(_rounded_up(curve[at]), at)
    del by_ratio[1.0]
    return Schedule.of(list(by_ratio.values()), list(by_ratio))


def _rounded_up(ratio: float) -> float:
    """Four decimals are plenty for a file people read; upwards, so that the staircase stays above the curve."""
    return min(1.0, math.ceil(ratio * 1e4 - 1e-6) / 1e4)


def adatoken_schedule(contribution: FloatArray, a: float = 0.10, n_gates: int = 3) -> tuple[Schedule, Decay]:
    """AdaToken-3D's strategy: the decay fitted to the layers' contributions, and the gates that follow it."""
    decay = fit_decay(contribution, a)
    return gates_on_curve(decay.curve(), n_gates), decay
