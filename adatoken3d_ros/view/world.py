# SPDX-License-Identifier: Apache-2.0
"""What viser shows in 3D: tokens, the cameras of the key frames with their pictures, clicks, boxes, evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import viser
from numpy.typing import NDArray

from adatoken3d_ros.engine.pictures import MOST_SHOWN, Left, Picture, small
from adatoken3d_ros.view.dialogue import Asked
from adatoken3d_ros.view.drawing import LIVE_AGE, LIVE_PICTURE, colours, lit_picture
from adatoken3d_ros.view.source import Shown

POINT = 0.08  # metres
SIDE = 240  # pixels of these
DIM, GREY, RED, ORANGE, BLUE = (60,) * 3, (120,) * 3, (235, 40, 60), (230, 130, 40), (60, 130, 220)
_EDGES = [(a, a | 1 << k) for a in range(8) for k in range(3) if not a & 1 << k]  # of a box, by corner


class World:
    """Draws into a server's scene. Everything has one name for good, so that what replaces it costs no memory.

    Attributes:
        points: (N, 3) the tokens that are shown and seen by the layer, which can be clicked and selected.
        selected: (n, 3) of them.
    """

    def __init__(self, server: viser.ViserServer) -> None:
        self._scene = server.scene
        self._cameras: dict[int, tuple[Any, Picture, bytes | None]] = {}  # None: nothing is lit, as there is no answer
        self._left: Left | None = None  # of the answer that is shown
        self._lit: dict[int, NDArray[np.int64]] = {}  # its patches, by the stamp of the picture
        self._cameras_visible = True
        self.points: NDArray[np.float32] = np.zeros((0, 3), np.float32)
        self.selected: NDArray[np.float32] = np.zeros((0, 3), np.float32)
        self._scene.add_grid("/floor", 12.0, 12.0, cell_color=DIM, section_color=DIM, plane="xy")

    def draw(self, shown: Shown, asked: Asked | None, mode: str, layer: int) -> None:
        """The tokens: of the scene as it is now, or of an answer as `layer` sees them.

        What is selected is marked before the first layer alone: it would hide what later ones see of it.
        """
        tokens = None if asked is None else asked.answer.tokens
        xyz, rgb = colours(mode, shown, tokens)
        seen = np.ones(len(xyz), bool)
        if tokens is not None and mode not in (LIVE_PICTURE, LIVE_AGE):
            seen = tokens.last_layer >= layer
        self.points = xyz[seen]
        self._cloud("tokens", xyz[seen], rgb[seen], POINT)
        self._cloud("gone", xyz[~seen], GREY, POINT / 4)
        self._cloud("selected", self.selected[: 0 if layer and tokens is not None else None], RED, POINT * 1.2)

    def select(self, chosen: NDArray[np.float32]) -> None:
        """Marks these of the points, none to unmark."""
        self.selected = chosen
        self._cloud("selected", chosen, RED, POINT * 1.2)

    def cameras(self, pictures: tuple[Picture, ...], asked: Asked | None) -> None:
        """The frusta of the key frames with their pictures; after an answer the patches whose tokens were left are lit.

        Only what has changed is sent.
        """
        wanted = {picture.stamp_ns: picture for picture in pictures[-MOST_SHOWN:]}
        for stamp in self._cameras.keys() - wanted.keys():
            self._cameras.pop(stamp)[0].remove()
            self._lit.pop(stamp, None)
        if (left := None if asked is None else asked.answer.left) is not self._left:
            self._left, self._lit = left, {}
        for stamp, picture in wanted.items():
            if left is not None and stamp not in self._lit:
                # Once: what a picture's patches were to the answer stays, also where it turns out to be elsewhere.
                self._lit[stamp] = picture.lit(left)
            lit = self._lit.get(stamp)
            key = None if lit is None else lit.tobytes()  # an answer that was left with none of it darkens all of it
            if stamp in self._cameras and self._cameras[stamp][1:] == (picture, key):  # a picture equals itself alone
                continue
            image = small(picture.rgb, SIDE)
            if lit is not None:
                image = lit_picture(image, picture.grid, picture.area, lit)
            frustum = self._scene.add_camera_frustum(
                f"/cameras/{stamp}",
                picture.fov,
                picture.aspect,
                scale=0.2,
                thickness=0.004,
                color=BLUE,
                image=image,
                jpeg_quality=75,
                wxyz=viser.transforms.SO3.from_matrix(picture.pose[:3, :3]).wxyz,
                position=picture.pose[:3, 3],
                visible=self._cameras_visible,
            )
            self._cameras[stamp] = frustum, picture, key

    def show_cameras(self, visible: bool) -> None:
        """Whether they are seen, those that come later, too."""
        self._cameras_visible = visible
        for frustum, _, _ in self._cameras.values():
            frustum.visible = visible

    def answer(self, asked: Asked | None) -> None:
        """What an answer points at: its clicks, its boxes, and what it rests on."""
        record = {} if asked is None else asked.answer.record
        clicks = np.asarray(record.get("clicks") or [], dtype=np.float32).reshape(-1, 3)
        if asked is not None and not len(clicks):
            clicks = asked.question.clicks.astype(np.float32)
        self._cloud("clicks", clicks, RED, POINT * 2)
        self._boxes("boxes", [(*box["center"], *box["size"]) for box in record.get("boxes", ())], ORANGE)
        evidence = [(*one["place"], *one["extent"]) for one in record.get("evidence", ())]
        self._boxes("evidence", evidence, BLUE)

    def _cloud(self, name: str, xyz: NDArray[np.floating], rgb: Any, size: float) -> None:
        """Points in one colour or in one for each; a browser finds fault with no colours at all."""
        self._scene.add_point_cloud(
            f"/{name}",
            np.asarray(xyz, dtype=np.float32),
            np.asarray(rgb if len(xyz) else GREY, dtype=np.uint8),
            point_size=size,
            point_shape="rounded",
            precision="float32",
        )

    def _boxes(self, name: str, boxes: list[tuple[float, ...]], colour: tuple[int, int, int]) -> None:
        corners = np.array([[(k >> a & 1) - 0.5 for a in range(3)] for k in range(8)])
        given = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
        ends = [
            np.stack([box[:3] + box[3:] * corners[a], box[:3] + box[3:] * corners[b]])
            for box in given
            for a, b in _EDGES
        ]
        lines = np.stack(ends) if ends else np.zeros((1, 2, 3))
        self._scene.add_line_segments(f"/{name}", lines.astype(np.float32), colour, thickness=0.01, visible=bool(ends))
