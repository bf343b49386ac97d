# SPDX-License-Identifier: Apache-2.0
"""How far a schedule moves the answers: `Probe` compares the logits with those of the unpruned model.

`sensitivity` asks it for single gates, `withdrawal_scan` for taking all spatial tokens away from a layer on.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode, follow
from adatoken3d_ros.decoder.prefill import Layout, prefill
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, Stage
from adatoken3d_ros.pruning.view import Policy, SceneTokens

RATIOS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
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
    layout: Layout
    scene: SceneTokens | None = None

    @property
    def spatial_start(self) -> int:
        return self.layout.spatial_start

    @property
    def n_spatial(self) -> int:
        return self.layout.n_spatial

    @property
    def n_tokens(self) -> int:
        return self.layout.n_tokens

    @property
    def n_text(self) -> int:
        return self.n_tokens - self.n_spatial


@dataclass(frozen=True, eq=False)
class Reference:
    """The unpruned model's answer: T greedy tokens, log-probabilities (T + 1, V) from the prompt's last row on."""

    tokens: tuple[int, ...]
    log_probs: Tensor


class Probe:
    """Measures how far a schedule moves the answer of a model on calibration prompts.

    The unpruned model answers every sample greedily with up to `n_tokens` tokens; a schedule is then judged on the
    distributions at the prompt's last row and at these tokens, fed to it in place of its own. `references`: those
    answers, where they are known.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[Sample],
        policy: Policy,
        *,
        n_tokens: int = 4,
        eos_ids: Sequence[int] = (),
        references: Sequence[Reference] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not samples:
            raise CalibrationError("no calibration prompt")
        self.decoder = decoder
        self.samples = tuple(samples)
        self._policy = policy
        if references is not None:
            self.references = list(references)
            return
        self.references = []
        for index, sample in enumerate(self.samples):
            self.references.append(self._reference(sample, n_tokens, set(eos_ids)))
            report(progress, index + 1, len(self.samples))

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
            for sample, reference in zip(self.samples, self.references, strict=True)
        )

    def divergences(self, schedules: Sequence[Schedule]) -> Iterator[float]:
        """That of each, in turn."""
        return map(self.divergence, schedules)

    @torch.inference_mode()
    def _reference(self, sample: Sample, n_tokens: int, eos_ids: set[int]) -> Reference:
        filled = self._prefill(sample, Schedule())
        log_probs = [filled.logits.log_softmax(-1)]
        tokens: list[int] = []
        while len(tokens) < n_tokens and (token := int(log_probs[-1].argmax())) not in eos_ids:
            tokens.append(token)
            log_probs.append(decode(self.decoder, filled, token).log_softmax(-1))
        return Reference(tuple(tokens), torch.stack(log_probs))

    @torch.inference_mode()
    def _divergence(self, sample: Sample, reference: Reference, schedule: Schedule) -> float:
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
        return prefill(self.decoder, sample.embeds, sample.layout, schedule, self._policy, scene=sample.scene)


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
            prefill(decoder, sample.embeds, sample.layout, Schedule(), make_policy("none"))
        finally:
            for hook in hooks:
                hook.remove()
        found.update((times * 2 >= len(decoder)).nonzero()[:, 0].tolist())
    return tuple(sorted(found))


def sensitivity(
    probe: Probe, layers: Sequence[int], ratios: Sequence[float] = RATIOS, progress: Progress | None = None
) -> FloatArray:
    """(len(layers), len(ratios)) divergence when the only gate, at that layer, keeps that ratio."""
    gates = [Schedule((Stage(layer, ratio),)) for layer in layers for ratio in ratios]
    return _all(probe, gates, progress).reshape(len(layers), len(ratios))


def withdrawal_scan(probe: Probe, progress: Progress | None = None) -> FloatArray:
    """(L + 1,) divergence when no layer from that one on sees a spatial token; 0 at L, where none is taken away."""
    ends = [Schedule(withdraw_layer=layer) for layer in range(probe.n_layers)]
    return np.append(_all(probe, ends, progress), 0.0)


def _all(probe: Probe, schedules: Sequence[Schedule], progress: Progress | None) -> FloatArray:
    found = np.zeros(len(schedules))
    for index, value in enumerate(probe.divergences(schedules)):
        found[index] = value
        report(progress, index + 1, len(schedules))
    return found


def horizon(withdrawal: FloatArray, eta: float = HORIZON_KL) -> int | None:
    """The smallest layer from which on the spatial tokens can be withdrawn with a divergence of at most eta, if any."""
    layer = int(np.argmax(withdrawal <= eta))
    return layer if layer < len(withdrawal) - 1 else None


def report(progress: Progress | None, done: int, total: int) -> None:
    """Calls `progress`, if there is one."""
    if progress is not None:
        progress(done, total)
