# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adatoken3d_ros.cli.calibrate import (
    GENERAL_QUESTIONS,
    default_questions,
    parse_gates,
    read_questions,
    write_self_test,
)
from adatoken3d_ros.cli.main import main
from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.self_test import FILE, read_known
from adatoken3d_ros.engine.understanding import Understanding
from adatoken3d_ros.lab.information import InformationSet
from adatoken3d_ros.lab.synthetic.wordings import WORDINGS
from adatoken3d_ros.lab.training.language import understanding
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy, StrategyError
from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from tests.engine.scenes import ask, new_scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers=5)


def write_scene(folder: Path, seed: int) -> Path:
    """Three views of a rough wall, the camera 1 m high and moving along x, looking along +y."""
    random = np.random.default_rng(seed)
    for name in ("color", "depth", "pose"):
        (folder / name).mkdir(parents=True)
    for index in range(3):
        T = np.eye(4)
        T[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
        T[:3, 3] = [0.5 * index, 0.0, 1.0]
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / "color" / f"{index}.png")
        depth = random.integers(1500, 2500, (60, 80)).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{index}.png")
        np.savetxt(folder / "pose" / f"{index}.txt", T)
    intrinsics = {"width": 80, "height": 60, "fx": 65, "fy": 65, "cx": 40, "cy": 30, "depth_scale": 1000}
    (folder / "intrinsics.json").write_text(json.dumps(intrinsics))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("scenes")
    return [write_scene(root / name, seed) for seed, name in enumerate(("kitchen", "office"))]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.txt"
    path.write_text("# about rooms\nWhat is here?\n\nWhere is the wall?\n")
    return path


def calibrate(model: Path, scenes: list[Path], questions: Path, *more: str) -> int:
    folder = questions.parent
    return main(
        [
            *("calibrate", "--model", str(model), "--folder", *map(str, scenes), "--questions", str(questions)),
            *(
                "--out",
                str(folder / "strategy.yaml"),
                "--report",
                str(folder / "report"),
                "--answer-tokens",
                "2",
                *more,
            ),
        ]
    )


