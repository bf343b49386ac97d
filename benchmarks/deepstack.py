# SPDX-License-Identifier: Apache-2.0
"""May a gate lie before the last layer after which a model adds features to its image rows (DeepStack)?

A gate there gathers what is still to be added, or it would be refused by the model's first legal gate. Models of random
weights answer questions about views of furnished rooms with one gate, at each of the first layers in turn, which keeps
as many tokens as cost the same exact prefill operations, scoring included:

    kl            divergence from the unpruned answer, nats, mean over its first tokens, prompts and models
    flops         exact prefill operations over those of the unpruned prompts
    kept          share of the tokens behind the gate

    python -m benchmarks.deepstack --json F [--models 3] [--prompts 8] [--share 0.5]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.lab.probe import Probe, Sample
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.lmm.qwen3vl.tiny import write_tiny_checkpoint
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from benchmarks._budgets import Operations, solve
from benchmarks._scenes import Advance, bar, machine, write_json

SIZE: dict[str, Any] = {
    "layers": 16,
    "hidden_size": 384,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 64,
    "vision_layers": 4,
    "taps": (0, 1, 2),
    "view_pixels": 160 * 120,
    "tie_word_embeddings": False,
}
POLICIES = ("ours", "random")
VIEWS = 6
BEYOND = 3  # gates behind the last layer that adds


def prompts(engine: Engine, number: int, count: int) -> list[Sample]:
    """Of one room."""
    room = make_room(number, "test")
    views = render_views(room, seed=number, count=VIEWS, renderer=Renderer(room))
    scene = engine.open()
    for view in views:
        scene.observe(view.frame)
    scene.encode_pending()
    asked = generate(room, np.random.default_rng(number), sights(views, np.random.default_rng(number)), per_family=1)
    found = []
    for qa in asked[:count]:
        spliced, block = scene.spliced(Question(qa.question))
        found.append(Sample(spliced.embeds, spliced.layout, block.scene))
    return found


def measure(models: int, count: int, target: float, folder: Path, progress: Advance) -> dict[str, Any]:
    """Figures by policy and gate."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {policy: {} for policy in POLICIES}
    done = 0
    for seed in range(models):
        loaded = load(write_tiny_checkpoint(folder / str(seed), seed, **SIZE), dtype=torch.float32)
        engine = Engine(loaded.model, loaded.tokenizer)
        decoder, samples = loaded.model.decoder, prompts(engine, seed, count)
        gates = range(len(SIZE["taps"]) + BEYOND)
        probe = Probe(decoder, samples, make_policy("none"))
        work = Operations(decoder.size, [(s.n_spatial, s.n_text, s.layout.n_question) for s in samples])
        for name in POLICIES:
            policy = make_policy(name)
            share = partial(work.share, policy)
            for gate in gates:
                schedule = solve(partial(_one_gate, gate), share, target, 1e-3, 1.0)
                if schedule is None:
                    raise ValueError(f"a gate at layer {gate} cannot save {1 - target:.0%} of the operations")
                kl = probe.with_policy(policy).divergence(schedule)
                figures = {"kl": kl, "flops": share(schedule), "kept": schedule.stages[0].ratio}
                found[name].setdefault(gate, []).append(figures)
                progress(done := done + 1, models * len(POLICIES) * len(gates))
    return {
        "added_after": len(SIZE["taps"]),
        "spatial_tokens": samples[0].n_spatial,
        "parameters": sum(parameter.numel() for parameter in decoder.language.parameters()),
        "models": models,
        "prompts": models * len(samples),
        "gates": {
            name: {
                str(gate): {
                    **{key: float(np.mean([one[key] for one in of_gate])) for key in of_gate[0]},
                    "kl_of_models": [one["kl"] for one in of_gate],
                }
                for gate, of_gate in by_gate.items()
            }
            for name, by_gate in found.items()
        },
    }


def _one_gate(layer: int, ratio: float) -> Schedule:
    return Schedule.of([layer], [ratio])


def report(result: Mapping[str, Any]) -> Table:
    """Gates down."""
    title = (
        f"one gate; features are added after the first {result['added_after']} layers; {result['prompts']} prompts, "
        f"{result['models']} models of {result['parameters'] / 1e6:.0f} M random numbers"
    )
    table = Table("before layer", "kept", "operations", *(f"KL, {name}" for name in result["gates"]), title=title)
    for gate in result["gates"][POLICIES[0]]:
        first = result["gates"][POLICIES[0]][gate]
        kls = [f"{by_gate[gate]['kl']:.4f}" for by_gate in result["gates"].values()]
        table.add_row(gate, f"{first['kept']:.1%}", f"{first['flops']:.1%}", *kls)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deepstack", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--models", type=int, default=3, help="of other random weights, each in another room")
    parser.add_argument("--prompts", type=int, default=8, help="about each room (%(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of the unpruned operations (%(default)s)")
    args = parser.parse_args()
    for name in ("models", "prompts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 < args.share < 1:
        parser.error(f"--share {args.share} is outside (0, 1)")
    console = Console()
    with TemporaryDirectory() as temporary, bar(console, "gates") as progress:
        result = measure(args.models, args.prompts, args.share, Path(temporary), progress)
    console.print(report(result))
    result |= {"size": {**SIZE, "views": VIEWS}, "share": args.share, "machine": machine()}
    write_json(args.json, result)


if __name__ == "__main__":
    main()
