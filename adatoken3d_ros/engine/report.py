# SPDX-License-Identifier: Apache-2.0
"""What is told of the tokens of one question."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.decoder.prefill import GateTrace
from adatoken3d_ros.engine.answer import TokenReport
from adatoken3d_ros.lmm.interface import Spliced
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.view import DecoderSize, Policy
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens


def token_report(decoder: DecoderSize, tokens: SpatialTokens, trace: GateTrace) -> TokenReport:
    """What became of the tokens of a question, by the trace of its prefill through a language model."""
    contribution = trace.contribution.float().cpu().numpy()
    return TokenReport(
        xyz=tokens.xyz.float().cpu().numpy(),
        rgb=tokens.rgb.cpu().numpy(),
        contribution=contribution,
        last_layer=trace.last_layer.cpu().numpy(),
        retained=trace.retained.cpu().numpy(),
        spatial_per_layer=trace.spatial_per_layer,
        flops_per_layer=tuple(flops.layer_flops(decoder, n) for n in trace.rows_per_layer),
        lorenz_share_60=lorenz_share(contribution, 0.6),
    )


def prefill_flops(decoder: DecoderSize, policy: Policy, trace: GateTrace | None, spliced: Spliced) -> float:
    """Operations of a prefill, scoring included; without a trace of one that drops nothing."""
    n_text = spliced.n_tokens - spliced.n_spatial
    if trace is None:
        return flops.prefill_flops(decoder, [spliced.n_spatial] * decoder.n_layers, n_text)
    rows = trace.rows_per_layer
    sizes = (decoder, spliced.n_spatial, trace.spatial_per_layer, n_text, spliced.n_question, rows)
    return flops.prefill_flops(decoder, rows, 0) + flops.scoring_flops(policy, *sizes)


def lorenz_share(contribution: NDArray[np.float32], q: float) -> float:
    """Share of the total held by the least contributing `q` of the tokens; NaN if nothing was measured."""
    total = float(contribution.sum())
    if not total > 0:
        return math.nan
    smallest = np.sort(contribution.astype(np.float64))[: math.floor(q * len(contribution))]
    return float(smallest.sum() / total)