def test_the_strategy_runs_on_its_model_and_on_no_other(
    model: Path, scenes: list[Path], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(model, scenes, questions, "--end-share", "0.2", "--max-gates", "2") == 0
    strategy = Strategy.load(questions.parent / "strategy.yaml")
    assert 1 <= len(strategy.schedule.stages) <= 2
    assert strategy.info["made_from"] == {"scenes": ["kitchen", "office"], "prompts": 4}
    assert 0 < strategy.info["figures"]["flops_reduction"]["exact"] < 1
    assert strategy.info["figures"]["kl"] > 0
    shown = capsys.readouterr().out
    assert "adatoken-ours" in shown and "projection" in shown

    loaded, tokenizer, _ = registry.load(model)
    session = new_scene(loaded, tokenizer, strategy=strategy)
    for frame in read_folder(scenes[0]):
        session.observe(frame)
    answer = ask(session, Question("What is here?", max_new_tokens=2))
    assert answer.status in (Status.OK, Status.TRUNCATED) and answer.strategy == "adatoken-ours"
    assert answer.retained_tokens < answer.spatial_tokens
    with pytest.raises(StrategyError, match="made for the model"):
        strategy.check("0" * 16)


def test_the_report_holds_what_was_mined(model: Path, scenes: list[Path], questions: Path) -> None:
    assert calibrate(model, scenes, questions) == 0
    report = questions.parent / "report"
    mined = InformationSet.load(report / "information")
    assert mined.questions == ("What is here?", "Where is the wall?") * 2
    assert mined.scenes == ("kitchen", "kitchen", "office", "office")
    assert mined.concentration("projection")["gini"].low is not None
    assert (report / "information.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((report / "calibration.json").read_text())["curve"]) == mined.prompts[0].n_layers


def test_calibrated_strategies_save_what_was_asked(model: Path, scenes: list[Path], questions: Path) -> None:
    questions.write_text("What is here?")
    more = ("--kind", "calibrated", "--flops-reduction", "0.5", "--max-gates", "2", "--withdraw", "--horizon-kl", "9")
    assert calibrate(model, scenes[:1], questions, *more) == 0
    strategy = Strategy.load(questions.parent / "strategy.yaml")
    assert strategy.schedule.withdraw_layer == 0  # nothing moves answers by 9 nats
    assert strategy.info["figures"]["cost_within_limit"] is True
    assert strategy.info["figures"]["cost_share"] <= 0.5
    assert json.loads((questions.parent / "report" / "calibration.json").read_text())["withdrawal"][-1] == 0


def test_what_the_policy_is_told_of_the_model(model: Path, scenes: list[Path], questions: Path) -> None:
    questions.write_text("What is here?")
    more = ("--kind", "given", "--gates", "2:0.5", "--debias", "4", "--sink-dims", "3,7")
    assert calibrate(model, scenes[:1], questions, *more) == 0
    strategy = Strategy.load(questions.parent / "strategy.yaml")
    assert strategy.options["sink_dims"] == [3, 7]
    mined = InformationSet.load(questions.parent / "report" / "information")
    assert strategy.options["debias"] == mined.position_curve(4)


def test_given_lists_and_bags(
    model: Path, scenes: list[Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adatoken3d_ros.ros import bag

    def read_bag(path: Path, **options: object) -> Iterator[PosedFrame]:
        assert path == tmp_path / "room.mcap"
        return read_folder(scenes[0])

    monkeypatch.setattr(bag, "read_bag", read_bag)
    (tmp_path / "room.mcap").touch()
    arguments = ["--questions", str(questions), "--kind", "given", "--gates", "2:0.5,4:0.25", "--policy", "fastv"]
    where = ["--out", str(tmp_path / "s.yaml"), "--report", str(tmp_path / "r")]
    assert main(["calibrate", "--model", str(model), "--bag", str(tmp_path / "room.mcap"), *arguments, *where]) == 0
    strategy = Strategy.load(tmp_path / "s.yaml")
    assert strategy.schedule == Schedule.of([2, 4], [0.5, 0.25])
    assert (strategy.name, strategy.policy) == ("given-fastv", "fastv")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--kind", "given", "--end-share", "0.1"), "--end-share is for --kind adatoken"),
        (("--flops-reduction", "0.5"), "--flops-reduction is for --kind mined or calibrated"),
        (("--withdraw",), "--withdraw is for --kind mined or calibrated"),
        (("--end-share", "1.5"), "--end-share 1.5"),
        (("--kind", "calibrated", "--flops-reduction", "nan"), "--flops-reduction nan"),
        (("--kind", "calibrated", "--max-kl", "-1"), "--max-kl -1"),
        (("--kind", "calibrated", "--flops-reduction", "0.999"), "cannot be reached"),
        (("--kind", "given"), "needs --gates"),
        (("--kind", "given", "--gates", "2:0.5,x"), "'x' is no LAYER:RATIO"),
        (("--kind", "given", "--gates", "2:0.5,3:0.7"), "0.7 follows 0.5"),
        (("--kind", "given", "--gates", "99:0.5"), "99 is outside a model"),
        (("--policy", "magic"), "'magic'"),
        (("--max-gates", "0"), "--max-gates 0"),
        (("--debias", "0"), "--debias 0"),
        (("--debias", "4", "--policy", "fastv"), "'debias'"),
        (("--sink-dims", "3,x"), "'x' is no dimension"),
    ],
)
def test_mistakes_are_named(
    more: tuple[str, ...],
    message: str,
    model: Path,
    scenes: list[Path],
    questions: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    questions.write_text("What is here?")
    assert calibrate(model, scenes[:1], questions, *more) == 2
    told = capsys.readouterr()
    assert message in " ".join(told.err.split())
    assert ("frames:" in told.out) == (message == "cannot be reached")  # only that takes work to find out
    assert not (questions.parent / "strategy.yaml").exists()


def test_missing_input_is_named(
    model: Path, scenes: list[Path], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(model, [scenes[0].parent / "garage"], questions) == 2
    assert "garage does not exist" in capsys.readouterr().err
    questions.write_text("\n# nothing\n")
    assert calibrate(model, scenes, questions) == 2
    assert "holds no question" in capsys.readouterr().err


def test_question_files(tmp_path: Path) -> None:
    path = tmp_path / "q"
    path.write_text("  One? \n#two\n\nThree?")
    assert read_questions(path) == ("One?", "Three?")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_questions(path)
    path.write_bytes(b"?" * (1 << 20) + b"?")
    with pytest.raises(ValueError, match="larger"):
        read_questions(path)


def test_gates() -> None:
    assert parse_gates("8:0.5,16:0.25") == Schedule.of([8, 16], [0.5, 0.25])


def test_without_questions_a_model_is_asked_what_it_was_trained_for(
    model: Path, scenes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that `adatoken3d train` made, about places of each scene; of any other the general questions are asked."""
    own = tmp_path / "own"
    shutil.copytree(model, own)
    content = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**content, "training": {"seed": 0}}))
    kept = ("--kind", "given", "--gates", "2:0.9", "--answer-tokens", "0")
    asked = {}
    for path, folders in ((own, scenes), (model, scenes[:1])):
        where = ("--out", str(tmp_path / "s.yaml"), "--report", str(tmp_path / "r"))
        assert main(["calibrate", "--model", str(path), "--folder", *map(str, folders), *kept, *where]) == 0
        asked[path] = InformationSet.load(tmp_path / "r" / "information")
    assert asked[model].questions == GENERAL_QUESTIONS
    first, second = asked[own].questions[: len(WORDINGS)], asked[own].questions[len(WORDINGS) :]
    assert len(first) == len(second) == len(WORDINGS) and first != second
    for question in (*first, *second):
        for x, y, z in parse_clicks(question)[1]:
            assert -4 < x < 5 and 0 < y < 3 and -1 < z < 3  # on the wall that the views show


def test_a_model_that_says_what_it_understands_is_asked_nothing_else(model: Path) -> None:
    known = understanding()
    for families, number in ((list(known["wordings"]), len(WORDINGS)), (["count", "colour"], 2)):
        only = {name: known["wordings"][name] for name in families}
        told = Understanding(known["words"], known["things"], known["colours"], only)
        scene: Any = SimpleNamespace(
            tokens=lambda: SimpleNamespace(xyz=torch.ones(3, 3)),
            runtime=SimpleNamespace(understanding=told, model=SimpleNamespace(takes_clicks=True)),
        )
        asked = default_questions(model)(scene, 0)
        assert len(asked) == number
        assert {told.judge(parse_clicks(question)[0])[0] for question in asked} == set(families)


def test_what_moves_answers_much_is_said_last(
    model: Path, scenes: list[Path], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions.write_text("What is here?")
    for gates, warned in (("1:0.01", True), ("4:0.99", False)):
        assert calibrate(model, scenes[:1], questions, "--kind", "given", "--gates", gates) == 0
        kl = Strategy.load(questions.parent / "strategy.yaml").info["figures"]["kl"]
        assert (kl > 0.05) == warned
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("WARNING") == warned
        assert not warned or f"by {kl:.2g} nats" in last and "--kind calibrated" in last


def test_mined_strategies_keep_their_limit_and_begin_before_the_first_layer_if_that_is_best(
    model: Path, scenes: list[Path], questions: Path
) -> None:
    questions.write_text("What is here?")
    assert calibrate(model, scenes[:1], questions, "--kind", "mined", "--flops-reduction", "0.4") == 0
    strategy = Strategy.load(questions.parent / "strategy.yaml")
    figures = strategy.info["figures"]
    assert strategy.name == "mined-ours" and figures["cost_within_limit"] and figures["cost_share"] <= 0.6


def test_what_a_model_answers_to_the_self_test_is_written_once(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / FILE).unlink(missing_ok=True)
    loaded, tokenizer, _ = registry.load(own, dtype=torch.float32)
    scene: Any = SimpleNamespace(runtime=SimpleNamespace(model=loaded, tokenizer=tokenizer))
    assert str(own / FILE) in write_self_test(own, scene)
    known = read_known(own)
    assert known is not None and known.model == loaded.identity
    assert write_self_test(own, scene) == ""
    (own / FILE).write_text("{}")
    assert "is not written" in write_self_test(own, scene) and (own / FILE).read_text() == "{}"
