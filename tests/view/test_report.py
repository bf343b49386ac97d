# SPDX-License-Identifier: Apache-2.0
"""The report: what it holds, that nothing in it is believed, its size, and that a browser draws it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.cli.output import record_of_answer
from adatoken3d_ros.engine.answer import Answer, Question, TokenReport
from adatoken3d_ros.engine.pictures import Pictures
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.view import report
from adatoken3d_ros.view.report import Reported, ReportError, report_page, reported
from tests.engine.scenes import ask

EVIL = '</script><script>document.title="taken"</script><img src=x onerror="document.title=1">@@DATA@@'


def told(scene: Scene, text: str = "What is red?", **changes: Any) -> Reported:
    answer = replace(ask(scene, Question(text, latency_budget_ms=60_000)), **changes)
    return reported(record_of_answer(answer), answer.report, scene)


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_what_a_report_tells(looked: tuple[Scene, Pictures]) -> None:
    scene, pictures = looked
    answer = ask(scene, Question("What is red?", latency_budget_ms=60_000))
    one = reported(record_of_answer(answer), answer.report, scene)
    page = report_page([one], pictures.of(scene), "adatoken3d ask 'What is red?' --report a.html")
    data, tokens = data_of(page), answer.report
    assert tokens is not None
    drawn = data["answers"][0]["tokens"]
    assert drawn["per_layer"] == list(tokens.spatial_per_layer) and drawn["all"] == len(tokens.xyz)
    assert Counter(drawn["layer"]) == Counter(tokens.last_layer.tolist())
    assert len(drawn["xyz"]) == 3 * len(tokens.xyz)
    places = [[round(1000 * v) for v in (*one.place, *one.extent)] for one in answer.evidence]
    assert drawn["evidence"] == places and places
    # Lit is a patch exactly where its voxel holds a token that was left.
    left = set(scene.memory.voxels(tokens.xyz[tokens.retained]).tolist())
    for lit, picture in zip(data["answers"][0]["lit"], pictures.of(scene), strict=True):
        known = np.isfinite(picture.places).all(axis=1)
        voxels = iter(scene.memory.voxels(picture.places[known]).tolist())
        assert lit == [i for i, has_place in enumerate(known) if has_place and next(voxels) in left]
    for text in ("budget of 60000 ms met", answer.model_id, "adatoken3d ask &#x27;What is red?&#x27; --report a.html"):
        assert text in page
    assert "://" not in page and len(page.encode()) < 400_000


def test_nothing_from_outside_is_believed(looked: tuple[Scene, Pictures]) -> None:
    scene, pictures = looked
    one = told(scene)
    evil = {name: EVIL for name in ("question", "text", "status_message", "strategy", "model_id", "plan")}
    evil_one = Reported({**one.record, **evil}, one.tokens, one.left)
    page = report_page([evil_one], pictures.of(scene), EVIL)
    assert page.count("<script") == 2 and "<img" not in page and page.count("@@DATA@@") == 7
    assert data_of(page)["answers"]


def test_an_answer_without_a_scene_is_reported_as_well() -> None:
    from adatoken3d_ros.engine.answer import Status

    record = record_of_answer(Answer(Question("What?"), Status.NO_SCENE, status_message="nothing was seen"))
    page = report_page([Reported(record)], (), "adatoken3d ask What?")
    assert "NO_SCENE" in page and data_of(page)["answers"] == [{"tokens": None, "lit": None}]


def test_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from adatoken3d_ros.engine.answer import Status

    n = 60_000
    rng = np.random.default_rng(0)
    tokens = TokenReport(
        rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 255, (n, 3), dtype=np.uint8),
        np.full(n, 1 / n, np.float32), rng.integers(0, 40, n), np.zeros(n, bool), (n,) * 40, (1e9,) * 40, 0.5,
    )  # fmt: skip
    record = record_of_answer(Answer(Question("What?"), Status.OK, text="a"))
    page = report_page([Reported(record, tokens)] * 100, (), "")
    assert len(page.encode()) < report.MOST_BYTES
    assert max(data_of(page)["answers"][0]["tokens"]["layer"]) == 39  # what came far is drawn
    monkeypatch.setattr(report, "MOST_BYTES", 1000)
    with pytest.raises(ReportError, match="a report of 1 answers and 0 pictures has [0-9]+ bytes, more than 1000"):
        report_page([Reported(record)], (), "")


def test_ask_writes_it(tiny_of: Any, frames_folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.txt"
    questions.write_text("What is red?\nIs there a table?\n")
    written = tmp_path / "r.html"
    given = ["--folder", str(frames_folder), "--model", str(tiny_of("llava3d")), "--report", str(written)]
    assert main(["ask", "--questions", str(questions), *given]) == 0
    page = written.read_text()
    assert len(data_of(page)["answers"]) == 2 and len(data_of(page)["pictures"]) > 1
    assert f"adatoken3d ask --questions {questions} --folder" in page
    assert main(["ask", "What is red?", *given[:-1], str(tmp_path / "no" / "r.html")]) == 2


def test_a_browser_draws_it(page: Any, looked: tuple[Scene, Pictures], tmp_path: Path) -> None:
    scene, pictures = looked
    one = told(scene)
    evil = Reported({**one.record, "text": EVIL, "question": EVIL}, one.tokens, one.left)
    path = tmp_path / "r.html"
    report.write_report(path, [one, evil, Reported(one.record)], pictures.of(scene), "adatoken3d ask")
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('figure canvas')[0].width > 0")
    assert page.title() == "adatoken3d report: 3 answers"
    assert EVIL in page.locator("h2").nth(1).inner_text()
    page.wait_for_function("[...document.querySelectorAll('figure canvas')].every((c) => c.width === 160)")
    lit, _, bright = (
        page.locator(f"section[data-answer='{i}'] figure canvas").first.evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.reduce((a, b) => a + b)"
        )
        for i in range(3)
    )
    assert lit < 0.95 * bright  # dark is what was not left, where that is known
    canvas = page.locator("canvas.scene").first
    whole = canvas.screenshot()
    page.locator("input.layer").first.evaluate("e => { e.value = e.max; e.dispatchEvent(new Event('input')); }")
    last = canvas.screenshot()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 400, box["y"] + 220)
    page.mouse.up()
    turned = canvas.screenshot()
    assert len({whole, last, turned}) == 3  # it follows the slider and the mouse
    colours = page.evaluate(
        "() => { const c = document.querySelector('canvas.scene'), d = c.getContext('2d').getImageData(0, 0, c.width,"
        " c.height).data; const s = new Set(); for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i+1] << 8 |"
        " d[i+2]); return s.size; }"
    )
    assert colours > 5
