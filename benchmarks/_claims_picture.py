# SPDX-License-Identifier: Apache-2.0
"""The picture of `benchmarks.claims`: what tokens contribute, and what is lost without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adatoken3d_ros.lab.information import CLAIMED_SHARE, CLAIMED_TOKENS, MEASURES

_COLOURS = ("#c44e52", "#4c72b0")
_LEAST, _MOST = f"least by {MEASURES[-1]}", f"most by {MEASURES[-1]}"
_REMOVED = {
    _LEAST: "the 60 % that\ncontribute least",
    "random": "60 %\nat random",
    _MOST: "the 60 % that\ncontribute most",
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Lorenz curves, right answers without 60 % of the tokens, and these by family of question, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    both = [one for one in (result, result.get("beside")) if one is not None]
    figure = Figure(figsize=(16, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    _curves(left, both)
    _removed(middle, both)
    _by_family(right, both)
    left.set_title("What tokens contribute")
    middle.set_title("Right answers after removing, before the first layer, ...")
    right.set_title("What that changes, by kind of question")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    figure.suptitle(
        '"Over 60 % of the spatial tokens contribute less than 5 %" (AdaToken-3D, arXiv 2505.12782), tested on '
        f"{result['questions']} questions about {result['rooms']} new rooms\n"
        "bars: 95 % intervals over rooms; bands on the left: three ways to measure what a token contributes"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _name(one: Mapping[str, Any]) -> str:
    return f"{one['model']['name']}, {one['model']['layers']} layers"


def _curves(axis: Any, both: list[Mapping[str, Any]]) -> None:
    for one, colour in zip(both, _COLOURS, strict=False):
        curves = np.array([one["contribution"][measure]["lorenz"] for measure in MEASURES])
        x = np.linspace(0, 1, curves.shape[1])
        shares = [one["contribution"][measure]["lowest_share"]["mean"] for measure in MEASURES]
        axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
        label = f"{_name(one)}: the least 60 % hold {min(shares):.0%} to {max(shares):.0%}"
        axis.plot(x, curves.mean(0), color=colour, linewidth=2, label=label)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="if all contributed alike")
    axis.axvline(CLAIMED_TOKENS, color="black", linewidth=0.8, linestyle="--")
    axis.plot(CLAIMED_TOKENS, CLAIMED_SHARE, "k*", markersize=14, label="what the sentence says")
    axis.set(xlabel="share of the spatial tokens, least contributing first", ylabel="share of the contribution")
    axis.set(xlim=(0, 1), ylim=(0, 1))


def _removed(axis: Any, both: list[Mapping[str, Any]]) -> None:
    width = 0.8 / len(both)
    for k, (one, colour) in enumerate(zip(both, _COLOURS, strict=False)):
        removal = next(iter(one["removal"].values()))
        shown = [one["unpruned"], *(removal[name] for name in _REMOVED)]
        height = np.array([100 * bar["macro"] for bar in shown])
        spread = np.abs(100 * np.array([bar["interval"] for bar in shown]).T - height)
        at = np.arange(len(shown)) + (k - (len(both) - 1) / 2) * width
        axis.bar(at, height, width, yerr=spread, capsize=3, color=colour, alpha=0.85, label=_name(one))
        for x, value in zip(at, height, strict=True):
            axis.text(x, 2, f"{value:.0f}", ha="center", va="bottom", color="white", fontweight="bold", fontsize=9)
    axis.set_xticks(range(1 + len(_REMOVED)), ["nothing", *_REMOVED.values()], fontsize=9)
    axis.set(ylabel="right answers, %, mean over the kinds of questions", ylim=(0, 100))


def _by_family(axis: Any, both: list[Mapping[str, Any]]) -> None:
    first = next(iter(both[0]["removal"].values()))
    names = list(first[_LEAST]["families"])
    looks = [(one, way) for one in both for way in (_LEAST, "random")]
    for k, (one, way) in enumerate(looks):
        families = next(iter(one["removal"].values()))[way]["families"]
        there = [n for n in names if n in families]
        at = np.array([names.index(n) for n in there]) + (k - (len(looks) - 1) / 2) * 0.19
        value = np.array([100 * families[n]["difference"] for n in there])
        spread = np.abs(100 * np.array([families[n]["interval"] for n in there]).T - value)
        colour = _COLOURS[both.index(one)]
        least = way == _LEAST
        label = f"{_name(one)}: " + ("without the 60 % that contribute least" if least else "without 60 % at random")
        filled = colour if least else "white"
        axis.errorbar(
            value, at, xerr=spread, fmt="o", markersize=4.5, color=colour, mfc=filled, elinewidth=0.9, label=label
        )
    axis.axvline(0, color="black", linewidth=1)
    asked = both[0]["asked"]
    axis.set_yticks(range(len(names)), [f"{n} ({asked[n.partition('@')[0]]})" for n in names], fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="change of the right answers, in points (in brackets: asked)")
