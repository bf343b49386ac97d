# SPDX-License-Identifier: Apache-2.0
"""How much time does dropping spatial tokens save, and how much of what the operation counts promise?

Every policy reads the same prompt on the same random Llama, each on its own schedule scaled to the model's depth, in
one interleaved run. `ours_at_pyramiddrop` is our way of choosing on PyramidDrop's schedule: what two ways of scoring
cost at equal counts. By policy:

    flops_reduction     share of the exact prefill operations saved, scoring counted as spent
    flops_reduction_papers  the same by the papers' formula
    flops_reduction_with_encoder_and_answer  the same of encoding --views images with CLIP ViT-L/14-336, prefill and
                        decoding --new-tokens tokens
    prefill_ms          median time to the logits of the first new token
    speedup             prefill_ms of `none` over its own
    predicted_speedup   exact operations of `none` over its own, text rows, LM head and scoring included
    gate_overhead       median share of the prefill spent choosing tokens and gathering rows
    peak_mb             most megabytes of activations and cache held at one time
    schedule            layer:share of each gate

Every run meets its scene for the first time, so what a policy computes once per scene is inside its time.

    python -m benchmarks.prefill --json F
    python -m benchmarks.prefill --device cuda --dtype bfloat16 --layers 32 --heads 32 --hidden 4096 \\
        --intermediate 11008 --json F
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig

from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.lmm.vision.clip import clip_flops
from adatoken3d_ros.pruning.flops import reduction, scoring_flops, three_conventions
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import Policy, SceneTokens
from benchmarks._timing import (
    Case,
    argument_parser,
    interleaved,
    make_case,
    peak_megabytes,
    rounded,
    setting,
    write_rows,
)

# The vision tower of LLaVA-3D, without its last layer, which does not run.
CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def contestants(n_layers: int) -> dict[str, tuple[Policy, Schedule]]:
    """Every policy on its own schedule, and ours on PyramidDrop's."""
    policies = {name: make_policy(name) for name in POLICY_NAMES}
    rows = {name: (policy, policy.default_schedule(n_layers)) for name, policy in policies.items()}
    return {**rows, "ours_at_pyramiddrop": (policies["ours"], rows["pyramiddrop"][1])}


def operations(case: Case, policy: Policy, schedule: Schedule, encoder: float, n_new: int) -> dict[str, float]:
    """Of one answer in three conventions, scoring included."""
    decoder, layout = case.decoder.size, case.layout
    n_spatial, n_text = layout.n_spatial, layout.n_tokens - layout.n_spatial
    counts = schedule.counts(n_spatial, decoder.n_layers, policy.kept)
    scoring = scoring_flops(policy, decoder, n_spatial, counts, n_text, layout.n_question)
    return three_conventions(decoder, counts, n_text, n_new=n_new, encoder=encoder, scoring=scoring)


def read_prompt(case: Case, policy: Policy, schedule: Schedule) -> Prefill:
    """One prefill of a scene not seen before."""
    scene = SceneTokens(case.scene.xyz)
    return prefill(case.decoder, case.embeds, case.layout, schedule, policy, scene=scene)


def compare(case: Case, args: Any) -> dict[str, dict[str, Any]]:
    """The figures of each contestant."""
    rows = contestants(len(case.decoder))
    ways: dict[str, Callable[[], Prefill]] = {name: partial(read_prompt, case, *row) for name, row in rows.items()}
    timed = {
        name: [(seconds, result.trace.gate_seconds / seconds) for seconds, result in runs]
        for name, runs in interleaved(ways, args).items()
    }
    encoder = args.views * clip_flops(CLIP_L)
    spent = {name: operations(case, *row, encoder, args.new_tokens) for name, row in rows.items()}
    saved = {
        name: {convention: reduction(n, spent["none"][convention]) for convention, n in of_name.items()}
        for name, of_name in spent.items()
    }
    seconds = {name: median(s for s, _ in runs) for name, runs in timed.items()}
    figures = {
        name: {
            "flops_reduction": saved[name]["exact"],
            "flops_reduction_papers": saved[name]["papers"],
            "flops_reduction_with_encoder_and_answer": saved[name]["with_encoder_and_answer"],
            "prefill_ms": 1000 * seconds[name],
            "speedup": seconds["none"] / seconds[name],
            "predicted_speedup": spent["none"]["exact"] / spent[name]["exact"],
            "gate_overhead": median(share for _, share in timed[name]),
            "peak_mb": peak_megabytes(ways[name], case.device),
        }
        for name in rows
    }
    return {
        name: {
            **rounded(figures[name]),
            "schedule": " ".join(f"{stage.layer}:{stage.ratio:.4g}" for stage in schedule.stages),
            "setting": setting(args),
        }
        for name, (_, schedule) in rows.items()
    }


def report(figures: dict[str, dict[str, Any]]) -> Table:
    """One row a policy, 80 columns; `all` is encoder, prefill and answer, `hit` the part of the prediction reached."""
    table = Table(
        title="Operations saved in three conventions, and measured prefill", box=SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("policy", no_wrap=True)
    for column in ("papers", "exact", "all", "ms", "times", "hit", "gate"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in figures.items():
        table.add_row(
            name,
            f"{row['flops_reduction_papers']:.1%}",
            f"{row['flops_reduction']:.1%}",
            f"{row['flops_reduction_with_encoder_and_answer']:.1%}",
            f"{row['prefill_ms']:.{0 if row['prefill_ms'] >= 1000 else 1}f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup'] / row['predicted_speedup']:.0%}",
            f"{row['gate_overhead']:.2%}",
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
    parser = argument_parser("Prefill time of every pruning policy on a random Llama.")
    parser.add_argument("--views", type=int, default=20, help="images encoded for the scene, counted, not run")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the answer, counted, not run")
    args = parser.parse_args()
    figures = compare(make_case(args), args)
    console = Console()
    console.print(report(figures))
    for goal, met in goals(figures).items():
        console.print(f"{'yes' if met else 'NO '}  {goal}")
    if args.json is not None:
        write_rows(args.json, figures)


if __name__ == "__main__":
    main()
