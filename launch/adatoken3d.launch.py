# SPDX-License-Identifier: Apache-2.0
"""The scene node, with RViz and a bag on request.

    ros2 launch adatoken3d adatoken3d.launch.py camera:=realsense model:=/path/to/checkpoint

`ros2 launch adatoken3d adatoken3d.launch.py --show-args` lists every argument; what they mean for the node is decided
in adatoken3d_ros.ros.wiring.
"""

from __future__ import annotations

from pathlib import Path

from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.logging import launch_config
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.substitutions import FindPackageShare

from adatoken3d_ros.ros.wiring import ARGUMENTS, HELD_BACK, NODE, compressed_view, wire
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity


def generate_launch_description() -> LaunchDescription:
    """Called by `ros2 launch`."""
    declared = [
        DeclareLaunchArgument(
            a.name, default_value=a.default, description=a.description, choices=list(a.choices) or None
        )
        for a in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes, now that the arguments have values."""
    value = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in ARGUMENTS}
    config = Path(FindPackageShare(NODE).perform(context)) / "config"
    wiring = wire(value, config, context.launch_configurations.get("ros_namespace", ""))
    node = LifecycleNode(
        package=NODE,
        executable="adatoken3d_node",
        name=NODE,
        namespace=value["namespace"],
        parameters=[*map(str, wiring.files), wiring.parameters],
        remappings=list(wiring.remappings),
        arguments=["--ros-args", "--log-level", f"{wiring.logger}:={value['log_level']}"],
        prefix=HELD_BACK,
        exec_name="adatoken3d_node",
        output="screen",
    )
    beside: list[LaunchDescriptionEntity] = []
    if value["rviz"] == "true":
        view = config / "adatoken3d.rviz"
        if wiring.compressed:
            text = compressed_view(view.read_text())
            view = Path(launch_config.get_log_file_path("adatoken3d.rviz"))
            view.write_text(text)
        beside.append(
            Node(
                package="rviz2",
                executable="rviz2",
                namespace=value["namespace"],
                arguments=["-d", str(view), "-f", wiring.scene_frame],
                remappings=[*wiring.remappings, *wiring.view_remappings],
                parameters=[{"use_sim_time": wiring.sim_time}],
                output="screen",
            )
        )
    if value["bag"]:
        play = ExecuteProcess(cmd=["ros2", "bag", "play", "--clock", "100", value["bag"]], output="screen")
        # A bag that started before the model is loaded would play to nobody.
        when_active = OnStateTransition(
            target_lifecycle_node=node, start_state="activating", goal_state="active", entities=[play], handle_once=True
        )
        beside.append(RegisterEventHandler(when_active) if value["autostart"] == "true" else play)
    return [*beside, node]
