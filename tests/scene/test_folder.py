# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.spatial import cKDTree

from adatoken3d_ros.scene.folder import FolderError, read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, patch_points

DESK = Path(__file__).resolve().parents[3] / "shared" / "data" / "tum_fr1_desk"
DATA = Path(__file__).resolve().parents[2] / "docs" / "data.md"
INTRINSICS = {"width": 8, "height": 6, "fx": 7.0, "fy": 7.5, "cx": 3.5, "cy": 2.5, "depth_scale": 1000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three frames of 8x6 pixels."""
    for name in ("color", "depth", "pose"):
        (tmp_path / name).mkdir()
    (tmp_path / "intrinsics.json").write_text(json.dumps(INTRINSICS))
    for index in range(3):
        Image.fromarray(np.full((6, 8, 3), 50 * index, np.uint8)).save(tmp_path / "color" / f"{index:03d}.png")
        depth = np.full((6, 8), 1500, np.uint16)
        depth[0, index] = 0
        Image.fromarray(depth).save(tmp_path / "depth" / f"{index:03d}.png")
        T = np.eye(4)
        T[0, 3] = index
        np.savetxt(tmp_path / "pose" / f"{index:03d}.txt", T)
    return tmp_path


def test_frames_are_read_with_units_and_missing_depth(folder: Path) -> None:
    frames = list(read_folder(folder))
    assert [f.stamp_ns for f in frames] == [0, 100_000_000, 200_000_000]
    for index, frame in enumerate(frames):
        assert (frame.rgb == 50 * index).all()
        assert np.isnan(frame.depth[0, index])
        assert_array_equal(np.delete(frame.depth.ravel(), index), np.full(47, 1.5, np.float32))
        assert_allclose(frame.K, [[7, 0, 3.5], [0, 7.5, 2.5], [0, 0, 1]])
        assert frame.T_world_camera[0, 3] == index


def test_every_second_frame(folder: Path) -> None:
    assert [f.stamp_ns for f in read_folder(folder, stride=2)] == [0, 200_000_000]


def test_times_keep_their_nanoseconds(folder: Path) -> None:
    (folder / "times.txt").write_text("1305031452.791720001\n1305031453\n1305031454.5\n")
    stamps = [f.stamp_ns for f in read_folder(folder)]
    assert stamps == [1305031452791720001, 1305031453000000000, 1305031454500000000]


def test_distortion_is_taken_out_of_both_images(folder: Path) -> None:
    # With k1 < 0 (barrel), what belongs at the corner of the ideal image is seen nearer to the centre.
    (folder / "intrinsics.json").write_text(json.dumps({**INTRINSICS, "distortion": [-0.3, 0, 0, 0, 0]}))
    colour, depth = np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 1000, np.uint16)
    colour[1, 1], depth[1, 1] = 255, 3000
    Image.fromarray(colour).save(folder / "color" / "000.png")
    Image.fromarray(depth).save(folder / "depth" / "000.png")
    # Ideal (0, 0) is at (-0.5, -1/3), r^2 = 13/36; times 1 - 0.3 r^2 it is pixel (0.38, 0.27), nearest (0, 0); ideal
    # (1, 1) is at (-0.357, -0.2): pixel (1.126, 1.076), so it keeps its depth and most of its colour.
    frame = next(iter(read_folder(folder)))
    assert frame.depth[1, 1] == 3.0
    assert 0.8 * 255 < (frame.rgb[1, 1] / 1.0).mean() < 0.83 * 255


Break = Callable[[Path], object]


def write(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def intrinsics(**changes: object) -> Break:
    return write("intrinsics.json", json.dumps({**INTRINSICS, **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "intrinsics.json").unlink(), OSError, "intrinsics.json"),
        (lambda f: (f / "depth" / "001.png").unlink(), OSError, "001.png"),
        (lambda f: (f / "pose" / "002.txt").unlink(), OSError, "002.txt"),
        (lambda f: [p.unlink() for p in (f / "color").iterdir()], FolderError, "color"),
        (write("intrinsics.json", "{"), FolderError, "intrinsics.json is not valid"),
        (write("intrinsics.json", "[]"), FolderError, "intrinsics.json is not valid"),
        (write("intrinsics.json", json.dumps({"width": 8})), FolderError, r"lacks 'height' \(docs/data.md"),
        (intrinsics(fx="wide"), FolderError, "wide"),
        (intrinsics(fx=0), FolderError, "fx=0"),
        (intrinsics(width=9000), FolderError, "9000x6"),
        (intrinsics(width=9), FolderError, "000.png has 8x6 .* 9x6"),
        (intrinsics(depth_scale=0), FolderError, "depth_scale 0"),
        (intrinsics(distortion=[0.1, 0.2]), FolderError, "0.1, 0.2"),
        (intrinsics(distortion=[0, 0, 0, 0, float("nan")]), FolderError, "nan"),
        (write("color/000.png", "no image"), FolderError, "000.png is not an image"),
        (write("pose/000.txt", "1 0 0"), FolderError, "000.txt"),
        (write("pose/000.txt", "one two"), FolderError, "000.txt"),
        (write("pose/000.txt", "2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"), FolderError, "000.txt.*not a rigid"),
        (write("times.txt", "1.0\n2.0\n"), FolderError, "2 times for 3 frames"),
        (write("times.txt", "1.0\n-2.0\n3.0\n"), FolderError, "'-2.0'"),
        (
            lambda f: Image.fromarray(np.zeros((6, 8), np.uint8)).save(f / "depth" / "000.png"),
            FolderError,
            "000.png has pixels of kind L",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, damage: Break, error: type[Exception], message: str) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        list(read_folder(folder))


def test_a_truncated_image_is_an_error(folder: Path) -> None:
    path = folder / "color" / "000.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises((OSError, FolderError)):
        list(read_folder(folder))


@pytest.mark.parametrize("name", ["intrinsics.json", "times.txt", "pose/001.txt", "color/001.png", "depth/001.png"])
def test_any_bytes_give_frames_or_the_documented_error(folder: Path, name: str) -> None:
    (folder / "times.txt").write_text("1.5\n2.5\n3.5\n")
    content, choose = (folder / name).read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(choose.randrange(1, 5)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        (folder / name).write_bytes(damaged[: choose.randrange(len(damaged)) if choose.random() < 0.2 else None])
        with contextlib.suppress(FolderError):
            list(read_folder(folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("intrinsics.json", json.dumps({**INTRINSICS, "width": 1e999})),
        ("intrinsics.json", "[" * 100_000),
        ("intrinsics.json", '{"a": "' + "x" * 2**17 + '"}'),
        ("times.txt", "9" * 5000 + "\n2\n3\n"),
        ("times.txt", "99999999999\n2\n3\n"),
        ("pose/001.txt", "1 " * 2**16),
    ],
    ids=["infinite", "nested", "large", "digits", "far", "long"],
)
def test_numbers_and_texts_without_end_are_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(FolderError, match=name) as caught:
        list(read_folder(folder))
    assert len(str(caught.value)) < 1000


def test_a_device_in_place_of_a_file_is_refused_and_not_read(folder: Path) -> None:
    for name in ("intrinsics.json", "times.txt"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(FolderError, match=f"{name} is no regular file"):
            list(read_folder(folder))
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)


def test_bad_arguments_are_refused_at_the_call(folder: Path) -> None:
    with pytest.raises(FolderError, match="stride 0"):
        read_folder(folder, stride=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(folder / "nowhere")


# --- photographs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk() -> list[PosedFrame]:
    if not DESK.is_dir():
        pytest.skip(f"no photographs in {DESK}")
    return list(read_folder(DESK))


def test_the_desk_is_read(desk: list[PosedFrame]) -> None:
    assert len(desk) == 39
    for frame in desk:
        assert frame.rgb.shape == (480, 640, 3)
        assert 0.3 < np.isfinite(frame.depth).mean() < 1
        assert 0.2 < np.nanmedian(frame.depth) < 6


def test_points_agree_with_the_depth_of_other_frames(desk: list[PosedFrame]) -> None:
    # The sensor's noise grows with the distance: compared is what lies within 4 m.
    dense = [patch_points(frame, PatchConfig(PatchGeometry.square(336, 112), max_depth=4.0)) for frame in desk]
    distances = []
    for index in range(0, len(desk), 5):
        points = patch_points(desk[index], PatchConfig(max_depth=4.0))
        others = np.concatenate([d.xyz[d.valid] for i, d in enumerate(dense) if i != index])
        distances.append(cKDTree(others).query(points.xyz[points.valid])[0])
    assert np.median(np.concatenate(distances)) < 0.03


def test_the_recipe_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TUM sequence of 11 images and twice as many poses becomes a folder of its first and its last image."""
    source, out = tmp_path / "tum", tmp_path / "frames"
    for name, pixels in (("rgb", np.zeros((480, 640, 3), np.uint8)), ("depth", np.full((480, 640), 10_000, np.uint16))):
        (source / name).mkdir(parents=True)
        Image.fromarray(pixels).save(source / name / "one.png")
        lines = [f"{100 + index / 30:.6f} {name}/one.png" for index in range(11)]
        (source / f"{name}.txt").write_text("\n".join(["# timestamp filename", *lines]))
    poses = [f"{100 + index / 60:.4f} {index} 0 1.5 0 0 0.6 0.8" for index in range(22)]
    (source / "groundtruth.txt").write_text("\n".join(["# timestamp tx ty tz qx qy qz qw", *poses]))
    monkeypatch.setattr("sys.argv", ["recipe", str(source), str(out)])
    (code,) = re.findall(r"```python\n(.*?)```", DATA.read_text(), re.DOTALL)
    exec(compile(code, str(DATA), "exec"), {})
    first, last = read_folder(out)
    assert (first.stamp_ns, last.stamp_ns) == (100_000_000_000, 100_333_333_000)
    assert first.depth[0, 0] == 2.0 and last.T_world_camera[:3, 3].tolist() == [20.0, 0.0, 1.5]
    # A quaternion about z with sin(a / 2) = 0.6: cos(a) = 0.28, sin(a) = 0.96.
    assert_allclose(last.T_world_camera[:2, :2], [[0.28, -0.96], [0.96, 0.28]], atol=1e-12)


def test_every_key_is_in_the_documentation() -> None:
    for key in (*INTRINSICS, "distortion"):
        assert f"`{key}`" in DATA.read_text()
