# SPDX-License-Identifier: Apache-2.0
"""The benchmark of confidences: its measures by hand, and that it sees what answers say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.understanding import FILE, Calibration, Understanding, read_understanding
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.weights import embedded_path
from benchmarks import confidence
from benchmarks._scenes import Reader, find_rooms
from benchmarks.confidence import Answered, Task, auc, ece, figures, fit
from tests.engine.scenes import ask, new_scene


def drawn(count: int, known: Calibration, families: tuple[str, ...] = ("colour",), seed: int = 0) -> list[Answered]:
    """Answers that are right as often as a curve says."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        p, family = float(rng.uniform(0.2, 0.999)), families[k % len(families)]
        found.append(Answered(k // 10, family, p, bool(rng.random() < known(p, family))))
    return found


def test_measures_by_hand() -> None:
    """Two bins: said 0.15 of which none, and 0.9 of which half, is right."""
    said, right = np.array([0.1, 0.2, 0.9, 0.9]), np.array([0.0, 0.0, 1.0, 0.0])
    assert ece(said, right) == pytest.approx((0.1 + 0.2 + 2 * 0.4) / 4)
    assert ece(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.0
    assert auc(said, right) == pytest.approx(2.5 / 3)
    assert math.isnan(auc(said, np.ones(4)))


def test_the_curve_is_found_again() -> None:
    true = Calibration(0.6, 0.4, {"colour": 0.4, "box": -1.0})
    found = fit(drawn(20_000, true, ("colour", "box")))
    assert found.slope == pytest.approx(0.6, abs=0.05)
    assert found.offsets == pytest.approx(true.offsets, abs=0.1)
    for outcome in (True, False):
        with pytest.raises(ValueError, match="nothing can be fitted"):
            fit([Answered(0, "colour", 0.5, outcome)] * 3)


def test_figures_of_a_calibrated_and_of_a_boastful_model() -> None:
    true = Calibration(0.5, 0.0)
    answered = drawn(4000, true)
    good, boastful = figures(answered, true, 0), figures(answered, Calibration(0.5, 2.0), 0)
    assert good["ece"] == pytest.approx(good["ece_by_chance"], abs=0.02) and good["ece"] < 0.03
    assert boastful["ece"] > 0.15 and boastful["auc"] == pytest.approx(good["auc"])
    low, high = good["ece_interval"]
    assert 0 < low <= high < 0.05
    assert sum(one["questions"] for one in good["reliability"].values()) == 4000
    shares = [one["answered"] for one in good["coverage"]]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
    assert good["coverage"][-1]["right"] is None or good["coverage"][-1]["right"] > good["right"]
    assert good["families"]["colour"]["right"] == good["right"]


def result_of(known: Calibration) -> dict[str, Any]:
    of = figures(drawn(400, known), known, 0)
    fitted = {"model_hash": "m", "slope": known.slope, "offset": known.offset, "offsets": {"colour": 0.25}}
    return {
        "fit": {"questions": 3}, "confidence": fitted, "model": {"name": "made"},
        "test": of, "test_unseen": of, "unpruned": of,
    }  # fmt: skip


def test_table_picture_and_the_model_get_what_was_found(tmp_path: Path) -> None:
    result = result_of(Calibration(0.5, 1.0))
    console = Console(width=120)
    with console.capture() as shown:
        console.print(confidence.table(result))
    assert "ECE" in shown.get() and f"{result['test']['ece_interval'][0]:.3f}" in shown.get()
    confidence.draw(result, tmp_path / "p.png")
    assert np.asarray(Image.open(tmp_path / "p.png").convert("L")).std() > 10
    confidence.write(result, tmp_path)  # a model that has no such file is the lab's
    known = read_understanding(tmp_path, "m")
    assert known.calibration == Calibration(0.5, 1.0, {"colour": 0.25}) and "existence" in known.wordings
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "colours": ["mauve"]}))
    confidence.write(result, tmp_path)
    assert read_understanding(tmp_path, "m").colours == frozenset({"mauve"})


def test_it_measures_what_answers_say(tmp_path: Path) -> None:
    """The same questions about the same room to a scene, whose confidence is the probability itself."""
    reader = Reader(embedded_path())
    (room,) = find_rooms(reader, tmp_path, "test", 1, per_family=1)
    strategy = default_strategy("none", reader.n_layers)
    measured = [Answered(room.seed, *one) for one in confidence.answers(reader, Task(room, strategy))]
    known = read_understanding(embedded_path(), reader.model.identity)
    plain = Understanding(known.words, known.things, known.colours, known.wordings, Calibration(1.0, 0.0))
    config = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0))
    scene = new_scene(reader.model, reader.tokenizer, config, strategy=strategy, understanding=plain)
    for view in render_views(room.scene().room, seed=room.seed, count=reader.model.sizes.num_views):
        scene.observe(view.frame)
    said = [ask(scene, Question(qa.question)) for qa in room.questions]
    assert [one.family for one in measured] == [qa.family for qa in room.questions]
    assert [one.probability for one in measured] == pytest.approx([one.confidence for one in said], abs=2e-3)
    for one, qa, answer in zip(measured, room.questions, said, strict=True):
        assert qa.family == "box" or one.right == (answer.text == qa.answer), qa.question
