# SPDX-License-Identifier: Apache-2.0
"""Calibrated strategies: gates where removing tokens changes the answer least, for a given cost.

`Probe` measures how far a schedule moves the answer's logits (KL divergence on calibration prompts). `sensitivity` does
so for single gates, `withdrawal_scan` for taking all spatial tokens away, `plan` puts gates together by dynamic
programming as if their divergences added up, and `calibrate` checks the whole schedule on its real divergence and
corrects it by bisection of a factor on all ratios.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode, follow
from adatoken3d_ros.decoder.prefill import Layout, prefill
from adatoken3d_ros.pruning.flops import layer_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, Stage, scaled
from adatoken3d_ros.pruning.view import DecoderSize, Policy, SceneTokens

RATIOS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
MAX_GATES = 4
# Divergence of next-token distributions at which tokens count as no longer used: VTW's threshold for 7B models.
HORIZON_KL = 0.003

Progress = Callable[[int, int], None]
FloatArray = NDArray[np.float64]


class CalibrationError(ValueError):
    """A calibration that cannot reach what was asked for; the message names the values."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One calibration prompt: embeds (1, S, D), where its spatial tokens are, and what is known of them."""

    embeds: Tensor
    spatial_start: int
    n_spatial: int
    scene: SceneTokens | None = None

    @property
    def n_tokens(self) -> int:
        return self.embeds.shape[1]

    @property
    def n_text(self) -> int:
        return self.n_tokens - self.n_spatial


@dataclass(frozen=True, eq=False)
class _Reference:
    """The unpruned model's answer: T greedy tokens, log-probabilities (T + 1, V) from the prompt's last row on."""

    tokens: tuple[int, ...]
    log_probs: Tensor


