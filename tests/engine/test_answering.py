# SPDX-License-Identifier: Apache-2.0
"""What goes wrong inside while a question is answered is an answer that says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.budget.deadline import DeadlineGuard
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.scene.frames import PosedFrame
from tests.engine.scenes import ask, working
from tests.engine.test_scene import MakeSession, WallFrame, looked


@pytest.mark.parametrize(
    ("reuse", "named"), [(Reuse.OFF, "GateError: scores that are not finite"), (Reuse.PREFIX, "PrefixError: ")]
)
def test_states_that_are_not_finite_are_an_error_that_says_where(
    make_session: MakeSession, frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch, reuse: Reuse, named: str
) -> None:
    session = looked(make_session(SessionConfig(budget=BudgetConfig(reuse=reuse))), frames)
    spoilt = lambda xyz, **_: torch.full((len(xyz), session.runtime.model.config.language.hidden_size), torch.nan)  # noqa: E731
    monkeypatch.setattr(session.runtime.model, "embed_clicks", spoilt)
    worker, queue = working(session, ahead=0.0)
    worker.start()
    try:
        answer = queue.submit(Question("What is this?", clicks=np.array([[0.0, 2.0, 1.0]]))).result.result(20.0)
    finally:
        assert worker.stop(20.0)
    assert answer.status == Status.ERROR and answer.status_message.startswith(named), answer.status_message


@pytest.mark.parametrize("error", [IndexError("index 50 is out of bounds"), KeyError("layer 3"), ValueError("a shape")])
@pytest.mark.parametrize("where", ["prefill", "question_tokens", "embed_clicks", "table"])
def test_a_defect_inside_is_neither_an_empty_scene_nor_a_bad_question(
    make_session: MakeSession,
    wall_frame: WallFrame,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    where: str,
) -> None:
    """What the policy, the planner or torch raises goes on to the worker, which makes it an ERROR with its cause."""
    session = looked(make_session(), [wall_frame(0)])

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    owner: Any = {
        "prefill": answering,
        "question_tokens": session.memory,
        "embed_clicks": session.runtime.model,
        "table": DeadlineGuard,
    }[where]
    monkeypatch.setattr(owner, "plan" if where == "table" else where, fail)
    worker, queue = working(session, ahead=0.0)
    worker.start()
    try:
        answer = queue.submit(Question("What?")).result.result(20.0)
        assert (answer.status, answer.status_message) == (Status.ERROR, f"{type(error).__name__}: {error}")
        monkeypatch.undo()
        assert queue.submit(Question("What?", max_new_tokens=1)).result.result(20.0).status == Status.TRUNCATED
    finally:
        assert worker.stop(20.0)


def test_what_is_kept_of_a_scene_s_prefill_is_within_its_memory(make_session: MakeSession, wall_frame: WallFrame):
    """It is counted, and not kept where there is no room for it; answers are the same."""
    texts, used = [], []
    for limit in (0.0, 1.0, 20.0):
        scene = looked(make_session(SessionConfig(memory_limit_mb=limit)), [wall_frame(0), wall_frame(1)])
        texts.append([ask(scene, Question("What is there?", max_new_tokens=4)).text for _ in range(2)])
        size, stems = scene.nbytes, scene.prepared.stems
        used.append(stems.used)
        held = stems.nbytes
        stems.forget()
        assert size - scene.nbytes == held and (held > 0) == (stems.used > 0)
        assert not limit or size <= limit * 1e6
    assert used == [1, 0, 1] and texts[0] == texts[1] == texts[2]
