# SPDX-License-Identifier: Apache-2.0
"""What does it cost to average missing depth into the places of tokens, as published code of models of views does?

A pixel without depth does not count for its token's place (`masked`), or counts as one at the camera (`averaged`,
`average_missing_depth` in config.json). Rooms of the split `test` are seen with the depth of a structured-light camera
(`holes`) and asked about through the engine, with no token pruned:

    off_m         distance of a token's place from the mean place of all its pixels, metres
    macro         accuracy, mean over families, boxes apart; differences are paired, intervals 95 % over rooms
    photographs   how far averaging moves the places of real photographs, whose holes are a real camera's

    python -m benchmarks.missing_depth --json F [--model DIR] [--questions 300] [--photographs DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import View, noisy_depth, render_views, sights
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.registry import LoadedModel, load
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig
from benchmarks._paired import Tally
from benchmarks._scenes import Advance, bar, machine, write_json
from benchmarks.accuracy import MAX_ANSWER, score

MODEL = Path(__file__).parent / "data" / "video3d_small"
BASELINE = 0.075  # metres from the projector to the camera, as in the Kinect
NEAR, FAR = 0.5, 4.0  # metres, what such a camera measures well
GRAZING = 75.0  # degrees from the surface's normal, from which on nothing comes back
DARK = 0.15  # share of the things that give nothing back: black, shiny or of glass
WAYS = ("true depth", "masked", "averaged")


def holes(view: View, rng: np.random.Generator) -> NDArray[np.float32]:
    """Depth (H, W), metres, NaN where a structured-light camera measures nothing.

    Beside noise and lost edges (`noisy_depth`): what its projector cannot see (it stands BASELINE to the right), what
    is nearer than NEAR or farther than FAR, surfaces seen at more than GRAZING, and things that give nothing back.
    """
    depth, K = view.frame.depth, view.frame.K
    height, width = depth.shape
    found = noisy_depth(depth, rng, max_range=FAR)
    solid = np.where(np.isfinite(depth), depth, np.float32(1e3)).astype(np.float64)
    u = np.arange(width) - K[0, 0] * BASELINE / solid  # the column in the projector's picture
    hidden = u > np.minimum.accumulate(u[:, ::-1], axis=1)[:, ::-1] + 1e-6  # something to the right covers it
    rays = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) - K[[0, 1], 2]
    rays = np.concatenate([rays / K[[0, 1], [0, 1]], np.ones((height, width, 1))], axis=-1)
    points = rays * solid[..., None]
    normal = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))
    lengths = np.linalg.norm(normal, axis=-1) * np.linalg.norm(rays, axis=-1)
    slant = np.abs((normal * rays).sum(axis=-1)) < np.cos(np.radians(GRAZING)) * lengths
    found[hidden | slant | (found < NEAR)] = np.nan
    return found


def without_dark(views: Sequence[View], depths: list[NDArray[np.float32]], rng: np.random.Generator) -> None:
    """Takes the depth of a share DARK of the things, in all views."""
    things = np.unique(np.concatenate([np.unique(view.ids) for view in views]))
    dark = [thing for thing in things if thing >= FIRST_ITEM and rng.random() < DARK]
    for view, depth in zip(views, depths, strict=True):
        depth[np.isin(view.ids, dark)] = np.nan


def averaging(model: Path) -> LoadedModel:
    """A checkpoint that averages missing depth in."""
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tower = model / str(content.get("mm_vision_tower", ""))
    with TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in model.iterdir():
            if file.is_file():
                shutil.copy(file, copy / file.name)
        (copy / "config.json").write_text(json.dumps({**content, "average_missing_depth": True}), encoding="utf-8")
        return load(copy, dtype=torch.float32, vision_path=tower if tower.is_dir() else None)


def measure(model: Path, questions: int, seed: int, photographs: Path | None, progress: Advance) -> dict[str, Any]:
    """Places and answers with the true depth, masked and averaged."""
    plain = load(model, dtype=torch.float32)
    engines = [Engine(one.model, one.tokenizer) for one in (plain, plain, averaging(model))]
    asked: list[tuple[int, str]] = []
    scores: list[list[float]] = [[] for _ in WAYS]
    off: list[list[NDArray[np.float64]]] = [[] for _ in WAYS]
    lost, tokens = [], np.zeros(len(WAYS), int)
    while len(asked) < questions:
        room = make_room(number := len({room for room, _ in asked}), "test")
        views = render_views(room, seed=number, count=plain.model.sizes.num_views, renderer=Renderer(room))
        rng = np.random.default_rng([seed, number])
        depths = [holes(view, rng) for view in views]
        without_dark(views, depths, rng)
        lost.append(1 - float(np.mean([np.isfinite(depth) for depth in depths])))
        own = sights(views, np.random.default_rng([number, 1]))
        about = generate(room, np.random.default_rng([seed, number]), own, per_family=2)
        for way, engine in enumerate(engines):
            frames = [replace(v.frame, depth=depth) for v, depth in zip(views, depths, strict=True)]
            frames = [view.frame for view in views] if way == 0 else frames
            off[way].append(_off(engine.model, frames, [view.frame for view in views]))
            tokens[way] += np.isfinite(off[way][-1]).sum()
            scores[way] += [score(qa, text) for qa, text in zip(about, _answers(engine, frames, about), strict=True)]
        asked += [(number, qa.family) for qa in about]
        progress(len(asked), max(questions, len(asked)))
    tally = Tally([room for room, _ in asked], [family for _, family in asked], np.array(scores), seed=seed)
    found: dict[str, Any] = {"pixels_lost": float(np.mean(lost)), "questions": len(asked), "rooms": tally.rooms}
    for way, name in enumerate(WAYS):
        found[name] = {**_spread(np.concatenate(off[way])), "tokens": int(tokens[way]), **accuracy(tally, way, 0)}
    found["averaged less masked"] = _difference(tally, 2, 1)
    if photographs is not None:
        found["photographs"] = _on_photographs(engines[1].model, engines[2].model, photographs)
    return found


def _off(model: SpatialLMM, frames: Sequence[PosedFrame], true: Sequence[PosedFrame]) -> NDArray[np.float64]:
    """(n,) metres between the places of the tokens of some views and those with their true depth; NaN: no token."""
    config = PatchConfig(model.sizes.patches)
    mine, theirs = ([model.place_tokens(frame, config).xyz for frame in some] for some in (frames, true))
    distance: NDArray[np.float64] = np.linalg.norm(np.concatenate(mine) - np.concatenate(theirs), axis=1)
    return distance


def _answers(engine: Engine, frames: Sequence[PosedFrame], about: Sequence[Any]) -> list[str]:
    """To each question, with no token pruned."""
    strategy = default_strategy("none", engine.n_layers)
    config = SessionConfig(max_new_tokens=MAX_ANSWER, budget=BudgetConfig(reuse=Reuse.PREFIX))
    scene = engine.open(config, strategy)
    for frame in frames:
        scene.observe(frame)
    texts = []
    for qa in about:
        answer = engine.ask(scene, Question(qa.question))
        if not answer.status.answered:
            raise RuntimeError(f"{qa.question!r}: {answer.status.name} {answer.status_message}")
        texts.append(answer.text.strip())
    return texts


def _on_photographs(masked: SpatialLMM, averaged: SpatialLMM, folder: Path) -> dict[str, Any]:
    frames = list(read_folder(folder))
    config = PatchConfig(masked.sizes.patches)
    moved, none = [], 0
    for frame in frames:
        ours, theirs = (model.place_tokens(frame, config) for model in (masked, averaged))
        moved.append(np.linalg.norm(ours.xyz - theirs.xyz, axis=1)[ours.valid])
        none += int((~ours.valid).sum())
    lost = float(np.mean([~(frame.depth > 0) for frame in frames]))
    return {"photographs": len(frames), "pixels_lost": lost, "tokens_lost": none, **_spread(np.concatenate(moved))}


def _spread(off: NDArray[np.float64]) -> dict[str, Any]:
    off = off[np.isfinite(off)]
    median, high, most = (float(v) for v in np.quantile(off, (0.5, 0.95, 1.0)))
    return {"off_m": {"mean": float(off.mean()), "median": median, "p95": high, "most": most}}


def accuracy(tally: Tally, way: int, to: int) -> dict[str, Any]:
    """A way's accuracy, by family too, and its paired difference to another."""
    found = {"macro": float(tally.macro[way]), "interval": tally.interval(way)}
    families = {name: one["accuracy"] for name, one in tally.families(way, to).items()}
    return {**found, "families": families, **({} if way == to else _difference(tally, way, to))}