class Probe:
    """Measures how far a schedule moves the answer of a model on calibration prompts.

    The unpruned model answers every sample greedily with up to `n_tokens` tokens; a schedule is then judged on the
    distributions at the prompt's last row and at these tokens, fed to it in place of its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        policy: Policy,
        *,
        n_tokens: int = 4,
        eos_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        if not samples:
            raise CalibrationError("no calibration prompt")
        self.decoder = decoder
        self.samples = tuple(samples)
        self._policy = policy
        self._references = []
        for index, sample in enumerate(self.samples):
            self._references.append(self._reference(sample, n_tokens, set(eos_ids)))
            _report(progress, index + 1, len(self.samples))

    @property
    def n_layers(self) -> int:
        return len(self.decoder)

    def with_policy(self, policy: Policy) -> Probe:
        """The same prompts and answers, for another way to choose tokens."""
        other = copy.copy(self)
        other._policy = policy
        return other

    def divergence(self, schedule: Schedule) -> float:
        """KL(unpruned || with the schedule) of the next token in nats, mean over tokens and then over samples."""
        return statistics.fmean(
            self._divergence(sample, reference, schedule)
            for sample, reference in zip(self.samples, self._references, strict=True)
        )

    @torch.inference_mode()
    def _reference(self, sample: Sample, n_tokens: int, eos_ids: set[int]) -> _Reference:
        filled = self._prefill(sample, Schedule())
        log_probs = [filled.logits.log_softmax(-1)]
        tokens: list[int] = []
        while len(tokens) < n_tokens and (token := int(log_probs[-1].argmax())) not in eos_ids:
            tokens.append(token)
            log_probs.append(decode(self.decoder, filled, token).log_softmax(-1))
        return _Reference(tuple(tokens), torch.stack(log_probs))

    @torch.inference_mode()
    def _divergence(self, sample: Sample, reference: _Reference, schedule: Schedule) -> float:
        filled = self._prefill(sample, schedule)
        logits = filled.logits[None]
        if reference.tokens:
            logits = torch.cat([logits, follow(self.decoder, filled, reference.tokens)])
        found = logits.log_softmax(-1)
        divergence = (reference.log_probs.exp() * (reference.log_probs - found)).double().sum(-1)
        if not divergence.isfinite().all():
            raise CalibrationError(f"the divergence of {schedule} is not finite")
        # Rounding can make the divergence of equal distributions slightly negative.
        return max(0.0, float(divergence.mean()))

    def _prefill(self, sample: Sample, schedule: Schedule) -> Any:
        layout = Layout(sample.spatial_start, sample.n_spatial, sample.n_tokens)
        return prefill(self.decoder, sample.embeds, layout, schedule, self._policy, scene=sample.scene)


@torch.inference_mode()
def massive_dims(decoder: Decoder, samples: Sequence[Sample], threshold: float = 20.0) -> tuple[int, ...]:
    """Dimensions of the hidden state in which some token stands out by `threshold` root mean squares of its row.

    Massive activations stay for most layers (arXiv 2503.03321): a dimension counts where it stands out at the input of
    at least half of the layers, for some sample. Often none does, always in a model of up to threshold^2 dimensions.
    """
    found: set[int] = set()
    for sample in samples:
        times = torch.zeros(sample.embeds.shape[-1], dtype=torch.long, device=sample.embeds.device)

        def look(module: Any, args: tuple[Tensor, ...], times: Tensor = times) -> None:
            rows = args[0][0].float()
            times += (rows.abs() > threshold * rows.square().mean(-1, keepdim=True).sqrt()).any(0)

        hooks = [layer.module.register_forward_pre_hook(look) for layer in decoder.layers]
        try:
            layout = Layout(sample.spatial_start, sample.n_spatial, sample.n_tokens)
            prefill(decoder, sample.embeds, layout, Schedule(), make_policy("none"))
        finally:
            for hook in hooks:
                hook.remove()
        found.update((times * 2 >= len(decoder)).nonzero()[:, 0].tolist())
    return tuple(sorted(found))


def sensitivity(
    probe: Probe, layers: Sequence[int], ratios: Sequence[float] = RATIOS, progress: Progress | None = None
) -> FloatArray:
    """(len(layers), len(ratios)) divergence when the only gate, at that layer, keeps that ratio."""
    found = np.zeros((len(layers), len(ratios)))
    for i, layer in enumerate(layers):
        for j, ratio in enumerate(ratios):
            found[i, j] = probe.divergence(Schedule((Stage(layer, ratio),)))
            _report(progress, i * len(ratios) + j + 1, found.size)
    return found


def withdrawal_scan(probe: Probe, progress: Progress | None = None) -> FloatArray:
    """(L + 1,) divergence when no layer from that one on sees a spatial token; 0 at L, where none is taken away."""
    found = np.zeros(probe.n_layers + 1)
    for layer in range(probe.n_layers):
        found[layer] = probe.divergence(Schedule(withdraw_layer=layer))
        _report(progress, layer + 1, probe.n_layers)
    return found


def horizon(withdrawal: FloatArray, eta: float = HORIZON_KL) -> int | None:
    """The smallest layer from which on the spatial tokens can be withdrawn with a divergence of at most eta, if any."""
    layer = int(np.argmax(withdrawal <= eta))
    return layer if layer < len(withdrawal) - 1 else None


# Cost ------------------------------------------------------------------------------------------------------------


class Cost(Protocol):
    """What a decoder layer costs, as a share of what it costs with all spatial tokens."""

    def of_layer(self, ratio: float) -> float:
        """Share of the full cost when `ratio` of the spatial tokens is left (0: withdrawn)."""


def cost_share(cost: Cost, schedule: Schedule, n_layers: int) -> float:
    """Mean over the layers: the schedule's cost as a share of the unpruned one."""
    schedule.check(n_layers)
    ratios = [1.0] * n_layers
    for stage in schedule.stages:
        ratios[stage.layer :] = [stage.ratio] * (n_layers - stage.layer)
    if schedule.withdraw_layer is not None:
        ratios[schedule.withdraw_layer :] = [0.0] * (n_layers - schedule.withdraw_layer)
    return statistics.fmean(cost.of_layer(ratio) for ratio in ratios)


class FlopsCost:
    """Exact prefill FLOPs of a layer, summed over the samples."""

    def __init__(self, decoder: DecoderSize, samples: Sequence[Sample]) -> None:
        self._decoder = decoder
        self._samples = tuple(samples)
        self._full = self._flops(1.0)

    def of_layer(self, ratio: float) -> float:
        return self._flops(ratio) / self._full

    def _flops(self, ratio: float) -> float:
        return sum(layer_flops(self._decoder, s.n_text + _kept(s, ratio)) for s in self._samples)


class LatencyCost:
    """Measured time of a decoder layer, summed over the samples; between the measured ratios by interpolation."""

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        ratios: Sequence[float] = RATIOS,
        *,
        repeats: int = 7,
        progress: Progress | None = None,
    ) -> None:
        self._ratios = np.array(sorted({0.0, 1.0, *ratios}))
        counts = [[s.n_text + _kept(s, ratio) for s in samples] for ratio in self._ratios]
        seconds = _time_layer(decoder, sorted({n for row in counts for n in row}), repeats, progress)
        # More tokens never take less time: what says otherwise is noise.
        totals = np.maximum.accumulate([sum(seconds[n] for n in row) for row in counts])
        self._shares = totals / totals[-1]

    def of_layer(self, ratio: float) -> float:
        return float(np.interp(ratio, self._ratios, self._shares))


