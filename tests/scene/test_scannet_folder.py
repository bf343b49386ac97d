# SPDX-License-Identifier: Apache-2.0
"""ScanNet scenes as the usual scripts export them: the same frames from each form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adatoken3d_ros.scene.folder import FolderError
from adatoken3d_ros.scene.scannet_folder import layout_of, read_scannet

# (colour, depth, pose, colour's intrinsics, depth's): the three forms.
FORMS = {
    "sensreader": (
        "color/{}.png", "depth/{}.png", "pose/{}.txt", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt",
    ),
    "posed_images": ("{:05}.jpg", "{:05}.png", "{:05}.txt", "intrinsic.txt", "depth_intrinsic.txt"),
    "openeqa": ("{:06}-rgb.png", "{:06}-depth.png", "{:06}.txt", "intrinsic_color.txt", "intrinsic_depth.txt"),
}  # fmt: skip


def matrix(fx: float, cx: float, cy: float) -> np.ndarray:
    K = np.eye(4)
    K[0, 0] = K[1, 1] = fx
    K[0, 2], K[1, 2] = cx, cy
    return K


def write(folder: Path, form: str, count: int = 12) -> Path:
    """Colour 128x96, left half red and right half blue, beside depth 64x48 of 2 m; the camera moves along x."""
    color, depth, pose, K_color, K_depth = (folder / name for name in FORMS[form])
    for path in (color, depth, pose, K_color):
        path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(K_color, matrix(100, 63.5, 47.5))
    np.savetxt(K_depth, matrix(50, 31.5, 23.5))
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[:, :64, 0] = pixels[:, 64:, 2] = 255
    for index in range(count):
        Image.fromarray(pixels).save(str(color).format(index))
        Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(str(depth).format(index))
        T = np.eye(4)
        T[0, 3] = index
        np.savetxt(str(pose).format(index), T if index != 3 else np.full((4, 4), -np.inf))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    folder = write(tmp_path / "scene0001_00", form)
    frames = list(read_scannet(folder))
    assert [frame.T_world_camera[0, 3] for frame in frames] == [0, 1, 2, *range(4, 12)]  # tracking was lost at 3
    assert all(frame.rgb.shape == (48, 64, 3) and np.all(frame.depth == 2.0) for frame in frames)
    np.testing.assert_allclose(frames[0].K, matrix(50, 31.5, 23.5)[:3, :3])
    left, right = frames[0].rgb[:, 10], frames[0].rgb[:, -10]
    assert left[:, 0].min() > 200 and left[:, 2].max() < 60 and right[:, 2].min() > 200
    # The border of the halves is where it was: between the middle columns.
    assert frames[0].rgb[24, 30, 0] > 200 > frames[0].rgb[24, 33, 0]


def test_views_are_chosen_by_the_published_rule(tmp_path: Path) -> None:
    """Of 12 frames 5: every second from the first; the rest is not seen. Of 12 frames 20: all."""
    folder = write(tmp_path / "s", "posed_images")
    assert [f.T_world_camera[0, 3] for f in read_scannet(folder, 5)] == [0, 2, 4, 6, 8]
    assert len(list(read_scannet(folder, 20))) == 11


def test_the_scene_is_turned_by_its_alignment(tmp_path: Path) -> None:
    folder = write(tmp_path / "scene0001_00", "sensreader", 2)
    quarter = np.array([[0.0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    line = "axisAlignment = " + " ".join(map(str, quarter.ravel()))
    (folder / "scene0001_00.txt").write_text(f"colorHeight = 968\n{line}\nnumDepthFrames = 2\n")
    np.testing.assert_allclose(list(read_scannet(folder))[1].T_world_camera[:3, 3], [5, 1, 0])
    (folder / "scene0001_00.txt").write_text("axisAlignment = 1 2\n")
    with pytest.raises(FolderError, match="axisAlignment is no 4x4"):
        list(read_scannet(folder))


def test_what_is_no_scene_or_damaged_is_named(tmp_path: Path) -> None:
    assert layout_of(tmp_path) is None
    with pytest.raises(FolderError, match="is no ScanNet scene"):
        list(read_scannet(tmp_path))
    folder = write(tmp_path / "s", "openeqa", 2)
    (folder / "000001-depth.png").write_bytes(b"nothing")
    with pytest.raises(FolderError, match="000001-depth.png is not an image"):
        list(read_scannet(folder))
    (folder / "000000.txt").write_text("1 2 3")
    with pytest.raises(FolderError, match="000000.txt has 3 numbers"):
        list(read_scannet(folder))
