# SPDX-License-Identifier: Apache-2.0
"""What the doctor makes of what it sees, case by case: each thing that is wrong has something that mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adatoken3d_ros.ros.findings import Input, Transforms, of_input, of_memory, of_shared_memory, of_transforms

IMAGE = "sensor_msgs/msg/Image"
WELL = Input("/rgb/image", IMAGE, publishers=["/camera"], count=60, seconds=2.0, size=1000, frame="optical", age=0.02)


@pytest.mark.parametrize(
    ("changes", "level", "text", "mend"),
    [
        ({}, "ok", "30.0 messages a second from /camera", ""),
        (
            {"publishers": (), "others": ["/cam/color/image_raw", "/cam/depth/image_raw"]},
            "error",
            "nobody publishes it (sensor_msgs/msg/Image)",
            "rgb_topic:=/cam/color/image_raw or /cam/depth/image_raw",
        ),
        ({"publishers": ()}, "error", "nobody publishes it", "start the camera's driver"),
        ({"publishers": (), "topic": "/x", "others": ["/y"]}, "error", "nobody publishes it", "as the topic of /y"),
        ({"publishers": (), "needed": False}, "ok", "it is not needed", ""),
        ({"count": 0}, "error", "/camera publishes it, but nothing came in 2 s", "ros2 topic hz /rgb/image"),
        ({"count": 0, "needed": False}, "warning", "nothing came", "ros2 topic hz /rgb/image"),
        ({"count": 0, "streamed": False}, "ok", "nothing new in 2 s", ""),
        ({"count": 1}, "warning", "0.50 messages a second, less than 1", "raise the rate"),
        ({"publishers": ["/a", "/b"]}, "warning", "2 publishers: /a, /b", "stop one of them"),
        ({"age": 7.25}, "warning", "its stamps are 7.2 s old as they come", "chronyc tracking"),
        ({"age": -3.0}, "warning", "3.0 s in the future", "use_sim_time:=true"),
        (
            {
                "mismatches": [
                    "/rgb/image: /camera offers best_effort, volatile, and reliable, volatile is asked for, which do "
                    "not go together: set qos_overrides./rgb/image.subscription.reliability to best_effort"
                ]
            },
            "error",
            "/camera offers best_effort",
            "-p qos_overrides./rgb/image.subscription.reliability:=best_effort",
        ),
        (
            {"mismatches": [f"/rgb/image: /c publishes sensor_msgs/msg/CompressedImage, and {IMAGE} is asked for"]},
            "error",
            "publishes sensor_msgs/msg/CompressedImage",
            "transport:=compressed",
        ),
    ],
)
def test_an_input(changes: dict[str, Any], level: str, text: str, mend: str) -> None:
    (found,) = of_input(replace(WELL, **changes))
    assert (found.level, found.about) == (level, changes.get("topic", WELL.topic))
    assert text in found.text and mend in found.mend and bool(found.mend) == (level != "ok")


FRAMES = ("base_link", "camera_link", "odom", "optical")


@pytest.mark.parametrize(
    ("seen", "level", "text", "mend"),
    [
        (Transforms("map", "optical"), "error", "nothing came on /tf", "pose_source:=odometry"),
        (Transforms("map", "optical", FRAMES), "error", "no frame 'map', only base_link", "scene_frame:=odom"),
        (Transforms("odom", "optical", FRAMES, True), "ok", "from 'optical' to 'odom'", ""),
        (Transforms("odom", "", FRAMES), "ok", "no image named its own", ""),
        (
            Transforms("odom", "optical", FRAMES, False, "camera_link"),
            "error",
            "no way leads from 'optical' to 'odom'",
            "--frame-id base_link --child-frame-id camera_link",
        ),
        (Transforms("odom", "other", FRAMES, False, ""), "error", "'other'", "--child-frame-id other"),
    ],
)
def test_transforms(seen: Transforms, level: str, text: str, mend: str) -> None:
    (found,) = of_transforms(seen)
    assert found.level == level and text in found.text and mend in found.mend and bool(found.mend) == (level != "ok")


@pytest.mark.parametrize(
    ("size", "environment", "free", "level", "text"),
    [
        (1000, {}, 2**30, "ok", "half a megabyte is enough"),
        (2**20, {}, 2**30, "warning", "what /camera sends at once has 1.00 MiB"),
        (2**20, {"FASTDDS_DEFAULT_PROFILES_FILE": "p.xml"}, 2**30, "ok", "p.xml; 1024 MiB"),
        (2**20, {"FASTRTPS_DEFAULT_PROFILES_FILE": "p.xml"}, 2**20, "warning", "1 MiB of /dev/shm are free"),
        (2**20, {"RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}, 0, "ok", "the middleware is rmw_cyclonedds_cpp"),
    ],
)
def test_shared_memory(size: int, environment: dict[str, str], free: int, level: str, text: str) -> None:
    (found,) = of_shared_memory([replace(WELL, size=size)], environment, free, "/share/fastdds_shm.xml")
    assert found.level == level and text in found.text and bool(found.mend) == (level != "ok")
    if size > 1000 and not environment:
        assert "export FASTDDS_DEFAULT_PROFILES_FILE=/share/fastdds_shm.xml" in found.mend


def test_messages_that_fit_alone_and_not_together() -> None:
    """Colour and depth of one camera, 0.29 MiB each, go through the half megabyte of its process."""
    colour, depth = replace(WELL, size=300_000), replace(WELL, topic="/depth/image", size=300_000)
    (found,) = of_shared_memory([colour, depth], {}, 2**30, "")
    assert found.level == "warning" and "what /camera sends at once has 0.57 MiB" in found.text
    (found,) = of_shared_memory([colour, replace(depth, publishers=["/lidar"])], {}, 2**30, "")
    assert found.level == "ok"


def test_memory() -> None:
    assert of_memory(4 * 10**9)[0].text == "4.00 GB are free"
    (found,) = of_memory(4 * 10**9, "1.00 GB", "small", "cuda:0")
    assert found.level == "ok" and found.text == "4.00 GB are free on cuda:0, small needs 1.00 GB"
    (found,) = of_memory(1, "14 GB", "llava", problem="too much", instead=["model.quantization: int4"])
    assert (found.level, found.text) == ("error", "too much")
    assert found.mend == "end other programs, or take model.quantization: int4"
    assert "model:=" in of_memory(1, problem="far too much")[0].mend