def _kept(sample: Sample, ratio: float) -> int:
    return Schedule((Stage(0, ratio),)).counts(sample.n_spatial, 1)[0] if ratio > 0 else 0


@torch.inference_mode()
def _time_layer(decoder: Decoder, counts: Sequence[int], repeats: int, progress: Progress | None) -> dict[int, float]:
    """Median seconds of the middle decoder layer on n tokens, for each n; counts are interleaved against drift."""
    layer, weight = decoder.layers[len(decoder) // 2], decoder.language.lm_head.weight
    states = torch.randn(
        1, max(counts), weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(weight)
    cos, sin = decoder.rotary(states, torch.arange(max(counts), device=weight.device))
    times: dict[int, list[float]] = {n: [] for n in counts}
    for run in range(repeats + 1):
        for n in counts:
            _wait(weight.device)
            start = time.perf_counter()
            layer.run(states[:, :n], (cos[:, :n], sin[:, :n]))
            _wait(weight.device)
            if run > 0:  # the first run warms up
                times[n].append(time.perf_counter() - start)
        _report(progress, run + 1, repeats + 1)
    return {n: statistics.median(found) for n, found in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A schedule, the sum of its gates' divergences and its cost as a share of the unpruned model's."""

    schedule: Schedule
    divergence: float
    cost: float


def plan(
    divergences: FloatArray,
    layers: Sequence[int],
    ratios: Sequence[float],
    cost: Cost,
    limit: float,
    n_layers: int,
    *,
    max_gates: int = MAX_GATES,
    withdraw_layer: int | None = None,
) -> Plan:
    """The gates with the least sum of divergences whose cost share is at most `limit`.

    Walks through the layers; for each (gates so far, present ratio) it keeps every partial schedule that no other beats
    in both cost and divergence, so the result is exact. divergences (len(layers), len(ratios)) as `sensitivity` gives
    them; layers rise, ratios fall. Raises CalibrationError if no schedule is cheap enough.
    """
    _check_grid(divergences, layers, ratios, max_gates, n_layers)
    end = n_layers if withdraw_layer is None else min(withdraw_layer, n_layers)
    # Level 0 keeps everything, level j keeps ratios[j - 1].
    level_cost = [cost.of_layer(ratio) for ratio in (1.0, *ratios)]
    budget = limit * n_layers - (n_layers - end) * cost.of_layer(0.0)
    row_of = {layer: row for row, layer in enumerate(layers)}
    fronts = {(0, 0): _Front(np.zeros(1), np.zeros(1), np.zeros((1, max_gates, 2), dtype=np.int64))}
    for layer in range(end):
        parts = {state: [front] for state, front in fronts.items()}
        for (gates, level), front in fronts.items():
            if layer in row_of and gates < max_gates:
                for lower in range(level + 1, len(level_cost)):
                    gated = front.with_gate(gates, layer, lower, divergences[row_of[layer], lower - 1])
                    parts.setdefault((gates + 1, lower), []).append(gated)
        most = budget - (end - layer - 1) * min(level_cost)
        grown = {state: _Front.best(some).after_layer(level_cost[state[1]], most) for state, some in parts.items()}
        fronts = {state: front for state, front in grown.items() if len(front.cost)}
    if not fronts or budget < -_ROUNDING:
        raise CalibrationError(_unreachable(limit, _cheapest(layers, ratios, withdraw_layer), cost, n_layers))
    # Rising order of gates, then ratios: of equally good schedules the simplest is taken.
    gates, front = min(((state[0], fronts[state]) for state in sorted(fronts)), key=lambda one: one[1].divergence.min())
    best = int(front.divergence.argmin())
    stages = tuple(Stage(int(layer), float(ratios[level - 1])) for layer, level in front.gates[best, :gates])
    schedule = Schedule(stages, withdraw_layer)
    return Plan(schedule, float(front.divergence[best]), cost_share(cost, schedule, n_layers))


_ROUNDING = 1e-9


def _cheapest(layers: Sequence[int], ratios: Sequence[float], withdraw_layer: int | None) -> Schedule:
    return Schedule(tuple(Stage(layer, ratios[-1]) for layer in layers[:1]), withdraw_layer)


def _unreachable(limit: float, cheapest: Schedule, cost: Cost, n_layers: int) -> str:
    least = cost_share(cost, cheapest, n_layers)
    return (
        f"a cost of at most {limit:.3f} of the unpruned one cannot be reached: the least is {least:.3f}, by {cheapest}"
    )


@dataclass(frozen=True, eq=False)
class _Front:
    """n partial schedules: cost (n,), divergence (n,), and the (layer, level) of each gate (n, max_gates, 2)."""

    cost: FloatArray
    divergence: FloatArray
    gates: NDArray[np.int64]

    @classmethod
    def best(cls, parts: list[_Front]) -> _Front:
        """Those that no other equals or beats in both cost and divergence; of equal ones the first."""
        cost, divergence, gates = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("cost", "divergence", "gates")
        )
        order = np.lexsort((divergence, cost))
        least_before = np.concatenate([[np.inf], np.minimum.accumulate(divergence[order])[:-1]])
        keep = order[divergence[order] < least_before]
        return cls(cost[keep], divergence[keep], gates[keep])

    def with_gate(self, index: int, layer: int, level: int, divergence: float) -> _Front:
        gates = self.gates.copy()
        gates[:, index] = layer, level
        return _Front(self.cost, self.divergence + divergence, gates)

    def after_layer(self, layer_cost: float, most: float) -> _Front:
        cost = self.cost + layer_cost
        keep = cost <= most + _ROUNDING
        return _Front(cost[keep], self.divergence[keep], self.gates[keep])


def _check_grid(
    divergences: FloatArray, layers: Sequence[int], ratios: Sequence[float], max_gates: int, n_layers: int
) -> None:
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


# Correction ------------------------------------------------------------------------------------------------------


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
        sensitivity: (len(layers), len(ratios)).
        withdrawal: (L + 1,), or None if it was not asked for.
    """

    schedule: Schedule
    planned: Plan
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
        return self.cost <= self.limit + _ROUNDING


def calibrate(
    probe: Probe,
    cost: Cost,
    limit: float,
    *,
    max_gates: int = MAX_GATES,
    layers: Sequence[int] | None = None,
    ratios: Sequence[float] = RATIOS,
    withdraw: bool = False,
    eta: float = HORIZON_KL,
    max_divergence: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """The schedule with a cost share of at most `limit` that moves the answers least.

    The ratios planned on the grid are first scaled up until the limit is used up (more tokens never hurt), then, if
    the measured divergence is above `max_divergence`, scaled up further until it is not, whatever that costs; a
    withdrawal that alone is too much is given up. `layers`: where gates may be (all but 0). Raises CalibrationError.
    """
    n_layers = probe.n_layers
    if not 0.0 < limit < 1.0:
        raise CalibrationError(f"a cost share of {limit} is outside (0, 1)")
    if max_divergence is not None and not max_divergence > 0:
        raise CalibrationError(f"max_divergence {max_divergence} must be positive")

    def stage(name: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    layers, ratios = tuple(range(1, n_layers) if layers is None else layers), tuple(ratios)
    _check_grid(np.zeros((len(layers), len(ratios))), layers, ratios, max_gates, n_layers)
    withdrawal = withdrawal_scan(probe, stage("withdrawal")) if withdraw else None
    withdraw_layer = None if withdrawal is None else horizon(withdrawal, eta)
    if withdraw_layer is not None:
        layers = tuple(layer for layer in layers if layer < withdraw_layer)
    # Found out now, not after the long measurement.
    if cost_share(cost, cheapest := _cheapest(layers, ratios, withdraw_layer), n_layers) > limit:
        raise CalibrationError(_unreachable(limit, cheapest, cost, n_layers))
    gaps = sensitivity(probe, layers, ratios, stage("sensitivity"))
    planned = plan(gaps, layers, ratios, cost, limit, n_layers, max_gates=max_gates, withdraw_layer=withdraw_layer)
    base = planned.schedule
    highest = 1.0 / ratios[-1]
    _report(stage("check"), 0, 1)
    factor = bisect(lambda f: cost_share(cost, scaled(base, f), n_layers) <= limit, 1.0, highest, _COST_STEPS)
    divergence = probe.divergence(scaled(base, factor))
    if max_divergence is not None and divergence > max_divergence:
        if base.withdraw_layer is not None and withdrawal is not None and withdrawal[withdraw_layer] > max_divergence:
            base = Schedule(base.stages)
        factor = bisect(
            lambda f: probe.divergence(scaled(base, f)) <= max_divergence, highest, factor, _DIVERGENCE_STEPS
        )
        divergence = probe.divergence(scaled(base, factor))
    _report(stage("check"), 1, 1)
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


_COST_STEPS = 40
_DIVERGENCE_STEPS = 8


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
