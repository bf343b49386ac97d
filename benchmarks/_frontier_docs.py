# SPDX-License-Identifier: Apache-2.0
"""What a frontier's figures say, for pages: all of them for the page of figures, a sentence or two for the README."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._frontier_report import GOAL_63, GOAL_80, budget_words, measured
from benchmarks._pages import markdown_table, points, put

_WIDTH = 120
_AT = ((GOAL_63, "63 %"), (GOAL_80, "80 %"))


def write_docs(result: Mapping[str, Any], source: Path, pages: Sequence[Path]) -> None:
    """Puts the figures, whose JSON is `source`, into the pages' blocks `frontier`.

    Raises:
        ValueError: for a page without one.
    """
    for page in pages:
        put(page, "frontier", words_for(page, result), source)


def words_for(page: Path, result: Mapping[str, Any]) -> str:
    """What a page says of it."""
    return sentences(result) if page.name == "README.md" else markdown(result)


def sentences(result: Mapping[str, Any]) -> str:
    """What `ours` keeps at the budgets of the goals, and what it loses to whom: for the README."""
    ours = {point["target"]: point for point in result["policies"]["ours"]}
    kept = [
        f"{_percent(point['ratio'], point['ratio_interval'])} with {saved} fewer operations in the language model"
        + (f", in {point['time']:.0%} of the time" if "time" in point else "")
        for budget, saved in _AT
        if (point := ours.get(budget)) is not None
    ]
    if (counted := result.get("tokens_128")) is not None:
        kept.append(f"{_percent(counted['retained'], counted['interval'])} where a layer sees 128 spatial tokens")
    told = (
        f"Of the answers of the model in the package that are right, pruning keeps {'; '.join(kept)} "
        f"({_asked(result)}, intervals of 95 %). {_lost(result['goals']['ahead'])}"
    )
    return "\n" + _wrapped(told) + "\n\n"


def _percent(ratio: float | None, interval: Sequence[float] | None) -> str:
    if ratio is None:
        return "none"
    spread = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"{100 * ratio:.1f} %{spread}"


def _asked(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    return f"{setting['questions']:,} questions about {setting['rooms']} rooms"


def _lost(ahead: Mapping[str, Any]) -> str:
    behind = ahead["clearly_behind"]
    words = f"Of {ahead['comparisons']} comparisons with other ways to prune it is clearly ahead in "
    words += f"{ahead['clearly_ahead']} and clearly behind in {len(behind) or 'none'}"
    return words + (f": {_named(behind)}." if behind else ".")


def _named(some: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"`{one['rival']}` at {budget_words(one)}" for one in some)


def markdown(result: Mapping[str, Any]) -> str:
    """How it was measured, every policy, `ours` by family, and the goals."""
    setting, whole = result["setting"], result["unpruned"]
    rarest = min(setting["families"].items(), key=lambda one: (one[1], one[0]))
    low, high = whole["interval"]
    timed = (
        f" Time is that of {setting['timed_questions']} questions, {whole['ms']:.0f} ms unpruned."
        if whole["ms"] is not None
        else " No time was measured."
    )
    told = (
        f"{_asked(result)} of the split {setting['split']}, {result['model']['parameters'] / 1e6:.1f} M parameters; at "
        f"least {rarest[1]} of a family ({rarest[0]}). Unpruned: {whole['macro']:.3f} ({low:.3f} to {high:.3f}), the "
        "mean over the families that are right to the letter; boxes are apart. Cells: accuracy, and its paired "
        f"difference to unpruned in points with the 95 % interval over rooms{_cell_of_time(result)}.{timed}"
    )
    if result["skipped"]:
        told += " Left out, since this model does not offer what they need: "
        told += ", ".join(f"`{name}`" for name in result["skipped"]) + "."
    lines = ["", _wrapped(told), "", *_policies(result), "", *_families(result), ""]
    for one in result["goals"].values():
        lines.append(_bullet(f"{'met' if one['met'] else 'missed'}: {one['goal']}. Measured: {measured(one)}."))
    lines.append(_bullet(_lost(result["goals"]["ahead"])))
    if len({point["target"] for point in result["policies"]["ours"]}) > 1:
        lines += ["", "![Accuracy against operations, every policy](images/frontier.png)"]
    return "\n".join([*lines, ""])


def _cell_of_time(result: Mapping[str, Any]) -> str:
    return "; then the median time from question to answer" if result["unpruned"]["ms"] is not None else ""


def _budgets(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """(heading, points by policy) of each budget."""
    targets = sorted({p["target"] for some in result["policies"].values() for p in some}, reverse=True)
    found = [
        (f"{100 * target:g} %", {n: p for n, some in result["policies"].items() for p in some if p["target"] == target})
        for target in targets
    ]
    return found + [(f"{count} tokens", dict(some)) for count, some in result["tokens"].items() if some]


def _policies(result: Mapping[str, Any]) -> list[str]:
    budgets = _budgets(result)
    rows = [["policy", *(heading for heading, _ in budgets)]]
    for name in result["policies"]:
        cells = [_cell(some[name]) if name in some else "-" for _, some in budgets]
        rows.append([f"**`{name}`**" if name == "ours" else f"`{name}`", *cells])
    return markdown_table(rows)


def _cell(point: Mapping[str, Any]) -> str:
    low, high = map(points, point["difference_interval"])
    time = f"; {point['time']:.0%}" if "time" in point else ""
    return f"{point['macro']:.3f}, {points(point['difference'])} ({low} to {high}){time}"


def _families(result: Mapping[str, Any]) -> list[str]:
    """What `ours` keeps of each family's right answers."""
    budgets = [(heading, some["ours"]) for heading, some in _budgets(result) if "ours" in some]
    rows = [["kept by `ours`", *(heading for heading, _ in budgets)]]
    for family in result["unpruned"]["families"]:
        cells = [point["families"].get(family, {"ratio": None, "interval": None}) for _, point in budgets]
        rows.append([family, *(_percent(one["ratio"], one["interval"]) for one in cells)])
    return markdown_table(rows)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False))


def _bullet(text: str) -> str:
    return "\n".join(
        textwrap.wrap(
            text,
            _WIDTH,
            initial_indent="* ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    )
