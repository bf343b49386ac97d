# SPDX-License-Identifier: Apache-2.0
"""What is spread over two workers of a local Ray gives what one process gives, to the bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.fleet import cluster
from adatoken3d_ros.lab.spread import Alone
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from tests.cli.test_calibrate import write_scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers=3)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    for seed, name in enumerate(("kitchen", "office")):
        write_scene(root / name, seed)
    return root


@pytest.fixture
def one_thread(local_ray: Any) -> Iterator[None]:
    """Two workers of two threads each would need four processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_calibration(model: Path, scenes: Path, tmp_path: Path) -> None:
    """Schedule, divergences and all that was mined, of default questions, which depend on the scene."""
    found = {}
    for name, more in (("alone", []), ("spread", ["--ray", "--ray-workers", "2"])):
        out, report = tmp_path / f"{name}.yaml", tmp_path / name
        folders = [str(scenes / one) for one in ("kitchen", "office")]
        command = ["calibrate", "--model", str(model), "--folder", *folders, "--kind", "calibrated", "--withdraw"]
        command += ["--answer-tokens", "1", "--max-gates", "1", "--flops-reduction", "0.3", "--horizon-kl", "1e-9"]
        assert main([*command, "--out", str(out), "--report", str(report), *more]) == 0
        strategy = yaml.safe_load(out.read_text())
        del strategy["info"]["figures"]["prefill_ms"]
        mined = {path.name: path.read_bytes() for path in sorted(report.glob("information.*[!g]"))}
        found[name] = strategy, (report / "calibration.json").read_text(), mined
    assert found["alone"] == found["spread"]
    assert len(json.loads(found["alone"][1])["sensitivity"]) >= 2


def test_an_evaluation(
    model: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers and predictions, a scene at a time; one that cannot be read is named as alone. In this process: that
    workers elsewhere give the same shows the calibration."""
    monkeypatch.setattr("adatoken3d_ros.fleet.spread.Cluster", lambda make, count, **_: Alone(make))
    asked = [
        {"scene": scene, "question": text, "answers": ["two"], "id": f"{scene}-{text}", "type": "count"}
        for text in ("How many chairs are there?", "What is here?")
        for scene in ("kitchen", "office")
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    command = ["evaluate", "--questions", str(tmp_path / "set.jsonl"), "--scenes", str(scenes), "--model", str(model)]
    command += ["--strategies", "none", "fastv", "--max-new-tokens", "3"]
    assert main([*command, "--out", str(tmp_path / "spread"), "--ray"]) == 0
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    told = {}
    for name in ("alone", "spread"):
        lines = [json.loads(line) for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()]
        told[name] = [{key: value for key, value in line.items() if key != "times_ms"} for line in lines]
    assert told["alone"] == told["spread"] and len(told["alone"]) == 8
    for file in ("predictions-none.json", "predictions-fastv.json"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes()


LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def listening() -> set[str]:
    """Addresses at which this process and all that it started listen."""
    own = psutil.Process()
    found = set()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
    return found


def test_nothing_of_this_ray_listens_to_other_machines(local_ray: Any) -> None:
    heard = listening()
    assert heard and heard <= LOOPBACK


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray-workers", "2"], "--ray-workers 2 is for --ray"),
        (["--ray", "--ray-workers", "-1"], "--ray-workers -1 must not be negative"),
        (["--ray", "--ray-workers", "9"], "9 workers of 1 threads each need more than the cluster's 2 processors"),
    ],
)
def test_what_cannot_be_spread_is_told(
    options: list[str], said: str, model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", "--model", str(model), "--folder", str(scenes / "kitchen"), "--report", str(tmp_path / "r")]
    assert main([*command, "--out", str(tmp_path / "s.yaml"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install 'adatoken3d-ros\[fleet\]'"), cluster.connected():
        raise AssertionError("connected")
