# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.settings import Settings
from benchmarks import onboard
from benchmarks._growing import growing, written_by
from tests.engine.scenes import ask, load_scene, room_frame

FIGURES: dict[str, Any] = {
    "decode_ms": {"growing": 6.0, "eager": 5.0, "graph": 2.0},
    "decode_speedup": 3.0,
    "answer_ratios": {"all": {"before_ms": 40.0, "now_ms": 30.0, "ratio": 0.75}},
    "questions": 4,
    "equal_tokens": True,
    "gate_overhead": 0.004,
    "quantised": {"int8": {"accuracy_loss": 0.1, "interval": [-0.2, 0.4]}},
    "real_size": {},
}


def test_answers_the_old_way_are_those_of_the_package(tiny_directory: Path) -> None:
    assert answering.generate is generate
    written: dict[str, list[int]] = {"old": [], "new": []}
    for name, way in (("old", growing), ("new", generate)):
        scene = load_scene(Settings({"model.path": str(tiny_directory), "budget.warm_up": False}))
        scene.observe(room_frame())
        with written_by(way, written[name]):
            ask(scene, Question("What?", max_new_tokens=6))
    assert answering.generate is generate
    assert len(written["old"]) == 6 and written["old"] == written["new"]


def test_ratios_are_of_medians_and_boxes_apart() -> None:
    rows = [("count", 10.0, 5.0), ("count", 30.0, 6.0), ("count", 20.0, 15.0), ("box", 100.0, 20.0)]
    found = onboard.ratios(rows)
    assert found["short"] == {"before_ms": 20.0, "now_ms": 6.0, "ratio": 0.3}
    assert found["boxes"]["ratio"] == 0.2 and found["all"]["before_ms"] == 25.0


def test_the_report_names_goals_and_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=120).print(onboard.report(FIGURES))
    told = capsys.readouterr().out
    assert ">= 3" in told and "0.75" in told and "0.40%" in told and "[-0.20, 0.40]" in told and "7B" not in told


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        onboard.parse(["--json", "F", "--questions", "0"])
    assert "--questions 0 must be at least 1" in capsys.readouterr().err


def test_every_branch_that_only_a_gpu_takes_is_in_the_table() -> None:
    """A file that asks torch for CUDA, or does something else on a device that is none, is named in docs/onboard.md."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "onboard.md").read_text(encoding="utf-8")
    table = text[text.index("## What was run, and what was not") :]
    asks = re.compile(r'\.cuda\b|[!=]= "(cuda|cpu)"|\("\w+", "cuda"\)|"GPU", 0|num_gpus')
    words = {"settings.py", "ros/findings.py"}  # of which device a text speaks, and what a device may be called
    package = root / "adatoken3d_ros"
    found = {
        str(f.relative_to(package)) for f in package.rglob("*.py") if asks.search(f.read_text(encoding="utf-8"))
    } - words
    assert {"decoder/graphs.py", "decoder/clock.py", "lmm/quantized/linear.py"} <= found
    assert sorted(name for name in found if f"`{name}`" not in table) == []