def _difference(tally: Tally, way: int, to: int) -> dict[str, Any]:
    return {"difference": tally.difference(way, to), "difference_interval": tally.difference_interval(way, to)}


def report(found: Mapping[str, Any]) -> list[Table]:
    """What was measured, a table each."""
    title = f"{found['pixels_lost']:.0%} of the pixels without depth, {found['questions']} questions"
    table = Table("depth", "tokens", "off, mean m", "median", "p95", "macro", "to true depth, points", title=title)
    for name in WAYS:
        one = found[name]
        off = [f"{one['off_m'][key]:.3f}" for key in ("mean", "median", "p95")]
        table.add_row(name, str(one["tokens"]), *off, f"{one['macro']:.3f}", points(one))
    if "photographs" not in found:
        return [table]
    one = found["photographs"]
    moved = Table("off, mean m", "median", "p95", title=f"photographs, {one['pixels_lost']:.0%} without depth")
    moved.add_row(*(f"{one['off_m'][key]:.3f}" for key in ("mean", "median", "p95")))
    return [table, moved]


def points(one: Mapping[str, Any]) -> str:
    """A paired difference with its interval."""
    if "difference" not in one:
        return ""
    low, high = one["difference_interval"]
    return f"{100 * one['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.missing_depth", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (%(default)s)")
    parser.add_argument("--questions", type=int, default=300, help="at least so many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, the holes and the bootstrap")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="folder with posed photographs")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"--questions {args.questions} must be at least 1")
    console = Console()
    with bar(console, "rooms with missing depth") as progress:
        result = measure(args.model, args.questions, args.seed, args.photographs, progress)
    for table in report(result):
        console.print(table)
    result |= {"model": args.model.resolve().name, "machine": machine()}
    write_json(args.json, result)


if __name__ == "__main__":
    main()
