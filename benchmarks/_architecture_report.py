# SPDX-License-Identifier: Apache-2.0
"""What the comparison of architectures says: table, goals, picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from adatoken3d_ros.lab.information import min_max
from benchmarks._pages import put

GOAL_HIT, GOAL_TOKENS, GOAL_PARITY = 0.9, 1000, 1e-4
TITLES = {"llava3d": "LLaVA-3D", "video3d": "Video-3D LLM", "qwen3vl": "Qwen3-VL"}
_HEADINGS = (
    *("model", "tokens", "parity", "way", "GFLOP", "saved", "prefill ms", "speed-up", "hit", "KL, nats"),
    "right answers (difference in points, 95 %)",
)
_MINED = (
    ("intra", "information: attention within the scene", "#4c72b0"),
    ("inter", "information: attention of scene and text", "#55a868"),
)
_KEPT = (("63", "#dd8452"), ("80", "#8c1d40"))


def forms(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The architectures' figures."""
    return {name: result[name] for name in TITLES if name in result}


def goals(result: Mapping[str, Any]) -> dict[str, bool]:
    """What is held: parity, and that fewer operations are less time."""
    found = {}
    for name, one in forms(result).items():
        found[f"{name}: logits as an independent way gives them, to {GOAL_PARITY:g}"] = one["parity"] <= GOAL_PARITY
        n = one["random"]["spatial_tokens"]
        for saved in ("63", "80"):
            words = f"{name}: {GOAL_HIT:.0%} of the predicted speed-up at -{saved} % and {n:,} tokens"
            found[words] = one[f"hit_{saved}"] >= GOAL_HIT and n >= GOAL_TOKENS
    return found


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Three for each model: unpruned, and `ours` at each share; cells as _HEADINGS."""
    found = []
    for name, form in forms(result).items():
        for kind in ("random", "trained"):
            if (one := form[kind]) is None:
                continue
            right = one.get("accuracy")
            about = f"{name}, {kind}", f"{one['spatial_tokens']:,} + {one['other_tokens']}", f"{one['parity']:.1e}"
            found.append(
                [
                    *(*about, "unpruned", f"{one['flops']['none'] / 1e9:.1f}", "", f"{one['prefill_ms']['none']:.0f}"),
                    *("", "", "", "" if right is None else f"{right['macro']['none']:.3f}"),
                ]
            )
            for saved, _ in _KEPT:
                found.append(
                    [
                        *("", "", "", f"-{saved} %", f"{one['flops'][saved] / 1e9:.1f}"),
                        *(f"{one['flops_saved'][saved]:.1%}", f"{one['prefill_ms'][saved]:.0f}"),
                        *(f"{one['speedup'][saved]:.2f}", f"{one['hit'][saved]:.0%}", f"{one['kl'][saved]:.2g}"),
                        "" if right is None else _accuracy(right, saved),
                    ]
                )
    return found


def _accuracy(right: Mapping[str, Any], saved: str) -> str:
    gap, (low, high) = right["difference"][saved], right["difference_interval"][saved]
    return f"{right['macro'][saved]:.3f} ({100 * gap:+.1f}, {100 * low:+.1f} to {100 * high:+.1f})"


def table(result: Mapping[str, Any]) -> Table:
    """For a terminal."""
    shown = Table(title="One fitter, three architectures: unpruned, and `ours` fitted at -63 % and -80 %")
    for heading in _HEADINGS:
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    cells = rows(result)
    for one, after in zip(cells, [*cells[1:], ["end"]], strict=True):
        shown.add_row(*one, end_section=bool(after[0]))
    return shown


def write_docs(result: Mapping[str, Any], page: Path) -> None:
    """Puts the figures between the page's marks, in place of those that are there.

    Raises:
        ValueError: for a page without the marks.
    """
    put(page, "architectures", f"{markdown(result)}\n")


def markdown(result: Mapping[str, Any]) -> str:
    """The table and what became of the goals."""
    cells = [list(_HEADINGS), ["---"] * len(_HEADINGS), *rows(result)]
    lines = ["| " + " | ".join(one) + " |" for one in cells]
    missed = [goal for goal, met in goals(result).items() if not met]
    words = "all met" if not missed else "missed: " + "; ".join(missed)
    goal = (
        f"Goals (parity at most {GOAL_PARITY:g}; with random weights and at least {GOAL_TOKENS:,} spatial tokens a hit "
        f"of at least {GOAL_HIT:.0%}): {words}."
    )
    setting = result["setting"]
    asked = " and ".join(
        f"{one['accuracy']['questions']} ({name})"
        for name, form in forms(result).items()
        if (one := form["trained"]) is not None
    )
    told = (
        f"Measured on {setting['threads']} threads of {setting['processor']}, torch {setting['torch']}, float32; right "
        f"answers are those to {asked} questions about {setting['rooms']} new rooms. {goal}"
    )
    return "\n".join(["", *lines, "", *textwrap.wrap(told, 120, break_on_hyphens=False), ""])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The curves of the architectures side by side, PNG: of trained weights where there are some."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [
        (TITLES[name], kind, form[kind])
        for name, form in forms(result).items()
        for kind in ("trained" if form["trained"] is not None else "random",)
    ]
    figure = Figure(figsize=(5.2 * len(columns), 10.4))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.08)
    panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    for (title, kind, one), top, bottom in zip(columns, *panels, strict=True):
        n_layers = len(one["contribution"])
        layers = np.arange(n_layers)
        for key, label, colour in _MINED:
            top.plot(layers, min_max(np.array(one[key])), color=colour, linestyle="--", label=label)
        top.plot(layers, one["contribution"], color="black", linewidth=2.4, marker="o", label="contribution of a layer")
        top.plot(layers, one["decay"], color="#c44e52", linewidth=2.4, label="decay that AdaToken-3D supposes, fitted")
        for saved, colour in _KEPT:
            kept = np.array(one["kept"][saved])
            label = f"gates for {saved} % fewer operations"
            edges = np.arange(n_layers + 1) - 0.5
            bottom.stairs(kept, edges, color=colour, linewidth=2.6, label=label, baseline=None)
            gates = np.flatnonzero(np.diff(np.concatenate([[1.0], kept])))
            bottom.plot(gates - 0.5, kept[gates], "v", color=colour, markersize=10)
        weights = f"trained weights ({one['model']['name']})" if kind == "trained" else "RANDOM weights"
        tokens = f"{one['spatial_tokens']:,} spatial tokens"
        top.set_title(f"{title}: {weights}\n{n_layers} layers, {tokens}\n{_fit(one)}", fontsize=12)
        bottom.set_title(_costs(one, kind), fontsize=11)
        for axis in (top, bottom):
            axis.set_xlim(-0.9, n_layers - 0.4)
            axis.set_ylim(-0.04, 1.06)
            axis.set_xticks(layers[:: max(1, n_layers // 12)])
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=11, labelbottom=True)
            if kind == "random":
                axis.set_facecolor("#eeeeee")
        bottom.set_xlabel("decoder layer", fontsize=12)
    panels[0, 0].set_ylabel("mined, each curve scaled to 0..1", fontsize=12)
    panels[1, 0].set_ylabel("share of spatial tokens in a layer", fontsize=12)
    handles, labels = (a + b for a, b in zip(*(p.get_legend_handles_labels() for p in panels[:, 0]), strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=12, frameon=False)
    figure.suptitle(
        "One fitter, three architectures: what attention tells of each layer, and the gates planned from it\n"
        "(grey: random weights, which show that the fitter runs and nothing about the architecture)",
        fontsize=15,
    )
    figure.savefig(path, dpi=100)


def _fit(one: Mapping[str, Any]) -> str:
    """Whether the contributions decay as the paper supposes."""
    correlation = one["decay_correlation"]
    return f"the decay {'fits' if correlation > 0.5 else 'does not fit'} (correlation {correlation:+.2f})"


def _costs(one: Mapping[str, Any], kind: str) -> str:
    """What the two schedules do to the answers."""
    moved = " and ".join(f"{one['kl'][saved]:.2g}" for saved, _ in _KEPT)
    lines = [f"the answer's distribution moves by {moved} nats"]
    if kind == "trained" and (right := one.get("accuracy")):
        macro = right["macro"]
        lines.append(f"right answers: {macro['none']:.2f} unpruned, {macro['63']:.2f} and {macro['80']:.2f}")
    return "\n".join(lines)
