# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d benchmark`: what this machine does with a model: each stage of an answer beside the machine's own peaks.

Needs no ROS and no camera: the scene is made up. It ends with one sentence that says how long an answer takes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from adatoken3d_ros.cli.options import add_settings, check_files, settings_of

Figures = dict[str, Any]
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#223}
table{border-collapse:collapse;margin:1rem 0;width:100%}td,th{padding:.3rem .7rem;border-bottom:1px solid #dde;
text-align:right}td:first-child,th:first-child{text-align:left}small{color:#667}svg{max-width:100%;height:auto}
.told{font-size:1.25rem;border-left:4px solid #47a;padding-left:1rem}"""


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("benchmark", help="what this machine does with a model", description=__doc__)
    add_settings(
        parser, "--model", "--vision-path", "--device", "--dtype", "--quantization", "--decoding", "--strategy"
    )
    parser.add_argument("--views", type=int, default=20, metavar="N", help="of the scene (%(default)s)")
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of each time (3, of a quick look 1)")
    parser.add_argument(
        "--quick", action="store_true", help="no latency budgets, nothing compiled: where an answer takes a minute"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (its own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for name, most in (("views", 200), ("repeats", 1000), ("threads", 1024)):
        if (value := getattr(args, name)) is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} must be between 1 and {most}, got {value}")
    check_files(args)
    if args.html is not None and (not args.html.resolve().parent.is_dir() or args.html.is_dir()):
        raise FileNotFoundError(f"--html: {args.html} cannot be written to")
    from rich.console import Console

    from adatoken3d_ros.cli.progress import step_progress

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from adatoken3d_ros.lab.speed import Effort, measure

    if args.threads:
        torch.set_num_threads(args.threads)
    with step_progress(Console(stderr=True)) as progress:
        repeats = args.repeats or (1 if args.quick else 3)
        figures = measure(settings_of(args), Effort(args.views, repeats, 8 if args.quick else 24, args.quick), progress)
    console = Console()
    for title, heads, cells in tables(figures):
        console.print(_shown(title, heads, cells))
    console.print(figures["sentence"], highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.html is not None:
        args.html.write_text(page(figures), encoding="utf-8")
    return 0


def tables(figures: Figures) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heads and cells of each table."""
    decode, peaks = figures["decode"], figures["peaks"]
    machine = [_of_machine(name, value) for name, value in figures["machine"].items() if value is not None]
    machine += [
        [f"products in {name.removesuffix('_tflops')}", f"{value:.3g} T{'OP' if 'int' in name else 'FLOP'}/s"]
        for name, value in peaks.items()
        if name.endswith("_tflops")
    ]
    machine.append(["reading memory", f"{peaks['bandwidth_gb_s']:.3g} GB/s"])
    for name, value in figures["state_after"].items():
        before = figures["state_before"].get(name, value)
        machine.append([name, value if before == value else f"{before}, afterwards {value}"])
    memory = ", ".join(f"{name} {value:.2f} GB" for name, value in figures["peak_gb"].items())
    how = figures["decoding"] + (f" ({figures['eager_because']})" if figures["eager_because"] else "")
    name, _, identity = figures["model"].partition("@")
    stages = [
        ["weights' identity", identity],
        ["load", f"{figures['load_s']:.1f} s"],
        ["weights in memory", f"{figures['weights_gb']:.2f} GB"],
        ["peak memory", memory],
        ["preparing decode steps", f"{figures['prepared_s']:.1f} s"],
        ["a view through the encoder", f"{figures['encode_ms_a_view']:.1f} ms"],
        [f"decode step, {how}", f"{decode['ms']:.2f} ms"],
        ["decoded", f"{decode['tokens_per_s']:.1f} tokens/s"],
        ["of the measured memory bandwidth", f"{decode['share_of_bandwidth']:.0%}"],
        ["a further question over the scene's kept prefix", f"{figures['follow_up_ms']:.1f} ms"],
    ]
    if kept := [row["kept"] for row in figures["budgets"]]:
        stages.append(["budgets kept", f"{sum(kept)} of {len(kept)}"])
    prefills = [
        [
            f"-{row['saved']:.0%}" if row["saved"] > 0.005 else "unpruned",
            f"{row['kept_token_layers']:.0%}",
            f"{row['ms']:.1f}",
            "" if row["mfu"] is None else f"{row['mfu']:.0%}",
            f"{row['speedup']:.2f}",
            f"{row['predicted']:.2f}",
            f"{row['gate_share']:.1%}",
            f"{row['answer_ms']:.0f}",
        ]
        for row in figures["prefill"]
    ]
    budgets = [
        [
            f"{row['budget_ms']:.0f}",
            f"{row['took_ms']:.0f}",
            "yes" if row["kept"] else "no",
            str(row["retained_tokens"]),
            row["status"],
        ]
        for row in figures["budgets"]
    ]
    asked = [
        [
            row["strategy"],
            f"{row['prefill_ms']:.0f}",
            f"{row['decode_ms']:.0f}",
            f"{row['took_ms']:.0f}",
            str(row["retained_tokens"]),
            row["status"],
        ]
        for row in figures["asked"]
    ]
    kind = f"{figures['dtype']}, {figures['quantization']}" if figures["quantization"] != "none" else figures["dtype"]
    budget = ("Latency budgets", ["budget ms", "took ms", "kept", "tokens left", "status"], budgets)
    heads = ["operations", "kept", "prefill ms", "MFU", "faster", "predicted", "gates", "answer ms"]
    return [
        ("This machine", ["", ""], machine),
        (f"{name}, {kind}", ["", ""], stages),
        (f"Prefill of {figures['prompt_rows']} rows, {figures['spatial_tokens']} of them spatial", heads, prefills),
        ("A question, asked", ["strategy", "prefill ms", "decode ms", "all ms", "tokens left", "status"], asked),
        *([budget] if budgets else []),
    ]


def _of_machine(name: str, value: Any) -> list[str]:
    said, unit = (name.removesuffix("_gb"), " GB") if name.endswith("_gb") else (name, "")
    return [said.replace("_", " "), f"{value}{unit}"]


def _shown(title: str, heads: Sequence[str], cells: list[list[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", show_header=any(heads))
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number and any(heads) else "left", overflow="fold")
    for row in cells:
        shown.add_row(*map(Text, row))
    return shown


def page(figures: Figures) -> str:
    """One HTML page with nothing outside it."""
    parts = []
    for title, heads, cells in tables(figures):
        head = "<tr>" + "".join(f"<th>{escape(text)}" for text in heads) if any(heads) else ""
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}" for text in row) for row in cells)
        parts.append(f"<h2>{escape(title)}</h2><table>{head}{body}</table>")
    title = escape(
        f"{figures['model'].partition('@')[0]} on {figures['machine'].get('gpu', figures['machine']['processor'])}"
    )
    note = (
        "Answers: a prefill and 16 tokens. Kept: of the spatial tokens, over all layers. Faster: measured, and as "
        "operations predict. MFU: operations that are needed, a second, of what a product of large matrices in "
        f"{figures['products']} reaches here. Bandwidth: weights, keys and values that a step reads, of what reading "
        "memory reaches here. A question, asked: by all of the engine, up to 16 tokens. Published figures are of other "
        "clocks."
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p class=told>{escape(figures['sentence'])}</p>{pictures(figures)}{''.join(parts)}"
        f"<p><small>{escape(note)}</small></p></html>\n"
    )


def pictures(figures: Figures) -> str:
    """An answer's parts by how much is pruned, and budgets, if there are any, against what answers took, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, *others = figure.subplots(1, 2 if figures["budgets"] else 1, squeeze=False)[0]
    from adatoken3d_ros.lab.speed import told

    rows = figures["prefill"]
    names = ["unpruned" if row["saved"] <= 0.005 else f"-{row['saved']:.0%}" for row in rows]
    size, unit = (1.0, "ms") if rows[0]["answer_ms"] < 10_000 else (1e-3, "s")
    prefill = [size * row["ms"] for row in rows]
    rest = [size * (row["answer_ms"] - row["ms"]) for row in rows]
    left.barh(names, prefill, color="#4477aa", label="prefill")
    left.barh(names, rest, left=prefill, color="#ccbb44", label="16 tokens")
    for number, row in enumerate(rows):
        left.text(size * row["answer_ms"], number, f" {told(row['answer_ms'])}", va="center", fontsize=9)
    left.set(title="An answer, by operations that are pruned", xlabel=unit, xlim=(0, 1.2 * prefill[0] + 1.2 * rest[0]))
    left.invert_yaxis()
    left.legend(fontsize=8, loc="lower right")
    for right in others:
        _draw_budgets(right, figures["budgets"])
    for axes in (left, *others):
        axes.grid(alpha=0.3)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return f"<p>{text[text.index('<svg') :]}</p>"


def _draw_budgets(axes: Any, rows: list[Figures]) -> None:
    given, took = [row["budget_ms"] for row in rows], [row["took_ms"] for row in rows]
    axes.plot([0, max(given)], [0, max(given)], color="#bbbbbb", linewidth=1, label="budget")
    for kept, colour, label in ((True, "#228833", "kept"), (False, "#cc3311", "missed")):
        some = [number for number, row in enumerate(rows) if row["kept"] is kept]
        if some:
            axes.scatter([given[k] for k in some], [took[k] for k in some], color=colour, label=label, zorder=3)
    axes.set(title="Ten latency budgets", xlabel="asked for, ms", ylabel="took, ms", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
