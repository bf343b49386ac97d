# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d record` and `adatoken3d replay`: a question as a file, and a file asked again, with the same answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("adatoken3d.msg")


from adatoken3d_ros.cli.main import main
from adatoken3d_ros.cli.replay import Timed, timed_questions
from adatoken3d_ros.ros.bag import read_bag, recorded_questions
from adatoken3d_ros.scene.folder import read_folder
from tests.engine.scenes import room_frame

QUESTION = "What is on the wall?"
LATCHED = ("answer", "scene_tokens", "retained_tokens", "token_report", "markers", "key_frames")
SHORT = ("--max-new-tokens", "5")


@pytest.fixture(scope="module")
def recorded(tiny: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about the wall."""
    path = tmp_path_factory.mktemp("recorded") / "wall.mcap"
    options = ["--model", str(tiny), "--folder", str(folder), "--out", str(path), *SHORT]
    assert main(["record", QUESTION, "How many chairs are there?", *options]) == 0
    return path


def replay(path: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["replay", str(path), "--json", str(out), *options, *SHORT]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_recording_holds_the_frames_as_they_were(recorded: Path, folder: Path) -> None:
    for frame, other in zip(read_bag(recorded), read_folder(folder), strict=True):
        assert frame.stamp_ns == other.stamp_ns and np.array_equal(frame.rgb, other.rgb)
        np.testing.assert_array_equal(frame.depth, other.depth)
        np.testing.assert_allclose(frame.T_world_camera, other.T_world_camera, atol=1e-12)
        np.testing.assert_array_equal(frame.K, other.K)
    assert [text for _, text in recorded_questions(recorded)] == [QUESTION, "How many chairs are there?"]


def test_a_frame_at_the_time_zero_is_not_lost(tmp_path: Path) -> None:
    from adatoken3d_ros.engine.events import SceneView
    from adatoken3d_ros.ros.recording import write_recording

    frames = [replace(room_frame(index), stamp_ns=index * 100_000_000) for index in range(2)]
    write_recording(tmp_path / "two.mcap", frames, SceneView("map"), [])
    assert [frame.stamp_ns for frame in read_bag(tmp_path / "two.mcap")] == [1, 100_000_000]


def test_every_topic_and_its_definition_is_in_the_file(recorded: Path) -> None:
    """Another program's reader finds them: the definitions in the file are what its messages are decoded by."""
    from rclpy.serialization import deserialize_message
    from rosbags.rosbag2.storage_mcap import McapReader
    from visualization_msgs.msg import MarkerArray

    reader = McapReader(recorded)
    reader.open()
    found = {one.topic: one for one in reader.connections}
    markers = next(raw for one, _, raw in reader.messages([found["/adatoken3d/markers"]]))
    assert len(list(reader.messages([found["/adatoken3d/key_frames"]]))) == 1  # the same for both answers
    reader.close()
    goal = {"/adatoken3d/goal"} & set(found)  # where the answer has one
    assert set(found) - goal == {
        *("/rgb/image", "/rgb/camera_info", "/depth/image", "/depth/camera_info", "/tf", "/question"),
        *(f"/adatoken3d/{name}" for name in LATCHED),
    }
    definition = found["/adatoken3d/answer"].msgdef.data
    assert "MSG: adatoken3d/Box3D" in definition and "float32 confidence" in definition
    # RViz asks for latched topics; a file that does not say that they are is played without.
    durable = {topic: one.ext.offered_qos_profiles[0].durability.name for topic, one in found.items()}
    assert {topic for topic, name in durable.items() if name == "TRANSIENT_LOCAL"} == {
        f"/adatoken3d/{name}" for name in LATCHED
    }
    shown = {marker.ns for marker in deserialize_message(bytes(markers), MarkerArray).markers}
    assert {"views", "answer", "evidence"} <= shown


def test_it_is_answered_again_and_to_the_byte(recorded: Path, tiny: Path, folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    replayed = replay(recorded, first, "--model", str(tiny))
    replay(recorded, second, "--model", str(tiny))
    assert first.read_bytes() == second.read_bytes()
    assert [one["question"] for one in replayed] == [QUESTION, "How many chairs are there?"]
    asked = tmp_path / "ask.json"
    main(["ask", QUESTION, "--model", str(tiny), "--folder", str(folder), "--json", str(asked), *SHORT])
    told = json.loads(asked.read_text())
    same = ("text", "status", "spatial_tokens", "retained_tokens", "prefill_flops", "stamp_ns")
    assert {key: replayed[0][key] for key in same} == {key: told[key] for key in same}
    assert replayed[0]["data_age"] == pytest.approx(0.001)
    assert not any(key.endswith("_ms") for key in replayed[0])


def test_each_question_is_asked_at_its_time(recorded: Path, tiny: Path, tmp_path: Path) -> None:
    """Frames at 0, 0.1, 0.2 and 0.3 s: a question sees those that were there, and its data is as old as it says."""
    questions = tmp_path / "q.txt"
    questions.write_text(f"# late first\n9 {QUESTION}\n0.15 {QUESTION}\n1.25 {QUESTION}\n")
    report = tmp_path / "report.html"
    options = ("--model", str(tiny), "--questions", str(questions), "--report", str(report))
    found = replay(recorded, tmp_path / "a.jsonl", *options)
    assert [one["at"] for one in found] == [0.15, 1.25, 9.0]
    assert [sum(one["frames"].values()) for one in found] == [2, 4, 4]
    np.testing.assert_allclose([one["data_age"] for one in found], [0.05, 0.95, 8.7], atol=1e-9)
    assert found[0]["spatial_tokens"] < found[1]["spatial_tokens"]
    assert report.read_text().count(QUESTION) >= 3


def test_times_are_since_the_first_frame_or_of_the_bags_clock() -> None:
    found = timed_questions(["1.5 a b", "1700000000.25 c"], Path("q"))
    assert found == (Timed(1_500_000_000, "a b", False), Timed(1_700_000_000_250_000_000, "c", True))
    assert [one.due(10) for one in found] == [1_500_000_010, 1_700_000_000_250_000_000]


def test_what_is_wrong_is_named(
    recorded: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.txt"
    questions.write_text("What is this?\n")
    for arguments, said in (
        (["replay", str(recorded), "--questions", str(questions)], "'What is this?' begins with no time in seconds"),
        (["replay", str(tmp_path / "no.mcap")], "does not exist"),
        (["record", "What?", "--folder", str(folder), "--out", str(tmp_path / "x.bag")], "must be an .mcap file"),
        (["record", " ", "--folder", str(folder), "--out", str(tmp_path / "x.mcap")], "the question is empty"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
