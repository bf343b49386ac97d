# SPDX-License-Identifier: Apache-2.0
"""How much time does dropping spatial tokens save, and how much of what the operation counts promise?

Every policy reads the same prompt on the same random Llama, each on its own schedule scaled to the model's depth, in
one interleaved run. `ours_at_pyramiddrop` is our way of choosing on PyramidDrop's schedule: what two ways of scoring
cost at equal counts. By policy:

    flops_reduction     share of the exact prefill operations saved, scoring counted as spent
    prefill_ms          median time to the logits of the first new token
    speedup             prefill_ms of `none` over its own
    predicted_speedup   exact operations of `none` over its own, text rows, LM head and scoring included
    gate_overhead       median share of the prefill spent choosing tokens and gathering rows
    peak_mb             most megabytes of activations and cache held at one time

    python -m benchmarks.prefill --json F
    python -m benchmarks.prefill --device cuda --dtype bfloat16 --layers 32 --heads 32 --hidden 4096 \\
        --intermediate 11008 --json F
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.pruning.flops import prefill_flops, reduction, scoring_flops
from adatoken3d_ros.pruning.gate import Prefill, prefill
from adatoken3d_ros.pruning.policies import POLICY_NAMES, Policy, make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from benchmarks._timing import Case, argument_parser, interleaved, make_case, peak_megabytes, setting


def contestants(n_layers: int) -> dict[str, tuple[Policy, Schedule]]:
    """Every policy on its own schedule, and ours on PyramidDrop's."""
    policies = {name: make_policy(name) for name in POLICY_NAMES}
    rows = {name: (policy, policy.default_schedule(n_layers)) for name, policy in policies.items()}
    return {**rows, "ours_at_pyramiddrop": (policies["ours"], rows["pyramiddrop"][1])}


def exact_flops(case: Case, policy: Policy, schedule: Schedule) -> float:
    """Operations of one prefill, scoring included."""
    config, layout = case.language.config, case.layout
    n_spatial, n_text = layout.n_spatial[0], layout.n_tokens[0] - layout.n_spatial[0]
    counts = schedule.counts(n_spatial, config.num_hidden_layers)
    scoring = scoring_flops(policy, config, n_spatial, counts, n_text, layout.n_question[0])
    return prefill_flops(config, counts, n_text) + scoring


def compare(case: Case, args: Any) -> dict[str, dict[str, Any]]:
    """The figures of each contestant."""
    rows = contestants(case.language.config.num_hidden_layers)
    ways: dict[str, Callable[[], Prefill]] = {
        name: partial(prefill, case.language, case.embeds, case.layout, schedule, policy, scene=case.scene)
        for name, (policy, schedule) in rows.items()
    }
    timed = {
        name: [(seconds, result.trace.gate_seconds / seconds) for seconds, result in runs]
        for name, runs in interleaved(ways, args).items()
    }
    operations = {name: exact_flops(case, *row) for name, row in rows.items()}
    seconds = {name: median(s for s, _ in runs) for name, runs in timed.items()}
    return {
        name: {
            "flops_reduction": reduction(operations[name], operations["none"]),
            "prefill_ms": 1000 * seconds[name],
            "speedup": seconds["none"] / seconds[name],
            "predicted_speedup": operations["none"] / operations[name],
            "gate_overhead": median(share for _, share in timed[name]),
            "peak_mb": peak_megabytes(ways[name], case.device),
            "spatial_per_layer": list(
                schedule.counts(case.layout.n_spatial[0], case.language.config.num_hidden_layers)
            ),
            "setting": setting(args),
        }
        for name, (_, schedule) in rows.items()
    }


def report(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Prefill by policy", box=SIMPLE)
    table.add_column("policy", no_wrap=True)
    for column in ("saved", "ms", "faster", "predicted", "reached", "gate", "MB"):
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['flops_reduction']:.1%}",
            f"{row['prefill_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['speedup'] / row['predicted_speedup']:.0%}",
            f"{row['gate_overhead']:.2%}",
            f"{row['peak_mb']:.0f}",
        )
    return table


def goals(figures: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What our gate is held to."""
    ours = figures["ours"]
    return {
        "ours saves at least 63 % of the operations": ours["flops_reduction"] >= 0.63,
        "ours reaches 90 % of the predicted speed-up": ours["speedup"] / ours["predicted_speedup"] >= 0.9,
        "ours spends at most 1 % of the prefill at its gates": ours["gate_overhead"] <= 0.01,
        "at equal counts ours is at least as fast as PyramidDrop": figures["ours_at_pyramiddrop"]["prefill_ms"]
        <= figures["pyramiddrop"]["prefill_ms"],
    }


def main() -> None:
    args = argument_parser("Prefill time of every pruning policy on a random Llama.").parse_args()
    figures = compare(make_case(args), args)
    console = Console()
    console.print(report(figures))
    for goal, met in goals(figures).items():
        console.print(f"{'yes' if met else 'NO '}  {goal}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
