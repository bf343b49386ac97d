# SPDX-License-Identifier: Apache-2.0
"""The scene node on a robot that is only a bag: RealSense names, odometry of the base, TF with a late map -> odom.

    python -m examples.robot.robot_bag /tmp/robot
    ros2 launch examples/robot/robot.launch.py bag:=/tmp/robot pose_source:=odometry scene_frame:=odom

To be started in the repository's root, with the package installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from adatoken3d_ros.ros.wiring import HELD_BACK
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

ROOT = Path(__file__).resolve().parents[2]
CAMERA = "/camera/camera"
TOPICS = {
    "rgb/image": f"{CAMERA}/color/image_raw",
    "rgb/camera_info": f"{CAMERA}/color/camera_info",
    "depth/image": f"{CAMERA}/aligned_depth_to_color/image_raw",
    "depth/camera_info": f"{CAMERA}/aligned_depth_to_color/camera_info",
    "pose": "/camera_pose",
}


def generate_launch_description() -> LaunchDescription:
    """Called by `ros2 launch`."""
    arguments = {
        "bag": ("", "The robot's bag, of examples.robot.robot_bag."),
        "model": ("", "Directory of the checkpoint; empty: the small model in the package."),
        "pose_source": ("tf", "tf, odometry or pose_topic."),
        "scene_frame": ("map", "Frame of the scene; odom where poses are odometry."),
        "rate": ("1.0", "How fast the bag is played."),
    }
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in arguments.items()
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The node, and the player, which waits for it."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ("bag", "model", "pose_source", "rate")}
    scene = Node(
        package="adatoken3d",
        executable="adatoken3d_node",
        name="adatoken3d",
        parameters=[
            {
                "autostart": True,
                "use_sim_time": True,
                "model.path": value["model"],
                "pose.source": value["pose_source"],
                "scene.frame_id": LaunchConfiguration("scene_frame"),
                "qos.reliability": "best_effort",
            }
        ],
        remappings=list(TOPICS.items()),
        prefix=HELD_BACK,
        output="screen",
    )
    player = ExecuteProcess(
        cmd=[sys.executable, "-m", "examples.robot.play", value["bag"], "--rate", value["rate"]],
        cwd=str(ROOT),
        output="screen",
    )
    return [scene, player]
