# SPDX-License-Identifier: Apache-2.0
"""A running node as the view's source: its scene with pictures, its answers with their tokens, parts of its scene."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ros_graph import Graph, synthetic_frame
from seeing_node import STAMP, VIEWS, SeeingNode
from std_srvs.srv import Trigger

from adatoken3d_ros.cli.view import ASKED_OF_NODE, node_source
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.pictures import encoded
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.ros.client import SceneClient
from adatoken3d_ros.view.dialogue import Dialogue
from adatoken3d_ros.view.report import report_page


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """With a strategy that was fitted to it."""
    path = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (path / "strategies").mkdir()
    mild = replace(default_strategy("ours", 8), name="mild", model_hash=registry.load(path)[0].identity)
    mild.save(path / "strategies" / "mild.yaml")
    return path


def test_a_node_is_seen_and_asked(graph: Graph, model: Path, tmp_path: Path) -> None:
    """The view comes when the node has seen what it has seen."""
    own = tmp_path / "own.yaml"
    replace(default_strategy("ours", 8), name="its own").save(own)
    live = SeeingNode(graph, model, click_question="And {p}?", strategy=own)
    client = SceneClient(context=graph.context)
    with closing(node_source(client, client.parameters(*ASKED_OF_NODE))) as source:
        assert client.parameters("no_such", "strategy") == {}
        assert (source.click_question, source.budget_ms, source.strategies[0]) == ("And {p}?", 0.0, str(own))
        graph.wait(lambda: len(source.scene().xyz) and len(source.scene().pictures) == VIEWS, "the scene")
        live.camera.send(live.camera.messages(STAMP + VIEWS * 100_000_000, *synthetic_frame(VIEWS)))
        graph.wait(lambda: len(source.scene().pictures) == VIEWS + 1, "a picture of the new key frame")
        scene = source.scene()
        for i, picture in enumerate(scene.pictures):
            rgb, _, _, pose = synthetic_frame(i)
            assert picture.stamp_ns == STAMP + i * 100_000_000 and picture.jpeg == encoded(rgb)[0]
            np.testing.assert_allclose(picture.pose, pose, atol=1e-6)
        assert set(scene.since_ns.tolist()) <= {STAMP + (VIEWS - 1) * 100_000_000, scene.stamp_ns}

        texts: list[str] = []
        stages: list[str] = []
        dialogue = Dialogue(source)
        question = Question("What is there?", max_new_tokens=4)
        first = dialogue.ask(question, "", texts.append, stages.append)
        record, tokens, left = first.answer.record, first.answer.tokens, first.answer.left
        assert {"prefill", "decode"} <= set(stages)
        assert record["text"] == texts[-1] and tokens is not None and left is not None
        assert len(tokens.xyz) == record["spatial_tokens"] and tokens.retained.sum() == record["retained_tokens"]
        # Every token that was left lights patches where it is, and no other patch is lit.
        lit = np.concatenate([picture.places[picture.lit(left)] for picture in scene.pictures])
        assert len(left.keys) > 0 and set(left.voxels.of(lit)) == set(left.keys)
        every = sum(int(np.isfinite(picture.places).all(axis=1).sum()) for picture in scene.pictures)
        assert len(lit) < every
        page = report_page([first.answer], scene.pictures, source.command(question, ""))
        assert page.count("<canvas data-picture=") == VIEWS + 1 and "are lit" in page

        pair = dialogue.again(first, tokens.xyz[::2], False, texts.append, lambda stage: None)
        other: Any = pair.right.answer.tokens
        assert 0 < len(other.xyz) < len(tokens.xyz)
        assert [text for text, _, _ in pair.chances][0] == first.text
        assert not any(math.isnan(before) for _, before, _ in pair.chances)
        assert "ros2 service call /adatoken3d/ask" in source.command(pair.right.question, "none")

        # A file is for who starts the node: it is asked for by no name.
        assert {"none", "mild"} < set(source.strategies)
        pair = dialogue.compare(question, (str(own), "mild"), texts.append, lambda stage: None)
        assert [one.answer.record["strategy"] for one in (pair.left, pair.right)] == ["its own", "mild"]
        assert "strategy" not in source.command(question, str(own))

        assert graph.call(Trigger, "/adatoken3d/clear_scene", Trigger.Request()).success
        graph.wait(lambda: not source.scene().pictures and not len(source.scene().xyz), "nothing to be seen")
