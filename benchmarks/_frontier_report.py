# SPDX-License-Identifier: Apache-2.0
"""What the frontier's figures say: goals, table, picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

GOAL_63, GOAL_80 = 0.37, 0.2
_NEARLY = 0.005  # of the operations: schedules are made for the mean prompt
LEAST_RATIO, LEAST_RATIO_LOW = 0.995, 0.98
LEAST_FAMILY, LEAST_FAMILY_LOW = 0.97, 0.93
LEAST_SPEED = 2.5
LEAST_AT_TOKENS = {128: 0.97, 64: 0.92}
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
    "cdpruner": "#393b79",
    "visionzip": "#637939",
    "holov": "#843c39",
    "sparsevlm": "#e6550d",
    "evs": "#7b4173",
    "framefusion": "#3182bd",
    "transprune": "#31a354",
    "bypass": "#000000",
    "ours_default": "#ff9896",
    "ours_shipped": "#a50f15",
    "ours": "#d62728",
}
Points = Mapping[str, Sequence[Mapping[str, Any]]]


def goals(
    points: Points, against: Sequence[Mapping[str, Any]], at_tokens: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Whether `ours` reaches what it is meant to.

    Args:
        points: by policy. against: `ours` and each rival at the same budget: difference and its interval. at_tokens:
            `ours` by number of tokens.
    """
    ours = {point["target"]: point for point in points["ours"]}
    found: dict[str, Any] = {}
    for name, budget in (("saves_63", GOAL_63), ("saves_80", GOAL_80)):
        if (point := ours.get(budget)) is None:
            continue
        families = {family: one for family, one in point["families"].items() if one["ratio"] is not None}
        under = {family: one["ratio"] for family, one in families.items() if one["ratio"] < LEAST_FAMILY}
        unsure = {
            family: one["interval"][0]
            for family, one in families.items()
            if one["interval"] is not None and one["interval"][0] < LEAST_FAMILY_LOW
        }
        ratio, interval = point["ratio"], point["ratio_interval"]
        enough = ratio is not None and ratio >= LEAST_RATIO
        sure = interval is not None and interval[0] >= LEAST_RATIO_LOW
        found[name] = {
            "goal": f"{1 - budget:.0%} of the operations saved, at 99.5 % of unpruned (lower end: 98 %) "
            "and no family under 97 % (93 %)",
            "saved": 1 - point["flops"],
            "difference": point["difference"],
            "difference_interval": point["difference_interval"],
            "ratio": ratio,
            "interval": interval,
            "families_under": under,
            "families_unsure": unsure,
            "met": enough and sure and not under and not unsure and point["flops"] <= budget + _NEARLY,
        }
    if "time" in (point := ours.get(GOAL_80, {})):
        found["speed_80"] = {
            "goal": f"{LEAST_SPEED:g}x from the question to the end of its answer with 80 % of the operations saved",
            "speed": 1 / point["time"],
            "met": point["time"] <= 1 / LEAST_SPEED,
        }
    for count, least in LEAST_AT_TOKENS.items():
        if (point := at_tokens.get(count)) is not None:
            found[f"tokens_{count}"] = {
                "goal": f"{least:.0%} of unpruned at {count} tokens",
                "ratio": point["ratio"],
                "interval": point["ratio_interval"],
                "met": point["ratio"] is not None and point["ratio"] >= least,
            }
    level = [dict(one) for one in against if one["difference"] <= 0]
    behind = [one for one in level if one["interval"][1] < 0]
    found["ahead"] = {
        "goal": "no comparison with a rival clearly lost, at any budget",
        "comparisons": len(against),
        "not_ahead": level,
        "clearly_behind": behind,
        "clearly_ahead": sum(one["interval"][0] > 0 for one in against),
        "met": bool(against) and not behind,
    }
    tight = [one for one in against if one.get("target", 1.0) <= GOAL_80]
    if tight:
        late = [dict(one) for one in tight if one["difference"] <= 0]
        found["ahead_at_20"] = {
            "goal": "ahead of every rival at 20 % of the operations and less",
            "comparisons": len(tight),
            "not_ahead": late,
            "clearly_behind": [one for one in late if one["interval"][1] < 0],
            "clearly_ahead": sum(one["interval"][0] > 0 for one in tight),
            "met": not late,
        }
    return found


