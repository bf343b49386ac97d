# SPDX-License-Identifier: Apache-2.0
"""Draw the README's moving picture: a camera goes through a room, tokens appear, somebody asks, layers drop tokens.

python scripts/draw_demo.py [--seed 9] [--out docs/images/demo.gif]

All of it is the package's own: a furnished room, the model that comes with it, and the tokens as its layers saw them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adatoken3d_ros.engine.answer import Question, TokenReport
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.settings import OF_CHOSEN_FRAMES, Settings

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo.gif"
WIDTH, HEIGHT, BAND = 400, 300, 64  # of each half, and of the text below both
PAPER, INK, ACCENT = (250, 250, 250), (40, 40, 50), (200, 80, 30)
Picture = NDArray[np.uint8]


def cloud(xyz: NDArray[np.float32], rgb: NDArray[np.uint8], middle: NDArray[np.float64], turn: float) -> Picture:
    """Tokens from above and aside, `turn` radians around; near ones are drawn last, and larger."""
    picture = np.full((HEIGHT, WIDTH, 3), PAPER, np.uint8)
    sin, cos = np.sin(turn), np.cos(turn)
    x, y, z = (xyz - middle).T
    across, depth = cos * x - sin * y, sin * x + cos * y
    scale = 0.14 * WIDTH / (1 + 0.06 * depth)
    u, v = WIDTH / 2 + scale * across, HEIGHT / 2 - scale * (0.72 * z + 0.55 * depth)
    for index in np.argsort(-depth):
        place = round(float(u[index])), round(float(v[index]))
        cv2.circle(picture, place, max(2, round(float(scale[index]) / 18)), rgb[index].tolist(), -1, cv2.LINE_AA)
    return picture


def write(picture: Picture, lines: list[tuple[str, tuple[int, int, int]]]) -> Picture:
    """The halves with up to two lines of text below."""
    band = np.full((BAND, picture.shape[1], 3), PAPER, np.uint8)
    for row, (text, colour) in enumerate(lines):
        cv2.putText(band, text, (12, 26 + 26 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 1, cv2.LINE_AA)
    return np.vstack([picture, band])


def layer(report: TokenReport, number: int) -> NDArray[np.uint8]:
    """(N, 3) colours of the tokens as a layer sees them: those it does not see are pale."""
    seen = (report.last_layer >= number)[:, None]
    return np.where(seen, report.rgb, (232, 232, 236)).astype(np.uint8)


def frames(seed: int) -> tuple[list[Picture], list[int]]:
    """The pictures, and how long each is shown, milliseconds."""
    room = make_room(seed, "test")
    settings = Settings(OF_CHOSEN_FRAMES | {"strategy": "ours", "scene.max_views": 12})
    engine = load_engine(settings | {"budget.warm_up": False})
    scene = open_scene(engine, settings)
    pictures, times = [], []
    middle = np.array([0.0, 0.0, 0.8])
    camera = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    turn = 0.5
    for index, view in enumerate(render_views(room, count=12)):
        scene.observe(view.frame)
        scene.encode_pending()
        tokens = scene.tokens()
        assert tokens is not None
        xyz, rgb = tokens.xyz.cpu().numpy(), tokens.rgb.cpu().numpy()
        middle = np.array([*((xyz.min(axis=0) + xyz.max(axis=0)) / 2)[:2], 0.8])
        camera = np.asarray(cv2.resize(view.frame.rgb, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.uint8)
        turn += 0.04
        seen = f"{index + 1} key frames, {len(xyz)} spatial tokens"
        pictures.append(write(np.hstack([camera, cloud(xyz, rgb, middle, turn)]), [(seen, INK)]))
        times.append(350)
    for qa in generate(room, np.random.default_rng(seed), per_family=2, families=("count", "nearest", "colour")):
        answer = engine.ask(scene, Question(qa.question))
        if answer.text == qa.answer and answer.report is not None:
            break
    else:
        raise SystemExit(f"no question about room {seed} was answered right: take another --seed")
    report = answer.report
    for number in range(len(report.spatial_per_layer)):
        turn += 0.04
        seen = f"layer {number + 1}: {report.spatial_per_layer[number]} of {len(report.xyz)} tokens"
        picture = np.hstack([camera, cloud(report.xyz, layer(report, number), middle, turn)])
        pictures.append(write(picture, [(qa.question, INK), (seen, ACCENT)]))
        times.append(450)
    saved = 1 - answer.prefill_flops / answer.prefill_flops_unpruned
    told = f"{answer.text}   ({saved:.0%} of the operations saved)"
    for _ in range(8):
        turn += 0.04
        left = layer(report, len(report.spatial_per_layer) // 2)  # the last layers may see none
        picture = np.hstack([camera, cloud(report.xyz, left, middle, turn)])
        pictures.append(write(picture, [(qa.question, INK), (told, ACCENT)]))
        times.append(350)
    return pictures, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=9, help="of the room (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    pictures, times = frames(args.seed)
    images = [Image.fromarray(p).quantize(96, dither=Image.Dither.NONE) for p in pictures]
    images[0].save(args.out, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
    print(f"{args.out}: {len(images)} pictures, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
