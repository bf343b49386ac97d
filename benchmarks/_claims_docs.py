# SPDX-License-Identifier: Apache-2.0
"""What the claims lab's figures say, for the page of figures: two tables, models side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adatoken3d_ros.lab.information import MEASURES
from benchmarks._pages import markdown_table, points, put

_WIDTH = 120


def write_docs(result: Mapping[str, Any], source: Path, pages: Sequence[Path]) -> None:
    """Puts the figures, whose JSON is `source`, into the pages' blocks `claims`.

    Raises:
        ValueError: for a page without one.
    """
    for page in pages:
        put(page, "claims", markdown(result), source)


def markdown(result: Mapping[str, Any]) -> str:
    """Who was asked what, what the least contributing 60 % hold, and what is lost without them."""
    models = [result, *([result["beside"]] if "beside" in result else [])]
    names = [one["model"]["name"] for one in models]
    fewest = min(n for n in result["asked"].values())
    told = (
        f"{result['questions']} questions about {result['rooms']} rooms of the split {result['split']}, at least "
        f"{fewest} of each family, asked of {' and '.join(f'`{name}`' for name in names)}; intervals of 95 % over "
        "rooms."
    )
    held = [["held by the least contributing 60 %, over all layers", *(f"`{name}`" for name in names)]]
    held += [[f"by {m}", *(_share(one["contribution"][m]["lowest_share"]) for one in models)] for m in MEASURES]
    held.append(["in single layers, any measure", *(_range(_layers(one)) for one in models)])
    held.append([f"in single families, by {MEASURES[-1]}", *(_range(_families(one)) for one in models)])
    right = [f"`{n}`: KL, nats; right ({one['unpruned']['macro']:.3f})" for n, one in zip(names, models, strict=True)]
    lost = [["removed before layer", "60 % of the tokens, which", *right]]
    for depth, where in enumerate(("0", "half of the depth")):
        of_depth = [list(one["removal"].values())[depth : depth + 1] for one in models]
        for way in of_depth[0][0] if all(of_depth) else ():
            lost.append([where, way, *(_removal(some[0][way]) for some in of_depth)])
    lines = [*textwrap.wrap(told, _WIDTH, break_on_hyphens=False), "", *markdown_table(held), "", *markdown_table(lost)]
    said = [f"* `{n}`: {one['verdict']['in_words'][0]}" for n, one in zip(names, models, strict=True)]
    return "\n".join(["", *lines, "", *said, "", ""])


def _share(value: Mapping[str, float]) -> str:
    return "{mean:.1%} ({low:.1%} to {high:.1%})".format(**value)


def _layers(one: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for measure in MEASURES:
        for layer, share in enumerate(one["contribution"][measure]["lowest_share_by_layer"]):
            found[f"layer {layer}, by {measure}"] = share["mean"]
    return found


def _families(one: Mapping[str, Any]) -> dict[str, float]:
    return {family: share["mean"] for family, share in one["contribution"][MEASURES[-1]]["families"].items()}


def _range(values: Mapping[str, float]) -> str:
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[least]:.0%} ({least}) to {values[most]:.0%} ({most})"


def _removal(one: Mapping[str, Any]) -> str:
    low, high = map(points, one["difference_interval"])
    return f"{one['kl']['mean']:.2g}; {one['macro']:.3f}, {points(one['difference'])} ({low} to {high})"
