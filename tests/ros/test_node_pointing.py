# SPDX-License-Identifier: Apache-2.0
"""A node with a grounding head, over DDS: which thing is meant, as boxes of the message and in RViz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from action_msgs.msg import GoalStatus
from adatoken3d.msg import Answer
from ros_graph import Graph
from seeing_node import NAME, STAMP, SeeingNode
from std_msgs.msg import String
from std_srvs.srv import Trigger
from test_node import Stream
from visualization_msgs.msg import MarkerArray

from tests.architectures import write_tiny
from tests.engine.scenes import THINGS, room_frame

QUESTION = "locate: the red chair"


class InARoom(SeeingNode):
    """It has seen two views of two things."""

    def show_views(self, first: int = 0) -> None:
        for index in range(2):
            frame = room_frame(index)  # 0.6 m farther each time
            depth = (frame.depth * 1000).round().astype(np.uint16)
            messages = self.camera.messages(
                STAMP + index * 1_000_000_000, frame.rgb, depth, frame.K, frame.T_world_camera
            )
            self.camera.send(messages)
            self.graph.wait(lambda count=index + 1: self.key_frames() >= count, f"key frame {index}")


def test_which_thing_is_meant(tmp_path: Path) -> None:
    graph = Graph(tmp_path)
    try:
        live = InARoom(graph, write_tiny("video3d", tmp_path / "tiny", seed=2, image_size=480, grounds=True))
        markers = graph.collect(MarkerArray, f"{NAME}/markers")
        answer = live.ask(QUESTION)
        assert answer.status == Answer.OK, answer.status_message
        assert " boxes" in answer.text
        assert len(answer.boxes) == answer.text.count("[") and answer.retained_tokens < answer.spatial_tokens
        for box in answer.boxes:
            place = box.center.position
            near = [np.hypot(place.x - centre[0], place.y - centre[1]) for centre, _ in THINGS]
            assert min(near) < 0.25 and 0 < box.size.z < 1
        graph.wait(lambda: markers and any(one.text == answer.text for one in markers[-1].markers), "the markers")
        assert sum(one.ns == "boxes" for one in markers[-1].markers) == len(answer.boxes)
        status, streamed = Stream(live, 6, QUESTION).end()
        assert (status, streamed.text) == (GoalStatus.STATUS_SUCCEEDED, answer.text)
        publisher = graph.node.create_publisher(String, "/question", 10)
        graph.wait(publisher.get_subscription_count, "a subscriber of the questions")
        told = len(live.answers)
        publisher.publish(String(data=QUESTION))
        graph.wait(lambda: len(live.answers) > told, "an answer on the topic")
        assert live.answers[-1].text == answer.text and live.answers[-1].boxes == answer.boxes
        assert graph.call(Trigger, f"{NAME}/clear_scene").success
        assert live.ask(QUESTION).status == Answer.NO_SCENE
    finally:
        graph.close()
