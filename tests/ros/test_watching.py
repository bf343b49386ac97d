# SPDX-License-Identifier: Apache-2.0
"""A running node as the view's source: its scene with pictures, its answers with their tokens, parts of its scene."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ros_graph import Graph, synthetic_frame
from seeing_node import STAMP, VIEWS, SeeingNode

from adatoken3d_ros.cli.view import node_source
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.ros.client import SceneClient
from adatoken3d_ros.ros.outputs.markers import _frustum
from adatoken3d_ros.ros.watching import poses_of
from adatoken3d_ros.view.dialogue import Dialogue
from tests.scene.room import walk


def test_poses_are_read_off_the_frusta() -> None:
    poses = np.stack(walk(3))
    found = poses_of(np.concatenate([_frustum(T) for T in poses]))
    np.testing.assert_allclose(found, poses, atol=1e-9)
    assert poses_of(np.zeros((0, 3))).shape == (0, 4, 4)


def test_a_node_is_seen_and_asked(graph: Graph, tiny_model: Path) -> None:
    live = SeeingNode(graph, tiny_model)
    with closing(node_source(SceneClient(context=graph.context), "What is at {p}?")) as source:
        graph.wait(lambda: len(source.scene().xyz) and len(source.scene().poses) == VIEWS, "the scene")
        topics = source._watcher._images
        graph.wait(lambda: len(topics) >= 2, "the image topics")
        graph.wait(lambda: all(graph.node.count_subscribers(topic) >= 2 for topic in topics), "who listens to them")
        live.camera.send(live.camera.messages(STAMP + VIEWS * 100_000_000, *synthetic_frame(VIEWS)))
        graph.wait(lambda: source.scene().pictures, "a picture of the new key frame")
        scene = source.scene()
        (picture,) = scene.pictures
        assert picture.stamp_ns == scene.stamp_ns == STAMP + VIEWS * 100_000_000
        np.testing.assert_allclose(picture.pose, synthetic_frame(VIEWS)[3], atol=1e-6)
        assert set(scene.since_ns.tolist()) <= {STAMP + (VIEWS - 1) * 100_000_000, scene.stamp_ns}

        texts: list[str] = []
        dialogue = Dialogue(source)
        question = Question("What is there?", max_new_tokens=4)
        first = dialogue.ask(question, "", texts.append, lambda stage: None)
        record, tokens = first.answer.record, first.answer.tokens
        assert record["text"] == texts[-1] and tokens is not None
        assert len(tokens.xyz) == record["spatial_tokens"] and tokens.retained.sum() == record["retained_tokens"]
        pair = dialogue.again(first, tokens.xyz[::2], False, texts.append, lambda stage: None)
        other: Any = pair.right.answer.tokens
        assert 0 < len(other.xyz) < len(tokens.xyz)
        assert [text for text, _, _ in pair.chances][0] == first.text
        assert not any(math.isnan(before) for _, before, _ in pair.chances)
        assert "ros2 service call /adatoken3d/ask" in source.command(pair.right.question, "none")
