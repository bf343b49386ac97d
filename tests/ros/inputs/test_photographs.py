# SPDX-License-Identifier: Apache-2.0
"""Real photographs through the real node, published from another process; the same ones through a bag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from ros_bags import T as TYPES
from ros_bags import header, write
from ros_graph import ROOT, Graph
from ros_photographs import DESK, FIRST_NS, STEP_NS, distortion, read_photographs
from scipy.spatial import cKDTree
from sensor_msgs.msg import PointCloud2
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.ros.bag import read_bag
from adatoken3d_ros.ros.inputs.conversions import Camera, rectify_depth, rectify_rgb
from adatoken3d_ros.ros.outputs.fill import rotation_to_quaternion

pytestmark = pytest.mark.skipif(not DESK.is_dir(), reason=f"the photographs are not there: {DESK}")
COUNT = 39


def points_of(cloud: PointCloud2, *names: str) -> np.ndarray:
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.width, cloud.point_step)
    offset = {field.name: field.offset for field in cloud.fields}
    return np.stack([raw[:, offset[n] : offset[n] + 4].copy().view("<f4")[:, 0] for n in names], axis=1)


def straightened(rgb: np.ndarray, depth: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the lens distortion: rgb, and depth in metres with NaN."""
    metres = np.where(depth > 0, depth.astype(np.float32) / 1000, np.float32(np.nan))
    camera = Camera(K, np.array(distortion(DESK)), "plumb_bob", 640, 480)
    return rectify_rgb(rgb, camera), rectify_depth(metres, camera)


def surface(photographs: list[Any]) -> np.ndarray:
    """All depth pixels of some photographs as points (n, 3) in the scene frame, every third row and column."""
    clouds = []
    for _, rgb, depth, K, T in photographs:
        metres = straightened(rgb, depth, K)[1]
        v, u = (grid[np.isfinite(metres[::3, ::3])] for grid in np.mgrid[0:480:3, 0:640:3])
        z = metres[v, u]
        camera = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z], axis=1)
        clouds.append(camera @ T[:3, :3].T + T[:3, 3])
    return np.concatenate(clouds)


def settled(diagnostics: list[Any]) -> bool:
    """Nothing new between the last two messages, and every frame that was handed over has met its fate."""
    if len(diagnostics) < 2:
        return False
    last, before = (
        {pair.key: pair.value for status in array.status for pair in status.values} for array in diagnostics[:-3:-1]
    )
    fates = sum(int(count) for key, count in last.items() if key.startswith("frames."))
    same = all(last[key] == before.get(key) for key in last if key.startswith(("received.", "frames.")))
    return same and 0 < int(last["pairs.handed_over"]) == fates


def test_the_desk_is_seen_through_the_node(graph: Graph, tiny_model: Path) -> None:
    photographs = list(read_photographs(DESK))
    assert len(photographs) == COUNT
    graph.start_node(tiny_model, diagnostics__period=0.25)
    assert graph.transition("configure") and graph.transition("activate")
    scenes = graph.collect(PointCloud2, "/adatoken3d/scene_tokens")
    retained = graph.collect(PointCloud2, "/adatoken3d/retained_tokens")
    markers = graph.collect(MarkerArray, "/adatoken3d/markers")
    diagnostics = graph.collect(DiagnosticArray, "/diagnostics", 10)
    publisher = graph.start_script(ROOT / "tests" / "ros" / "publish_folder.py", str(DESK))
    graph.wait(lambda: "published" in publisher.log, "all photographs")
    graph.wait(lambda: settled(diagnostics), "the node to have taken what came")
    answer = graph.call(AskScene, "/adatoken3d/ask", AskScene.Request(question="What is on the desk?")).answer
    assert answer.status in (Answer.OK, Answer.TRUNCATED), answer.status_message
    graph.wait(lambda: retained and retained[-1].width == answer.spatial_tokens, "the retained tokens")
    graph.wait(lambda: scenes[-1].header.stamp == answer.header.stamp, "the scene's tokens")

    stamp = answer.header.stamp.sec * 10**9 + answer.header.stamp.nanosec
    assert (stamp - FIRST_NS) % STEP_NS == 0 and 0 <= (stamp - FIRST_NS) // STEP_NS < COUNT
    assert retained[-1].header.stamp == answer.header.stamp
    assert int(points_of(retained[-1], "retained").sum()) == answer.retained_tokens > 0
    tokens = points_of(scenes[-1], "x", "y", "z")
    assert len(tokens) >= answer.spatial_tokens >= 50

    views = next(marker for marker in markers[-1].markers if marker.ns == "views")
    seen_from = np.array([(point.x, point.y, point.z) for point in views.points[::16]])
    others = [p for p in photographs if np.linalg.norm(seen_from - p[4][:3, 3], axis=1).min() > 1e-6]
    assert len(others) >= COUNT // 3
    distance, _ = cKDTree(surface(others)).query(tokens)
    assert np.median(distance) < 0.03


