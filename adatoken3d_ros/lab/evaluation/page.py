# SPDX-License-Identifier: Apache-2.0
"""An evaluation as a table in the terminal and as a page that works from disk."""

from __future__ import annotations

import io
from html import escape
from typing import Any

from rich.table import Table

Result = dict[str, Any]
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#223}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .7rem;border-bottom:1px solid #dde;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#667}svg{max-width:100%;height:auto}"""


def main_metric(result: Result) -> str:
    """By which strategies are compared: exact match, a caption's CIDEr at an overlap of a half, or boxes alone."""
    metrics = next(iter(result["strategies"].values()))["metrics"]
    return next(name for name in ("EM", "CIDEr@0.5", "Acc@0.5", *metrics) if name in metrics)


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a strategy a row; its metrics, the difference of the main one, and what it cost."""
    main = main_metric(result)
    metrics = list(dict.fromkeys(name for one in result["strategies"].values() for name in one["metrics"]))
    heads = ["strategy", *metrics, f"{main} to the first", "FLOPs saved", "tokens kept", "prefill ms"]
    cells: list[list[str]] = []
    for name, one in result["strategies"].items():
        row = [name, *(f"{one['metrics'][m]['value']:.1f}" if m in one["metrics"] else "" for m in metrics)]
        low, high = one["metrics"][main]["difference_interval"]
        row.append(f"{one['metrics'][main]['difference']:+.1f} ({low:+.1f} to {high:+.1f})" if cells else "")
        if "saved" in one:
            kept = one["retained_tokens"] / max(1.0, one["spatial_tokens"])
            row += [f"{one['saved']:.1%}", f"{kept:.0%}", f"{one['prefill_ms']:.1f}"]
        else:
            row += ["", "", ""]
        cells.append(row)
    return heads, cells


def table(result: Result) -> Table:
    """For the terminal: a strategy a column."""
    heads, cells = rows(result)
    shown = Table(title=f"{result['set']} ({result['form']}), percent", title_justify="left")
    shown.add_column(no_wrap=True)
    for row in cells:
        shown.add_column(row[0], justify="right")
    for index, head in enumerate(heads[1:], start=1):
        shown.add_row(head, *(row[index] for row in cells))
    return shown


def page(result: Result) -> str:
    """One HTML page with nothing outside it: the tables, the picture, what was asked and the command."""
    heads, cells = rows(result)
    parts = [_table(heads, cells), f"<p>{_picture(result)}</p>", "<h2>Intervals</h2>", _table(*_intervals(result))]
    if any(one["kinds"] for one in result["strategies"].values()):
        parts += ["<h2>By kind of question</h2>", _table(*_kinds(result))]
    facts = {
        "model": result["model"], "questions": f"{result['questions']} about {result['scenes']} scenes",
        "asked as": result["prompt"], "words parted by": result["tokenizer"], "METEOR": result["meteor"],
        "settings": ", ".join(f"{key} {value}" for key, value in result["settings"].items()),
        "answers": "; ".join(
            f"{name}: " + ", ".join(f"{count} {status}" for status, count in one["statuses"].items())
            for name, one in result["strategies"].items()
        ),
        "command": result["command"], "version": result["version"],
    }  # fmt: skip
    parts += ["<h2>How</h2>", _table(["", ""], [[key, str(value)] for key, value in facts.items()])]
    title = escape(f"{result['set']}: {result['model']}")
    note = "Percent. In brackets: where 95 % of 2000 draws of the scenes are, the same draws for every strategy."
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p><small>{note}</small></p>{''.join(parts)}</html>\n"
    )


def _intervals(result: Result) -> tuple[list[str], list[list[str]]]:
    metrics = list(next(iter(result["strategies"].values()))["metrics"])
    cells = [[name, *(_between(one["metrics"][m]) for m in metrics)] for name, one in result["strategies"].items()]
    return ["strategy", *metrics], cells


def _between(metric: dict[str, Any]) -> str:
    if "interval" not in metric:
        return f"{metric['value']:.1f}"
    low, high = metric["interval"]
    return f"{metric['value']:.1f} ({low:.1f} to {high:.1f})"


def _kinds(result: Result) -> tuple[list[str], list[list[str]]]:
    kinds = list(next(iter(result["strategies"].values()))["kinds"].items())
    heads = ["strategy", *(f"{kind} ({one['questions']})" for kind, one in kinds)]
    cells = [
        [name, *(f"{one['kinds'][kind]['EM']:.1f} / {one['kinds'][kind]['EM-refined']:.1f}" for kind, _ in kinds)]
        for name, one in result["strategies"].items()
    ]
    return heads, cells


def _table(heads: list[str], cells: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(text)}" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}" for text in row) for row in cells)
    return f"<table><tr>{head}{body}</table>"


def _picture(result: Result) -> str:
    """The main metric against the operations that are left, as SVG."""
    from matplotlib.figure import Figure

    main = main_metric(result)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, one in result["strategies"].items():
        if "saved" not in one:
            continue
        metric, left = one["metrics"][main], 100 * (1 - one["saved"])
        low, high = metric["interval"]
        spread = [[max(0.0, metric["value"] - low)], [max(0.0, high - metric["value"])]]
        axes.errorbar(left, metric["value"], yerr=spread, fmt="o", capsize=3)
        axes.annotate(name, (left, metric["value"]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="operations of the prefill, percent of unpruned", ylabel=f"{main}, percent")
    axes.grid(alpha=0.3)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