def table(result: Mapping[str, Any]) -> Table:
    """Policies down, budgets across: macro, difference with its interval, time."""
    targets = sorted({p["target"] for some in result["policies"].values() for p in some}, reverse=True)
    whole = result["unpruned"]
    shown = Table(
        title=f"Macro accuracy, its paired difference to unpruned ({whole['macro']:.3f}) in points, and time as a "
        f"share of unpruned ({_ms(whole)}), at shares of its operations",
        show_lines=True,
    )
    shown.add_column("policy")
    for target in targets:
        shown.add_column(f"{target:g}", justify="right")
    for name, some in result["policies"].items():
        by_target = {p["target"]: p for p in some}
        shown.add_row(name, *(_cell(by_target[t]) if t in by_target else "-" for t in targets))
    return shown


def token_table(result: Mapping[str, Any]) -> Table:
    """Policies down, numbers of tokens across."""
    shown = Table(title="The same where a layer sees so many tokens on average", show_lines=True)
    shown.add_column("policy")
    for count in result["tokens"]:
        shown.add_column(count, justify="right")
    for name in result["policies"]:
        cells = [some.get(name) for some in result["tokens"].values()]
        shown.add_row(name, *("-" if one is None else _cell(one) for one in cells))
    return shown


def _ms(whole: Mapping[str, Any]) -> str:
    return "not measured" if whole["ms"] is None else f"{whole['ms']:.0f} ms"


def _cell(point: Mapping[str, Any]) -> str:
    low, high = point["difference_interval"]
    spread = f"{100 * point['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{point['macro']:.3f}\n{spread}" + (f"\n{point['time']:.2f}" if "time" in point else "")


def verdict(found: Mapping[str, Any]) -> Table:
    """The goals, met or not."""
    shown = Table(title="Goals")
    for heading in ("goal", "met", "measured"):
        shown.add_column(heading)
    for one in found.values():
        shown.add_row(one["goal"], "yes" if one["met"] else "no", measured(one))
    return shown


def measured(one: Mapping[str, Any]) -> str:
    """What a goal is judged by."""
    if "comparisons" in one:
        ahead = one["comparisons"] - len(one["not_ahead"])
        return (
            f"of {one['comparisons']} comparisons ahead in {ahead}, clearly in {one['clearly_ahead']}, clearly "
            f"behind in {len(one['clearly_behind'])}; not ahead: "
            + (", ".join(f"{b['rival']} at {budget_words(b)}" for b in one["not_ahead"]) or "never")
        )
    if "speed" in one:
        return f"{one['speed']:.2f}x"
    says = "no answer right" if one["ratio"] is None else f"{one['ratio']:.1%} of unpruned"
    if one["interval"] is not None:
        says += f" ({one['interval'][0]:.1%} to {one['interval'][1]:.1%})"
    if "saved" not in one:
        return says
    under = ", ".join(f"{family} {value:.1%}" for family, value in one["families_under"].items())
    unsure = ", ".join(f"{family} {value:.1%}" for family, value in one["families_unsure"].items())
    return f"{one['saved']:.1%} saved, {says}; under 97 %: {under or 'none'}; lower end under 93 %: {unsure or 'none'}"


def budget_words(one: Mapping[str, Any]) -> str:
    """A share of the operations or a number of tokens."""
    return f"{one['target']:g}" if "target" in one else f"{one['tokens']} tokens"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy over operations and over time, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = result["unpruned"]
    shown = [("flops", "exact prefill operations, scoring included, as a share of unpruned")]
    if whole["ms"] is not None:
        shown.append(("time", "median time from question to answer, as a share of unpruned"))
    figure = Figure(figsize=(3 + 5 * len(shown), 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (key, label) in zip(panels, shown, strict=True):
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
                linestyle=":" if name == "random" else "--" if name.startswith("ours_") else "-",
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
    figure.legend(handles, labels, loc="outside lower center", ncols=2 + 2 * len(panels), fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