@pytest.fixture(scope="module")
def desk_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as they are, lens and all, in an mcap bag."""
    messages: list[tuple[str, Any, int]] = []
    D = np.array(distortion(DESK))
    for stamp, rgb, depth, K, T in read_photographs(DESK):
        image = TYPES["sensor_msgs/msg/Image"]
        roi = TYPES["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        head = header(stamp, "camera")
        info = TYPES["sensor_msgs/msg/CameraInfo"](
            head,
            480,
            640,
            "plumb_bob",
            D,
            K.reshape(-1),
            np.eye(3).reshape(-1),
            np.zeros(12),
            0,
            0,
            roi,
        )
        pose = TYPES["geometry_msgs/msg/Pose"](
            TYPES["geometry_msgs/msg/Point"](*T[:3, 3]),
            TYPES["geometry_msgs/msg/Quaternion"](*rotation_to_quaternion(T[:3, :3])),
        )
        messages += [
            ("/rgb/image", image(head, 480, 640, "rgb8", 0, 1920, rgb.reshape(-1)), stamp),
            ("/depth/image", image(head, 480, 640, "16UC1", 0, 1280, depth.view(np.uint8).reshape(-1)), stamp),
            ("/rgb/camera_info", info, stamp),
            ("/pose", TYPES["geometry_msgs/msg/PoseStamped"](header(stamp, "map"), pose), stamp),
        ]
    return write(tmp_path_factory.mktemp("bag") / "desk", messages)


def test_the_desk_is_read_from_a_bag(desk_bag: Path) -> None:
    count = 0
    for frame, (stamp, rgb, depth, K, T) in zip(read_bag(desk_bag), read_photographs(DESK), strict=True):
        assert frame.stamp_ns == stamp
        flat, metres = straightened(rgb, depth, K)
        assert np.array_equal(frame.rgb, flat)
        assert np.array_equal(frame.depth, metres, equal_nan=True)
        assert np.array_equal(frame.K, K)
        np.testing.assert_allclose(frame.T_world_camera, T, atol=1e-5)
        count += 1
    assert count == COUNT


def test_ask_answers_from_the_bag_as_from_the_folder(desk_bag: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "desk"
    folder.mkdir()
    for name in ("color", "depth", "pose", "intrinsics.json"):
        (folder / name).symlink_to(DESK / name)
    times = (FIRST_NS + i * STEP_NS for i in range(COUNT))
    (folder / "times.txt").write_text("\n".join(f"{t // 10**9}.{t % 10**9:09}" for t in times))
    records = []
    for source in (("--bag", str(desk_bag)), ("--folder", str(folder))):
        path = tmp_path / "record.json"
        given = ["--model", str(tiny_model), *source, "--stride", "6", "--max-new-tokens", "8", "--json", str(path)]
        assert main(["ask", "What is on the desk?", *given]) == 0
        content = json.loads(path.read_text())
        records.append({key: value for key, value in content.items() if not key.endswith("_ms")})
    assert records[0] == records[1]
    assert records[0]["text"] and 0 < records[0]["retained_tokens"] < records[0]["spatial_tokens"]
    assert records[0]["stamp_ns"] == FIRST_NS + 30 * STEP_NS, "the last photograph is too similar to be kept"
