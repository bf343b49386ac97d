# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d ask` on small folders and bags: the same answer twice, the node's figures, errors in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from adatoken3d_ros.cli.ask import frames
from adatoken3d_ros.cli.main import main, parser
from adatoken3d_ros.cli.questions import Streamed
from adatoken3d_ros.engine import loading
from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.weights import embedded_path

TIMES = {f"{stage}_ms" for stage in ("queue", "encode", "tokens", "prefill", "decode", "total")}
TIMES |= {"plan"}  # tells the measured times of the stages


@pytest.fixture(scope="session")
def bag(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frames of `folder` as an mcap bag with odometry."""
    store = get_typestore(Stores.ROS2_KILTED)
    kinds = store.types
    path = tmp_path_factory.mktemp("bag") / "wall"
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        names = {
            "rgb/image": "sensor_msgs/msg/Image",
            "depth/image": "sensor_msgs/msg/Image",
            "rgb/camera_info": "sensor_msgs/msg/CameraInfo",
            "odom": "nav_msgs/msg/Odometry",
        }
        topics = {name: writer.add_connection(f"/{name}", kind, typestore=store) for name, kind in names.items()}

        def write(name: str, stamp_ns: int, **fields: Any) -> None:
            message = kinds[names[name]](**fields)
            writer.write(topics[name], stamp_ns, store.serialize_cdr(message, names[name]))

        for frame in read_folder(folder):
            stamp = kinds["builtin_interfaces/msg/Time"](*divmod(frame.stamp_ns, 10**9))
            camera = kinds["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")
            world = kinds["std_msgs/msg/Header"](stamp=stamp, frame_id="map")
            x, y, z = frame.T_world_camera[:3, 3]
            pose = kinds["geometry_msgs/msg/Pose"](
                position=kinds["geometry_msgs/msg/Point"](x, y, z),
                # The folder's camera looks along x: rotation of the optical frame to a z-up world.
                orientation=kinds["geometry_msgs/msg/Quaternion"](-0.5, 0.5, -0.5, 0.5),
            )
            zero = kinds["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
            write(
                "odom",
                frame.stamp_ns,
                header=world,
                child_frame_id="camera",
                pose=kinds["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
                twist=kinds["geometry_msgs/msg/TwistWithCovariance"](
                    twist=kinds["geometry_msgs/msg/Twist"](linear=zero, angular=zero), covariance=np.zeros(36)
                ),
            )
            roi = kinds["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
            write(
                "rgb/camera_info",
                frame.stamp_ns,
                header=camera,
                height=48,
                width=64,
                distortion_model="plumb_bob",
                d=np.zeros(5),
                k=frame.K.ravel(),
                r=np.eye(3).ravel(),
                p=np.hstack([frame.K, np.zeros((3, 1))]).ravel(),
                binning_x=0,
                binning_y=0,
                roi=roi,
            )
            depth = np.rint(frame.depth * 1000).astype(np.uint16)
            for name, pixels, encoding in (("rgb/image", frame.rgb, "rgb8"), ("depth/image", depth, "16UC1")):
                write(
                    name,
                    frame.stamp_ns,
                    header=camera,
                    height=48,
                    width=64,
                    encoding=encoding,
                    is_bigendian=0,
                    step=pixels.strides[0],
                    data=np.frombuffer(pixels.tobytes(), np.uint8),
                )
    return path


def ask(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The JSON record of a question that was answered, without the times."""
    record = tmp_path / "record.json"
    assert main(["ask", *arguments, "--max-new-tokens", "5", "--json", str(record)]) == 0
    content = json.loads(record.read_text())
    return {key: value for key, value in content.items() if key not in TIMES}


def test_folder_gives_the_same_answer_twice(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(tiny), "--folder", str(folder), "What is on the wall?")
    first, second = ask(tmp_path, *arguments), ask(tmp_path, *arguments)
    assert first == second
    assert first["question"] == "What is on the wall?"
    assert first["stamp_ns"] == 1_300_000_000
    assert 0 < first["retained_tokens"] < first["spatial_tokens"]
    assert first["prefill_flops"] < first["prefill_flops_unpruned"]
    assert "frames: 4 key_frame" in capsys.readouterr().out


def test_bag_gives_the_answer_of_the_folder_it_was_made_of(tiny: Path, folder: Path, bag: Path, tmp_path: Path) -> None:
    from_folder = ask(tmp_path, "--model", str(tiny), "--folder", str(folder), "What is here?")
    from_bag = ask(tmp_path, "--model", str(tiny), "--bag", str(bag), "What is here?")
    assert from_bag == from_folder


def test_the_cameras_place_can_be_given(
    tiny: Path, bag: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bag has no TF, its odometry is the camera's own: what is given counts, and what is no pose is named."""
    args = ["ask", "--bag", str(bag), "--model", str(tiny), "What is there?", "--base-to-camera"]
    (first, *_) = read_folder(folder)
    found = next(frames(parser()[0].parse_args([*args, "0 0 -1.5, 0 0 0"])))
    np.testing.assert_allclose(found.T_world_camera, first.T_world_camera @ place(z=-1.5), atol=1e-9)
    with pytest.raises(SystemExit):
        main([*args, "0 0 east"])
    assert "'0 0 east' is no pose" in capsys.readouterr().err


def place(z: float) -> np.ndarray:
    T = np.eye(4)
    T[2, 3] = z
    return T


def test_options_reach_the_session(tiny: Path, folder: Path, tmp_path: Path) -> None:
    common = ("--model", str(tiny), "--folder", str(folder), "What is this?")
    plain = ask(tmp_path, *common)
    unpruned = ask(tmp_path, *common, "--strategy", "none")
    assert unpruned["retained_tokens"] == unpruned["spatial_tokens"] == plain["spatial_tokens"]
    assert ask(tmp_path, *common, "--max-views", "1")["spatial_tokens"] < plain["spatial_tokens"]
    assert ask(tmp_path, *common, "--stride", "3")["stamp_ns"] == 1_300_000_000
    assert ask(tmp_path, *common, "--stride", "2")["stamp_ns"] == 1_200_000_000
    assert ask(tmp_path, *common, "--budget-ms", "60000")["budget_met"]
    assert ask(tmp_path, *common, "--click", "2", "0", "1")["status"] in ("OK", "TRUNCATED")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "NONE", "--folder", "FOLDER", "x"], "--model: NONE does not exist"),
        (["--model", "TINY", "--folder", "NONE", "x"], "--folder: NONE does not exist"),
        (["--model", "TINY", "--bag", "NONE", "x"], "--bag: NONE does not exist"),
        (["--model", "FOLDER", "--folder", "FOLDER", "x"], "config.json is missing"),
        (["--model", "TINY", "--folder", "TINY", "x"], "intrinsics.json"),
        (["--model", "TINY", "--folder", "FOLDER", " "], "the question is empty"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--budget-ms", "-1"], "got -1.0"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--click", "0", "nan", "0"], "clicks must be finite"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--strategy", "best"], "'best'"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--stride", "0"], "--stride 0"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--max-new-tokens", "-4"], "got -4"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--vision-path", "NONE"], "--vision-path: NONE does not exist"),
        (["--model", "TINY", "--folder", "FOLDER", "--questions", "NONE"], "--questions: NONE does not exist"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--json", "NONE/a.json"], "--json: NONE is no folder"),
        (["--model", "TINY", "--folder", "FOLDER", "x", "--json", "FOLDER"], "cannot be written to"),
        (["--model", "TINY", "--bag", "FOLDER", "x"], "no metadata.yaml and no .mcap or .db3 file, but an intrinsics"),
        (["--model", "TINY", "--folder", "BAG", "x"], "has no color, depth, pose, intrinsics.json; a folder of posed"),
        (["--model", "TINY", "--bag", "BAG", "x", "--rgb-topic", "/other"], "'/other'"),
        (["--model", "TINY", "--bag", "BAG", "x", "--pose-source", "tf"], "the bag's TF has no frame 'map'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tiny: Path,
    folder: Path,
    bag: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {"TINY": tiny, "FOLDER": folder, "BAG": bag, "NONE": tmp_path / "none"}
    paths |= {"NONE/a.json": tmp_path / "none" / "a.json"}
    assert main(["ask", *(str(paths.get(argument, argument)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.replace("NONE", str(paths["NONE"])) in error
    assert error.startswith("adatoken3d ask: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Describe the room.", "does not know the word Describe"),
        ("Is it safe to drive forward?", "does not know the words safe, drive, forward"),
        ("Is there a dragon in the room?", "does not know the word dragon"),
        ("Wo ist der Tisch?", "does not know the words Wo, ist, der, Tisch"),
    ],
)
def test_the_model_in_the_package_says_what_it_does_not_understand(
    folder: Path, tmp_path: Path, question: str, said: str
) -> None:
    answer = ask(tmp_path, "--model", str(embedded_path()), "--folder", str(folder), question)
    assert (answer["status"], answer["confidence"]) == ("UNSURE", 0.0) and said in answer["status_message"]


def test_the_model_in_the_package_says_how_sure_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", str(embedded_path()), "--folder", str(folder), "Is there a table in the room?")
    answer = ask(tmp_path, *asked)
    assert (answer["status"], answer["status_message"]) == ("OK", "") and 0 < answer["confidence"] < 1
    assert f"{answer['confidence']:.0%}" in capsys.readouterr().out
    unsure = ask(tmp_path, *asked, "--unsure-below", "1")
    assert unsure["status"] == "UNSURE" and "is below 1" in unsure["status_message"]
    assert unsure["text"] == answer["text"]


def test_question_that_the_session_refuses(
    tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["ask", "--model", str(tiny), "--folder", str(folder), "what is <image>"]) == 1
    assert "INVALID_REQUEST" in capsys.readouterr().out


def test_the_model_in_the_package_answers_where_none_is_named(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "embedded_path", lambda: tiny)
    assert ask(tmp_path, "--folder", str(folder), "What is here?")["model_id"].startswith(f"{tiny.name}@")


def test_a_file_of_questions_is_answered_about_one_scene(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", str(tiny), "--folder", str(folder))
    one_by_one = [ask(tmp_path, *common, text) for text in ("What is here?", "What is on the wall?")]
    loaded = []
    load = loading.load_engine
    monkeypatch.setattr(loading, "load_engine", lambda *given: loaded.append(1) or load(*given))
    questions, record = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("What is here?\n\n# no question\nWhat is on the wall?\n")
    capsys.readouterr()
    more = ("--questions", str(questions), "--max-new-tokens", "5", "--json", str(record))
    assert main(["ask", *common, *more]) == 0
    several = [json.loads(line) for line in record.read_text().splitlines()]
    assert [{key: value for key, value in one.items() if key not in TIMES} for one in several] == one_by_one
    assert loaded == [1]
    text = capsys.readouterr().out
    assert "frames: 4 key_frame" in text and text.index("What is here?\n") < text.index("What is on the wall?\n")
    questions.write_text("What is here?\nwhat is <image>\n")
    assert main(["ask", *common, "--questions", str(questions), "--json", str(record)]) == 1
    assert [json.loads(line)["status"] for line in record.read_text().splitlines()][1] == "INVALID_REQUEST"


def test_chat_answers_what_is_typed_until_an_empty_line(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", str(tiny), "--folder", str(folder))
    expected = ask(tmp_path, *common, "What is here?")
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("What is here?\nWhat is here?\n\nnever asked\n"))
    record = tmp_path / "answers.jsonl"
    assert main(["ask", *common, "--chat", "--max-new-tokens", "5", "--json", str(record)]) == 0
    assert [json.loads(line)["text"] for line in record.read_text().splitlines()] == [expected["text"]] * 2
    text = capsys.readouterr().out
    assert text.count(f"{expected['text']}\n  [{expected['status']}") == 2 and "never asked" not in text
    monkeypatch.setattr("sys.stdin", io.StringIO("locate: a chair\n"))
    assert main(["ask", *common, "--chat"]) == 1
    assert "\n(empty)\n  [INVALID_REQUEST: " in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["ask", *common, "--chat"]) == 0


def test_an_answer_is_shown_as_it_is_written() -> None:
    out = io.StringIO()
    streamed = Streamed(out)
    for text in ("a", "a chair", "a chair", "the chair"):
        streamed.show(text)
    assert out.getvalue() == "a chair\nthe chair"


def test_a_bag_of_clouds(tiny: Path, folder: Path, bag: Path, tmp_path: Path) -> None:
    """Organised clouds of the folder's frames give what the folder gives."""
    store, path = get_typestore(Stores.ROS2_KILTED), tmp_path / "clouds"
    kinds = store.types
    (first, *_) = read_folder(folder)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        names = {"/lidar": "sensor_msgs/msg/PointCloud2", "/pose": "geometry_msgs/msg/PoseStamped"}
        topics = {name: writer.add_connection(name, kind, typestore=store) for name, kind in names.items()}
        for frame in read_folder(folder):
            stamp = kinds["builtin_interfaces/msg/Time"](*divmod(frame.stamp_ns, 10**9))
            rows, columns = np.mgrid[:48, :64]
            points = np.zeros((48, 64), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("rgb", "<u4")])
            points["x"] = (columns - frame.K[0, 2]) / frame.K[0, 0] * frame.depth
            points["y"] = (rows - frame.K[1, 2]) / frame.K[1, 1] * frame.depth
            points["z"], wide = frame.depth, frame.rgb.astype(np.uint32)
            points["rgb"] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
            field = kinds["sensor_msgs/msg/PointField"]
            fields = [field(name, 4 * at, 7, 1) for at, name in enumerate(points.dtype.names or ())]
            header, data = kinds["std_msgs/msg/Header"](stamp, "camera"), np.frombuffer(points.tobytes(), np.uint8)
            cloud = kinds[names["/lidar"]](header, 48, 64, fields, False, 16, 16 * 64, data, True)
            x, y, z = frame.T_world_camera[:3, 3]
            pose = kinds["geometry_msgs/msg/Pose"](
                kinds["geometry_msgs/msg/Point"](x, y, z),
                kinds["geometry_msgs/msg/Quaternion"](-0.5, 0.5, -0.5, 0.5),
            )
            posed = kinds[names["/pose"]](kinds["std_msgs/msg/Header"](stamp, "map"), pose)
            for name, message in (("/pose", posed), ("/lidar", cloud)):
                writer.write(topics[name], frame.stamp_ns, store.serialize_cdr(message, names[name]))
    args = parser()[0].parse_args(["ask", "What?", "--bag", str(path), "--input-source", "organised_points"])
    found = list(frames(args))
    assert [frame.stamp_ns for frame in found] == [frame.stamp_ns for frame in read_folder(folder)]
    np.testing.assert_array_equal(found[0].rgb, first.rgb)
    np.testing.assert_allclose(found[0].depth, first.depth, atol=1e-5)
    record = ask(tmp_path, "--model", str(tiny), "--bag", str(path), "--input-source", "organised_points", "What?")
    assert record["stamp_ns"] == 1_300_000_000 and record["spatial_tokens"]
