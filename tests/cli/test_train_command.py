# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from adatoken3d_ros.cli.main import INTERRUPTED, main
from adatoken3d_ros.lab.synthetic.wordings import MIDDLES, WORDINGS
from adatoken3d_ros.lab.training.language import config_content, new_model, save_model, tokenizer
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.untrained import ModelSize


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to take the vision tower from, of a size that trains in seconds."""
    size = ModelSize(layers=2, width=32, heads=2, intermediate=32, image_size=64, taps=(0, 2))
    words = tokenizer()
    content = config_content(size, len(words))
    torch.manual_seed(0)
    vision = Llava3DConfig.from_dict(content).make_tower().requires_grad_(False).eval()
    directory = tmp_path_factory.mktemp("training") / "tower"
    save_model(new_model(content, vision, 0), content, words, directory, {"size": {}})
    return directory


def _arguments(out: Path, tower: Path) -> list[str]:
    """The scenes lie beside the tower: they are made once."""
    sizes = ["--layers", "3", "--width", "32", "--heads", "2", "--intermediate", "32", "--views", "2"]
    rooms = ["--rooms", "2", "--validation-rooms", "1", "--scenes", str(tower.parent / "scenes")]
    return ["--out", str(out), "--vision", str(tower), *sizes, *rooms, "--voxel-size", "0.5"]


def _train(out: Path, tower: Path, *more: str) -> int:
    return main(["train", *_arguments(out, tower), *more])


def _log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def test_trains_saves_and_goes_on(tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["--crowded", "1", "--turns", "3", "--turn", "1", "--told"]
    assert _train(out, tower, "--steps", "2", "--evaluate-every", "2", "--batches", "1", *asked) == 0
    recipe = json.loads((out / "config.json").read_text())["training"]
    assert (recipe["rooms"], recipe["turns"], recipe["turn"]) == (3, 3, 1)
    understood = json.loads((out / "understanding.json").read_text())
    assert set(understood["wordings"]["distance"]) == {*WORDINGS["distance"], *MIDDLES}
    assert [line["step"] for line in _log(out)] == [1, 2, 2]
    assert "macro" in _log(out)[-1]["right"]  # type: ignore[operator]
    assert "saved at step 2" in capsys.readouterr().out
    # A checkpoint is not overwritten by mistake.
    assert _train(out, tower, "--steps", "3") == 2
    assert "--resume goes on" in capsys.readouterr().err
    # Resumed, the sizes are the checkpoint's own.
    rest = ["--resume", "--steps", "3", "--batches", "1", "--rooms", "2", "--validation-rooms", "0"]
    assert main(["train", "--out", str(out), "--scenes", str(tower.parent / "scenes"), *rest]) == 0
    assert [line["step"] for line in _log(out)] == [1, 2, 2, 3]
    model, _, report = registry.load(out)
    assert model.config.voxel_size == 0.5 and model.config.language.num_hidden_layers == 3
    assert model.config.image_size == 64 and report.ignored == []
    recipe = json.loads((out / "config.json").read_text())["training"]
    assert (recipe["step"], recipe["rooms"], recipe["seed"], recipe["first_room"]) == (3, 2, 0, 0)


def test_processes_share_the_steps(tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes write one log and one checkpoint; more of them than batches are refused."""
    out = tmp_path / "out"
    assert _train(out, tower, "--steps", "2", "--evaluate-every", "2", "--processes", "2") == 0
    assert [line["step"] for line in _log(out)] == [1, 2, 2]
    assert json.loads((out / "config.json").read_text())["training"]["step"] == 2
    assert registry.load(out)[2].ignored == []
    assert _train(tmp_path / "other", tower, "--steps", "2", "--processes", "3") == 2
    assert "2 batches a step cannot be shared by 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupt_ends_it_between_steps(tmp_path: Path, tower: Path, processes: str) -> None:
    """SIGTERM to the command alone: all of its processes end, and what it has done is saved."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "adatoken3d_ros.cli.main", "train", *_arguments(out, tower)]
    more = ["--steps", "100000", "--processes", processes, "--save-every", "100000", "--evaluate-every", "100000"]
    process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not ((out / "training" / "log.jsonl").is_file() and len(_log(out)) >= 2):
            with suppress(subprocess.TimeoutExpired):
                raise AssertionError(process.wait(0.05))
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
        _, left = psutil.wait_procs(started, timeout=30)
        assert [one for one in left if one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == INTERRUPTED
    step = json.loads((out / "config.json").read_text())["training"]["step"]
    assert step == _log(out)[-1]["step"] >= 2 and f"saved at step {step}" in printed


def test_rooms_alone_and_a_time_limit(tmp_path: Path, tower: Path) -> None:
    out = tmp_path / "out"
    assert _train(out, tower, "--prepare-only", "--scenes", str(tmp_path / "scenes")) == 0
    assert len(list((tmp_path / "scenes" / "train").glob("*.npz"))) == 3 and not out.exists()
    assert _train(out, tower, "--minutes", "0") == 0
    assert not (out / "config.json").exists()


def test_a_tower_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "tower.pth"
    wrong.write_bytes(b"no weights")
    assert _train(tmp_path / "out", wrong) == 2
    assert f"{wrong} does not hold EfficientNet-Lite0" in capsys.readouterr().err


def test_a_start_takes_the_sizes_and_is_refused_before_rooms_are_made(
    tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    scenes = ["--scenes", str(tower.parent / "scenes")]
    assert _train(old, tower, "--steps", "1", "--batches", "1") == 0
    short = ["train", "--vision", str(tower), "--rooms", "2", "--validation-rooms", "0", "--steps", "1", "--batches"]
    assert main([*short, "1", *scenes, "--out", str(new), "--start", str(old)]) == 0
    made = json.loads((new / "config.json").read_text())
    assert (made["num_hidden_layers"], made["hidden_size"], made["voxel_size"]) == (3, 32, 0.5)
    assert made["training"]["started_from"]["rooms"] == 2
    capsys.readouterr()
    absent, graph = str(tmp_path / "absent"), tmp_path / "graph.pb"
    graph.write_bytes(b"no graph")
    for more, named in (
        (["--out", absent, "--start", str(tmp_path / "nothing")], "nothing holds no model that this command made"),
        (["--out", str(new), "--start", str(old), "--resume"], "--start begins a new run"),
        (["--out", str(new), "--resume", "--detector", str(graph)], "has no detector"),
        (["--out", absent, "--detector", str(graph)], f"train: {graph} does not hold SSD-MobileNetV2"),
        (["--out", absent, "--detector", str(tmp_path / "no.pb")], f"train: {tmp_path / 'no.pb'}: No such file"),
    ):
        assert main([*short, "1", *more]) == 2
        assert named in capsys.readouterr().err
        assert not Path(absent).exists()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["--evaluate-every", "0"], "--evaluate-every must be at least 1, got 0"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--validation-rooms", "-1"], "--validation-rooms must be at least 0"),
        (["--crowded", "-1"], "--crowded must be at least 0"),
        (["--minutes", "nan"], "--minutes must not be negative, got nan"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (["--align", "-5"], "align must not be negative"),
        (["--early", "-1"], "early must not be negative"),
        (["--decay", "2"], "decay must be from 0 to 1, got 2.0"),
        (["--decay", "nan"], "decay must be from 0 to 1"),
        (["--rate", "inf"], "rate must be positive, got inf"),
        (["--export-tower", "x"], "--export-tower says what --export refers to, which is missing"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused_at_once(
    tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], named: str
) -> None:
    assert _train(tmp_path / "out", tower, "--scenes", str(tmp_path / "scenes"), *wrong) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tower_to_refer_to_has_to_be_the_runs_own(
    tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was written into the export unread: that no command could load it came out after the last step."""
    other = tmp_path / "other"
    other.mkdir()
    for file in tower.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "vision" in name and name.endswith("weight"))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    exported = ["--export", str(tmp_path / "exported"), "--scenes", str(tmp_path / "scenes"), "--export-tower"]
    for given, named in (
        (tmp_path / "nothing", "nothing does not hold EfficientNet-Lite0"),
        (other, "other has another vision tower than this run"),
    ):
        assert _train(tmp_path / "out", tower, *exported, str(given)) == 2
        assert named in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_start_of_another_width_is_named(tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    assert _train(old, tower, "--steps", "1", "--batches", "1") == 0
    capsys.readouterr()
    assert _train(tmp_path / "new", tower, "--start", str(old), "--width", "64") == 2
    assert "old has words of (32,) for (64,)" in capsys.readouterr().err
