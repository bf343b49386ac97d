# SPDX-License-Identifier: Apache-2.0
"""Draw the documentation's pictures of the synthetic rooms: `rooms.png` and `furniture.png`.

python scripts/draw_rooms.py [--out docs/images]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.camera import intrinsics, look_at
from adatoken3d_ros.lab.synthetic.furnished import assemble, make_room
from adatoken3d_ros.lab.synthetic.furniture import load_pack
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, FLOOR
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import render_views

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"


def sheet(pictures: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Pictures (h, w, 3) of one size, side by side with thin white gaps; the last row is filled with white."""
    framed = [cv2.copyMakeBorder(p, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for p in pictures]
    framed += [np.full_like(framed[0], 255)] * (-len(framed) % columns)
    return np.vstack([np.hstack(framed[k : k + columns]) for k in range(0, len(framed), columns)])


def rooms() -> NDArray[np.uint8]:
    """Two views each of eight rooms, and below them depth with noise and instances of one more view."""
    pictures = []
    for seed in (3, 4, 9, 12, 16, 24, 25, 40):
        room = make_room(seed)
        pictures += [v.frame.rgb for v in render_views(room, count=8)[:2]]
    view = render_views(make_room(9), count=8, noise=True)[2]
    depth = view.frame.depth
    grey = (255 * np.clip(1 - np.nan_to_num(depth, nan=5.0) / 5, 0, 1)).astype(np.uint8)
    coloured = np.asarray(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[:, :, ::-1], np.uint8).copy()
    coloured[np.isnan(depth)] = 0
    hues = np.random.default_rng(1).integers(60, 256, (64, 3), dtype=np.uint8)
    hues[:FIRST_ITEM] = [[90, 90, 90], [60, 60, 60], [40, 40, 40]]
    clean = render_views(make_room(9), count=8)[2]
    return sheet([*pictures, clean.frame.rgb, view.frame.rgb, coloured, hues[view.ids]], 4)


def furniture(side: int = 72) -> NDArray[np.uint8]:
    """Every model of the pack from the front, as it came."""
    pictures = []
    for model in load_pack().values():
        room = assemble((20.0, 20.0, 9.0), [(model, None, (0.0, 0.0, 0.0), 0.0, FLOOR)])
        reach = float(np.linalg.norm(model.size))
        eye = np.array([1.05 * reach, 0.5 * reach, model.size[2] / 2 + 0.45 * reach])
        rgb, _, ids = Renderer(room).render(
            intrinsics(side, side, 52.0), side, side, look_at(eye, np.array([0, 0, model.size[2] / 2]))
        )
        pale = np.where(ids[..., None] < FIRST_ITEM, 245, np.clip(rgb * 1.5, 0, 255))
        pictures.append(pale.astype(np.uint8))
    return sheet(pictures, 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in (("rooms", rooms()), ("furniture", furniture())):
        cv2.imwrite(str(out / f"{name}.png"), picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
