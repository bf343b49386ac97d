# SPDX-License-Identifier: Apache-2.0
"""The scene node, with RViz and a bag on request.

    ros2 launch adatoken3d adatoken3d.launch.py model:=/path/to/checkpoint rgb_topic:=/camera/color/image_raw ...

`ros2 launch adatoken3d adatoken3d.launch.py --show-args` lists every argument.
"""

from __future__ import annotations

from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

BOOLEAN = ["true", "false"]
# Launch argument -> the parameter that it sets unless it is empty.
PARAMETERS = {"model": "model.path", "pose_source": "pose.source", "input_source": "input.source"}
# Launch argument -> the node's own (relative) topic name.
TOPICS = {
    "rgb_topic": "rgb/image",
    "rgb_info_topic": "rgb/camera_info",
    "depth_topic": "depth/image",
    "depth_info_topic": "depth/camera_info",
    "points_topic": "points",
    "odom_topic": "odom",
    "pose_topic": "pose",
}


def generate_launch_description() -> LaunchDescription:
    """Called by `ros2 launch`."""
    share = FindPackageShare("adatoken3d")
    arguments = [
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and of its topics."),
        DeclareLaunchArgument(
            "params_file",
            default_value=PathJoinSubstitution([share, "config", "adatoken3d.yaml"]),
            description="Parameter file of the node; the package's config folder has one for each use.",
        ),
        DeclareLaunchArgument(
            "model",
            default_value="",
            description="Directory of the model's checkpoint (safetensors); empty: model.path of the parameter file.",
        ),
        DeclareLaunchArgument(
            "pose_source",
            default_value="",
            choices=["", "tf", "odometry", "pose_topic", "static"],
            description="Where camera poses come from; empty: pose.source of the parameter file.",
        ),
        DeclareLaunchArgument(
            "input_source",
            default_value="",
            choices=["", "rgbd", "organised_points", "points_with_camera", "points"],
            description="What frames are made of, images or clouds; empty: input.source of the parameter file.",
        ),
        DeclareLaunchArgument(
            "rviz", default_value="false", choices=BOOLEAN, description="Start RViz with the package's view."
        ),
        DeclareLaunchArgument(
            "autostart",
            default_value="true",
            choices=BOOLEAN,
            description="Configure (load the model) and activate the node; false: leave that to a lifecycle manager.",
        ),
        DeclareLaunchArgument(
            "use_sim_time",
            default_value="false",
            choices=BOOLEAN,
            description="Take the time from /clock; always so when a bag is played.",
        ),
        DeclareLaunchArgument(
            "log_level",
            default_value="info",
            choices=["debug", "info", "warn", "error", "fatal"],
            description="Least severe messages that the node logs.",
        ),
        DeclareLaunchArgument(
            "bag",
            default_value="",
            description="Bag to play with --clock as soon as the node is active; empty: live topics.",
        ),
        *(
            DeclareLaunchArgument(argument, default_value=topic, description=f"Topic to use for the node's '{topic}'.")
            for argument, topic in TOPICS.items()
        ),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes, now that the arguments have values."""
    names = ("bag", "autostart", *PARAMETERS)
    value = {name: LaunchConfiguration(name).perform(context) for name in names}
    sim_time = bool(value["bag"]) or LaunchConfiguration("use_sim_time").perform(context) == "true"
    overrides: dict[str, str | bool] = {"use_sim_time": sim_time, "autostart": False}
    overrides.update({parameter: value[name] for name, parameter in PARAMETERS.items() if value[name]})

    node = LifecycleNode(
        package="adatoken3d",
        executable="adatoken3d_node",
        name="adatoken3d",
        namespace=LaunchConfiguration("namespace"),
        parameters=[LaunchConfiguration("params_file"), overrides],
        remappings=[(topic, LaunchConfiguration(argument)) for argument, topic in TOPICS.items()],
        arguments=["--ros-args", "--log-level", ["adatoken3d:=", LaunchConfiguration("log_level")]],
        output="screen",
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        namespace=LaunchConfiguration("namespace"),
        arguments=["-d", PathJoinSubstitution([FindPackageShare("adatoken3d"), "config", "adatoken3d.rviz"])],
        remappings=[(topic, LaunchConfiguration(argument)) for argument, topic in TOPICS.items()],
        parameters=[{"use_sim_time": sim_time}],
        condition=IfCondition(LaunchConfiguration("rviz")),
        output="screen",
    )
    player = [ExecuteProcess(cmd=["ros2", "bag", "play", "--clock", "100", value["bag"]], output="screen")]
    player = player if value["bag"] else []

    if value["autostart"] != "true":
        return [node, rviz, *player]
    # Only the way up is followed: a node that somebody deactivates later stays so.
    when_inactive = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(node, Transition.TRANSITION_ACTIVATE)],
    )
    # A bag that starts before the model is loaded would play to nobody.
    when_active = OnStateTransition(
        target_lifecycle_node=node, start_state="activating", goal_state="active", entities=player
    )
    return [
        RegisterEventHandler(when_inactive),
        RegisterEventHandler(when_active),
        node,
        change(node, Transition.TRANSITION_CONFIGURE),
        rviz,
    ]


def change(node: LifecycleNode, transition: int) -> EmitEvent:
    """The request that `node` makes a lifecycle transition."""
    return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))
