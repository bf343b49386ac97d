# SPDX-License-Identifier: Apache-2.0
"""What the frontier's figures say: goals, table, picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

GOAL_63, GOAL_80 = 0.37, 0.2
_NEARLY = 0.005  # of the operations: schedules are made for the mean prompt
LEAST_RATIO, LEAST_FAMILY = 0.995, 0.97
COLOURS = {
    "random": "#999999",
    "coarse_voxel": "#8c564b",
    "one_per_voxel": "#c49c94",
    "fastv": "#1f77b4",
    "pyramiddrop": "#2ca02c",
    "adatoken_release": "#bcbd22",
    "adatoken_release_original": "#17becf",
    "adatoken": "#9467bd",
    "divprune": "#e377c2",
    "ours_default": "#ff9896",
    "ours": "#d62728",
}
Points = Mapping[str, Sequence[Mapping[str, Any]]]


def goals(points: Points, against: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether `ours` reaches what it is meant to.

    Args:
        points: by policy. against: `ours` and each rival at the same target: difference and its interval.
    """
    ours = {point["target"]: point for point in points["ours"]}
    found: dict[str, Any] = {}
    if (point := ours.get(GOAL_63)) is not None:
        high = point["difference_interval"][1]
        found["saves_63"] = {
            "goal": "63 % of the operations saved; the interval of the paired difference includes 0 or better",
            "saved": 1 - point["flops"],
            "difference": point["difference"],
            "interval": point["difference_interval"],
            "met": high >= 0 and point["flops"] <= GOAL_63 + _NEARLY,
        }
    if (point := ours.get(GOAL_80)) is not None:
        ratios = {name: one["ratio"] for name, one in point["families"].items() if one["ratio"] is not None}
        under = {name: ratio for name, ratio in ratios.items() if ratio < LEAST_FAMILY}
        found["saves_80"] = {
            "goal": "80 % of the operations saved, at 99.5 % of unpruned and no family under 97 %",
            "saved": 1 - point["flops"],
            "ratio": point["ratio"],
            "families_under": under,
            "met": (point["ratio"] or 0.0) >= LEAST_RATIO and not under and point["flops"] <= GOAL_80 + _NEARLY,
        }
    level = [dict(one) for one in against if one["difference"] <= 0]
    found["ahead"] = {
        "goal": "ahead of every rival at every budget",
        "comparisons": len(against),
        "not_ahead": level,
        "clearly_behind": [one for one in level if one["interval"][1] < 0],
        "clearly_ahead": sum(one["interval"][0] > 0 for one in against),
        "met": bool(against) and not level,
    }
    return found


def table(result: Mapping[str, Any]) -> Table:
    """Policies down, budgets across: macro, difference with its interval, time."""
    targets = sorted({p["target"] for some in result["policies"].values() for p in some}, reverse=True)
    whole = result["unpruned"]
    shown = Table(
        title=f"Macro accuracy, its paired difference to unpruned ({whole['macro']:.3f}) in points, and time as a "
        f"share of unpruned ({whole['ms']:.0f} ms), at shares of its operations",
        show_lines=True,
    )
    shown.add_column("policy")
    for target in targets:
        shown.add_column(f"{target:g}", justify="right")
    for name, some in result["policies"].items():
        by_target = {p["target"]: p for p in some}
        shown.add_row(name, *(_cell(by_target[t]) if t in by_target else "-" for t in targets))
    return shown


def _cell(point: Mapping[str, Any]) -> str:
    low, high = point["difference_interval"]
    spread = f"{100 * point['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{point['macro']:.3f}\n{spread}\n{point['time']:.2f}"


def verdict(found: Mapping[str, Any]) -> Table:
    """The goals, met or not."""
    shown = Table(title="Goals")
    for heading in ("goal", "met", "measured"):
        shown.add_column(heading)
    for name, one in found.items():
        if name == "saves_63":
            low, high = one["interval"]
            says = (
                f"{one['saved']:.1%} saved, {100 * one['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points"
            )
        elif name == "saves_80":
            ratio = "no answer right" if one["ratio"] is None else f"{one['ratio']:.1%} of unpruned"
            under = ", ".join(f"{family} {value:.1%}" for family, value in one["families_under"].items())
            says = f"{one['saved']:.1%} saved, {ratio}; under 97 %: {under or 'none'}"
        else:
            ahead = one["comparisons"] - len(one["not_ahead"])
            says = (
                f"of {one['comparisons']} comparisons ahead in {ahead}, clearly in {one['clearly_ahead']}, clearly "
                f"behind in {len(one['clearly_behind'])}; not ahead: "
                + (", ".join(f"{b['rival']} at {b['target']:g}" for b in one["not_ahead"]) or "never")
            )
        shown.add_row(one["goal"], "yes" if one["met"] else "no", says)
    return shown


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy over operations and over time, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    whole = result["unpruned"]
    panels = figure.subplots(1, 2, sharey=True)
    for axis, key, label in (
        (panels[0], "flops", "exact prefill operations, scoring included, as a share of unpruned"),
        (panels[1], "time", "median time from question to answer, as a share of unpruned"),
    ):
        axis.axhspan(*whole["interval"], color="black", alpha=0.06, linewidth=0)
        axis.axhline(whole["macro"], color="black", linewidth=1, linestyle="--")
        for name, points in result["policies"].items():
            placed = sorted(points, key=lambda p: p[key])
            ours = name == "ours"
            axis.plot(
                [p[key] for p in placed],
                [p["macro"] for p in placed],
                color=COLOURS[name],
                label=name,
                marker="o" if ours else ".",
                linewidth=2.8 if ours else 1.3,
                linestyle=":" if name == "random" else "--" if name == "ours_default" else "-",
                zorder=3 if ours else 2,
            )
            if ours and key == "flops":
                low, high = zip(*(p["interval"] for p in placed), strict=True)
                axis.fill_between([p[key] for p in placed], low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        axis.plot([1], [whole["macro"]], "k*", markersize=13, label="unpruned, 95 % interval", zorder=4)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    for saved in (GOAL_63, GOAL_80):
        panels[0].axvline(saved, color="black", linewidth=0.8, linestyle=":")
        panels[0].text(
            saved, 1.0, f"-{1 - saved:.0%}", transform=panels[0].get_xaxis_transform(), ha="center", va="bottom"
        )
    panels[0].set(ylabel="accuracy, mean over the families")
    setting = result["setting"]
    figure.suptitle(
        f"{setting['questions']} questions about {setting['rooms']} rooms of {setting['split']}, "
        f"{result['model']['name']} ({result['model']['parameters'] / 1e6:.1f} M parameters)"
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
