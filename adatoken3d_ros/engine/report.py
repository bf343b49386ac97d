# SPDX-License-Identifier: Apache-2.0
"""What is told of the tokens of one question."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.decoder.prefill import GateTrace
from adatoken3d_ros.engine.answer import TokenReport
from adatoken3d_ros.lmm.interface import Spliced
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.view import DecoderSize, Policy
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens


def token_report(decoder: DecoderSize, tokens: SpatialTokens, trace: GateTrace, spliced: Spliced) -> TokenReport:
    """What became of the tokens of a question, by the trace of its prefill through a language model."""
    n_text = spliced.n_tokens - spliced.n_spatial
    contribution = trace.contribution.float().cpu().numpy()
    return TokenReport(
        xyz=tokens.xyz.float().cpu().numpy(),
        rgb=tokens.rgb.cpu().numpy(),
        contribution=contribution,
        last_layer=trace.last_layer.cpu().numpy(),
        retained=trace.retained.cpu().numpy(),
        spatial_per_layer=trace.spatial_per_layer,
        flops_per_layer=tuple(flops.layer_flops(decoder, n + n_text) for n in trace.spatial_per_layer),
        lorenz_share_60=lorenz_share(contribution, 0.6),
    )


def prefill_flops(decoder: DecoderSize, policy: Policy, spatial_per_layer: Sequence[int], spliced: Spliced) -> float:
    """Operations of a prefill whose layers saw so many spatial tokens, scoring included."""
    n_text = spliced.n_tokens - spliced.n_spatial
    sizes = (decoder, spliced.n_spatial, spatial_per_layer, n_text, spliced.n_question)
    return flops.prefill_flops(decoder, spatial_per_layer, n_text) + flops.scoring_flops(policy, *sizes)


def lorenz_share(contribution: NDArray[np.float32], q: float) -> float:
    """Share of the total held by the least contributing `q` of the tokens; NaN if nothing was measured."""
    total = float(contribution.sum())
    if not total > 0:
        return math.nan
    smallest = np.sort(contribution.astype(np.float64))[: math.floor(q * len(contribution))]
    return float(smallest.sum() / total)
