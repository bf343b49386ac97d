# SPDX-License-Identifier: Apache-2.0
"""Draw the documentation's picture of what a scene knows of itself: `memory.png`.

One room of `benchmarks.trust` from above, asked about a thing at its place before and after it was put elsewhere.

    python -m benchmarks.trust_picture [--out docs/images] [--seed 6001]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.knowing import floor_map, remembered
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.scene.evidence import Evidence
from adatoken3d_ros.scene.occupancy import VOXEL, State
from adatoken3d_ros.settings import Settings
from benchmarks._trust_memory import ROUND, SETTINGS, show, tell_story

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"


def square(axes: Any, item: Evidence, **style: Any) -> None:
    """The box of a piece of evidence, from above."""
    x, y = (place - extent / 2 for place, extent in zip(item.place[:2], item.extent[:2], strict=True))
    axes.add_patch(Rectangle((x, y), *item.extent[:2], **style))


def draw(axes: Any, scene: Scene, answer: Answer) -> None:
    """The floor, what stands on it, what has gone, and what an answer says."""
    memory = scene.memory
    past, floor, camera = memory.past, memory.floor, memory.poses[memory.stamp_ns][:3, 3]
    free, unseen = floor_map(past.occupancy, floor, camera)
    solid = past.occupancy.where(State.OCCUPIED)
    solid = solid[(solid[:, 2] > (floor or 0.0) + VOXEL) & (solid[:, 2] < (floor or 0.0) + 1.8)]
    for cells, colour, label in (
        (free, "#bfe3c0", "free"),
        (unseen, "#8a8a8a", "never seen"),
        (solid, "#39424e", "occupied"),
    ):
        axes.scatter(cells[:, 0], cells[:, 1], s=20, marker="s", color=colour, linewidths=0, label=label)
    for thing in map(remembered, past.tombstones.gone):
        square(axes, thing, facecolor="#d62728", alpha=0.5)
        if thing.moved_to is not None:
            way = dict(arrowstyle="->", color="#d62728", linewidth=2)
            axes.annotate("", xy=thing.moved_to[:2], xytext=thing.place[:2], arrowprops=way)
    axes.plot([], [], "s", color="#d62728", alpha=0.5, label="gone, and where to")
    for item in answer.evidence:
        square(axes, item, fill=False, edgecolor="#00a5c8", linewidth=2)
    axes.plot([], [], "s", color="#00a5c8", fillstyle="none", label="evidence")
    x, y = answer.question.clicks[0, :2]
    axes.plot(x, y, "k+", markersize=12, markeredgewidth=2, label="asked about")
    axes.plot(*camera[:2], "^", color="#1f77b4", markersize=9, label="camera")
    if answer.goal is not None:
        (x, y), (dx, dy) = answer.goal[:2, 3], answer.goal[:2, 0]
        axes.quiver(x, y, dx, dy, color="#c020a0", angles="xy", scale_units="xy", scale=2.5, width=0.012)
    axes.plot([], [], ">", color="#c020a0", label="goal")
    said = f"{answer.verdict.name}: {answer.verdict_reason}. {answer.goal_reason}"
    axes.set(xlabel="x, m", ylabel="y, m", aspect="equal")
    axes.set_title("\n".join(textwrap.wrap(said, 58)), fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder")
    parser.add_argument("--seed", type=int, default=6001, metavar="N", help="of the room (%(default)s)")
    args = parser.parse_args()
    story = tell_story(args.seed)
    if story is None or story.moved is None:
        parser.error(f"nothing was put elsewhere in the room {args.seed}")
    points = next(shown[i] for shown in story.shown[ROUND - 1 :: -1] for i in [story.moved[0].instance] if i in shown)
    middle = points[int(np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin())]
    engine, question = load_engine(Settings(SETTINGS)), Question("What is this?", middle[None])
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, count in zip(plots, (ROUND, 2 * ROUND), strict=True):
        scene = show(engine, story.frames[:count], {})[0]
        draw(axes, scene, engine.ask(scene, question))
    figure.legend(*plots[1].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=8)
    figure.savefig(args.out / "memory.png", dpi=100)


if __name__ == "__main__":
    main()
