# SPDX-License-Identifier: Apache-2.0
"""A picture of what was mined: contribution by layer, and how unequal the spatial tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adatoken3d_ros.lab.information import CLAIMED_SHARE, CLAIMED_TOKENS, MEASURES, FloatArray, InformationSet, min_max


def draw(
    information: InformationSet,
    path: Path | str,
    *,
    curve: FloatArray | None = None,
    kept: Sequence[float] | None = None,
) -> None:
    """A picture (PNG): contribution by layer, and Lorenz curves of the three measures with the paper's claim.

    curve (L,): the fitted share of tokens per layer. kept (L,): the share that a schedule really keeps per layer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    layers = np.arange(len(information.contribution))
    for name, colour in (("intra", "#4c72b0"), ("inter", "#55a868"), ("accumulated", "#8172b3")):
        left.plot(
            layers,
            min_max(information.mean(name)),
            color=colour,
            linewidth=1,
            linestyle="--",
            label=f"{name}-modal" if name != "accumulated" else name,
        )
    left.plot(
        layers, information.contribution, color="black", linewidth=2.2, marker="o", markersize=4, label="contribution"
    )
    if curve is not None:
        left.plot(layers, curve, color="#c44e52", linewidth=2, label="fitted decay f")
    if kept is not None:
        left.step(layers, kept, where="post", color="#dd8452", linewidth=2, label="share kept by the schedule")
    left.set(
        title="Information by decoder layer (mined figures scaled to 0..1)",
        xlabel="decoder layer",
        ylabel="scaled figure, share of tokens",
        ylim=(-0.03, 1.05),
    )
    left.grid(alpha=0.3)
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="all tokens equal")
    # Curves may coincide: the broad one below stays visible.
    for measure, colour, width in zip(MEASURES, ("#4c72b0", "#55a868", "#c44e52"), (5.0, 2.0, 2.0), strict=True):
        found = information.concentration(measure)["lowest_share"].mean
        label = f"{measure} share: lowest 60 % have {found:.1%}"
        right.plot(*information.lorenz(measure), color=colour, linewidth=width, label=label)
    right.plot(CLAIMED_TOKENS, CLAIMED_SHARE, "k*", markersize=13, label="paper's claim: 60 % have less than 5 %")
    right.axhline(CLAIMED_SHARE, xmax=CLAIMED_TOKENS, color="black", linewidth=0.8, linestyle="--")
    right.axvline(CLAIMED_TOKENS, ymax=CLAIMED_SHARE, color="black", linewidth=0.8, linestyle="--")
    n_scenes = len(set(information.scenes))
    right.set(
        title=f"Contribution of spatial tokens ({len(information.prompts)} prompts, {n_scenes} scenes)",
        xlabel="share of spatial tokens, least first",
        ylabel="their share of the contribution",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    right.grid(alpha=0.3)
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(Path(path), dpi=130)
