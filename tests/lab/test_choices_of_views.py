# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of what was chosen for models whose tokens are those of views: holes in the depth, newlines, gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.synthetic.camera import intrinsics
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.views import View
from adatoken3d_ros.lab.training.data import grid_lines
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.scene.frames import PosedFrame
from benchmarks import deepstack, missing_depth, newlines

RESULTS = Path(missing_depth.__file__).parent / "results"
WIDTH, HEIGHT, LEFT, RIGHT = 160, 120, 70, 90


@pytest.fixture
def box_before_a_wall() -> View:
    """A wall at 3 m, a box at 1 m before it in some columns, at 6 m a hole in the wall."""
    depth = np.full((HEIGHT, WIDTH), 3.0, np.float32)
    depth[:, LEFT:RIGHT] = 1.0
    depth[:20, 120:] = 6.0
    ids = np.full((HEIGHT, WIDTH), FIRST_ITEM, np.int16)
    ids[:, LEFT:RIGHT] = FIRST_ITEM + 1
    frame = PosedFrame(np.zeros((HEIGHT, WIDTH, 3), np.uint8), depth, intrinsics(WIDTH, HEIGHT), np.eye(4), 0)
    return View(frame, ids)


def test_depth_has_the_holes_of_such_a_camera(box_before_a_wall: View) -> None:
    found = missing_depth.holes(box_before_a_wall, np.random.default_rng(0))
    lost = np.isnan(found[30:])
    shadow = box_before_a_wall.frame.K[0, 0] * missing_depth.BASELINE * (1 / 1.0 - 1 / 3.0)
    assert shadow > 4
    assert lost[:, LEFT - int(shadow) + 1 : LEFT - 1].all()  # the projector is to the right of the camera
    assert lost[:, 5 : LEFT - int(shadow) - 3].mean() < 0.02 and lost[:, RIGHT + 3 :].mean() < 0.02
    assert np.isnan(found[:18, 123:]).all()  # too far away
    assert np.nanmax(np.abs(found - box_before_a_wall.frame.depth)) < 0.15


def test_a_dark_thing_has_no_depth_in_any_view(box_before_a_wall: View, monkeypatch: pytest.MonkeyPatch) -> None:
    depths = [box_before_a_wall.frame.depth.copy() for _ in range(2)]
    monkeypatch.setattr(missing_depth, "DARK", 0.5)
    rng = np.random.default_rng(next(s for s in range(20) if (np.random.default_rng(s).random(2) < 0.5).sum() == 1))
    missing_depth.without_dark([box_before_a_wall] * 2, depths, rng)
    for depth in depths:
        gone = np.isnan(depth)
        assert gone.any() and len(np.unique(box_before_a_wall.ids[gone])) == 1 and not gone.all()


@pytest.fixture(scope="module")
def prompt(tiny_of: Callable[[str], Path]) -> tuple[Engine, Sample, torch.Tensor]:
    """Of two views, with the line of each token."""
    loaded = registry.load(tiny_of("video3d"))
    engine = Engine(loaded.model, loaded.tokenizer)
    scene, rng = engine.open(), np.random.default_rng(0)
    for k in range(2):
        T = np.eye(4)
        T[0, 3] = k
        rgb = rng.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        scene.observe(PosedFrame(rgb, np.full((120, 160), 2.0, np.float32), intrinsics(160, 120), T, k * 10**9))
    scene.encode_pending()
    spliced, block = scene.spliced(Question("What is red?"))
    assert block.where is not None
    return engine, Sample(spliced.embeds, spliced.layout, block.scene), torch.from_numpy(grid_lines(block.where))


def test_rows_are_hidden_as_they_are_dropped_and_newlines_go_with_their_line(
    prompt: tuple[Engine, Sample, torch.Tensor],
) -> None:
    engine, sample, line = prompt
    decoder = engine.model.decoder
    schedule = Schedule.of([1, 3], [0.5, 0.1])
    kept = newlines.last_layers(decoder, sample, line, schedule, newlines_go=False)
    gone = newlines.last_layers(decoder, sample, line, schedule, newlines_go=True)
    for layout, last in ((replace(sample.layout, closing=None), kept), (sample.layout, gone)):
        filled = prefill(decoder, sample.embeds, layout, schedule, make_policy("ours"), scene=sample.scene)
        answer = [int(filled.logits.argmax()), 5, 7]
        expected = [filled.logits, *(decode(decoder, filled, token) for token in answer[:-1])]
        found = newlines.hidden_run(decoder, sample, answer, last)
        torch.testing.assert_close(found, torch.stack(expected).log_softmax(-1), atol=1e-4, rtol=0)
        assert filled.trace.rows_per_layer == tuple(int((last >= i).sum()) for i in range(len(decoder)))

    rows = sample.layout.rows
    assert rows is not None
    kept[rows] = gone[rows]  # behind the first gate the newlines that stay are seen, and others are chosen
    changed = (kept != gone).nonzero()[:, 0].tolist()
    ends = [int(rows[line == one].max()) + 1 for one in line.unique()]
    assert changed and set(changed) <= set(ends)
    for one, end in list(zip(line.unique(), ends, strict=True))[:-1]:
        assert gone[end] == gone[rows[line == one]].max()
    assert gone[ends[-1]] == len(decoder) - 1  # read with the question
    less, more = (newlines.operations(decoder, sample, last) for last in (gone, kept))
    assert less < more and newlines._refill(decoder, [(sample, line, answer)], schedule) > 1.0


def test_gates_of_equal_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 6, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
    monkeypatch.setattr(deepstack, "SIZE", {**deepstack.SIZE, **small})
    monkeypatch.setattr(deepstack, "VIEWS", 3)
    monkeypatch.setattr(deepstack, "BEYOND", 1)
    result = deepstack.measure(1, 1, 0.7, tmp_path, lambda done, total: None)
    for by_gate in result["gates"].values():
        assert list(by_gate) == ["0", "1", "2", "3"]
        kept = [one["kept"] for one in by_gate.values()]
        assert kept == sorted(kept, reverse=True) and all(0.65 < one["flops"] <= 0.7 for one in by_gate.values())
        assert all(one["kl"] > 0 for one in by_gate.values())
    assert deepstack.report(result).row_count == 4


def test_figures_are_of_the_model_that_is_here() -> None:
    identity = registry.load(missing_depth.MODEL).model.identity
    for name in ("frontier_video3d_cpu", "newlines_cpu"):
        assert json.loads((RESULTS / f"{name}.json").read_text())["model"]["hash"] == identity
    gates = json.loads((RESULTS / "deepstack_cpu.json").read_text())
    assert gates["size"] == json.loads(json.dumps({**deepstack.SIZE, "views": deepstack.VIEWS}))
    found = json.loads((RESULTS / "missing_depth_cpu.json").read_text())
    assert found["model"] == missing_depth.MODEL.name and found["questions"] >= 300
    assert found["masked"]["off_m"]["mean"] < found["averaged"]["off_m"]["mean"]
