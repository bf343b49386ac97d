# SPDX-License-Identifier: Apache-2.0
"""The scene node and a moving RGB-D camera in a furnished room: everything, with no robot.

ros2 launch adatoken3d demo.launch.py rviz:=true
ros2 service call /adatoken3d/ask adatoken3d/srv/AskScene "{question: 'Is there a bed in the room?'}"
ros2 topic echo --once --full-length /demo_camera/questions   # more of them, with their answers
"""

from __future__ import annotations

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, LogInfo, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from adatoken3d_ros.cli.demo import SEED, default_model, tiny_checkpoint
from adatoken3d_ros.ros.wiring import HELD_BACK
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

BOOLEAN = ["true", "false"]


def generate_launch_description() -> LaunchDescription:
    """Called by `ros2 launch`."""
    arguments = [
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of both nodes."),
        DeclareLaunchArgument(
            "params_file",
            default_value=PathJoinSubstitution([FindPackageShare("adatoken3d"), "config", "demo.yaml"]),
            description="Parameter file of the scene node.",
        ),
        DeclareLaunchArgument(
            "camera_params_file",
            default_value=PathJoinSubstitution([FindPackageShare("adatoken3d"), "config", "demo_camera.yaml"]),
            description="Parameter file of the camera.",
        ),
        DeclareLaunchArgument(
            "model",
            default_value="",
            description="Directory of the model's checkpoint; empty: the small one that comes with the package, or "
            "where there is none a tiny one with random weights, whose answers mean nothing.",
        ),
        DeclareLaunchArgument(
            "rviz", default_value="false", choices=BOOLEAN, description="Start RViz with the package's view."
        ),
        DeclareLaunchArgument(
            "autostart", default_value="true", choices=BOOLEAN, description="Configure and activate the scene node."
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="Least severe messages that the scene node logs.",
        ),
        DeclareLaunchArgument("seed", default_value=str(SEED), description="Seed of the room."),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes, now that the arguments have values."""
    model = LaunchConfiguration("model").perform(context)
    notes: list[LaunchDescriptionEntity] = []
    if not model:
        path, tiny = default_model()
        model = str(tiny_checkpoint() if tiny else path)
        kind = "a tiny model with random weights answers ({}); give a trained one with model:=DIR"
        notes = [
            LogInfo(msg=(kind if tiny else "the small model that comes with the package answers ({})").format(model))
        ]
    scene = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(
            PathJoinSubstitution([FindPackageShare("adatoken3d"), "launch", "adatoken3d.launch.py"])
        ),
        launch_arguments={
            "model": model,
            **{
                name: LaunchConfiguration(name)
                for name in ("namespace", "params_file", "rviz", "autostart", "log_level")
            },
        }.items(),
    )
    seed = ParameterValue(LaunchConfiguration("seed"), value_type=int)
    camera = Node(
        package="adatoken3d",
        executable="demo_camera",
        name="demo_camera",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("camera_params_file"), {"seed": seed}],
        prefix=HELD_BACK,
        exec_name="demo_camera",
        output="screen",
    )
    return [*notes, scene, camera]
