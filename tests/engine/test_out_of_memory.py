# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out in the middle of a question, raised where a GPU would raise it."""

from __future__ import annotations

import logging
import platform
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.engine import answering
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.engine.out_of_memory import describe, is_out_of_memory, trim_heap
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.token_map import TokenMap
from tests.engine.scenes import ask, working

LIMIT = 20.0
ADVICE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8.00 GiB.\nSee the manual."
QUESTION = Question("What is on the wall?", max_new_tokens=4)


def fail_above(original: Callable[..., Any], size_of: Callable[..., int], limit: int, sizes: list[int]) -> Any:
    """The call, on a device on which more than `limit` of something does not fit."""

    def call(*args: Any, **options: Any) -> Any:
        sizes.append(size_of(*args))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError(ADVICE)
        return original(*args, **options)

    return call


@pytest.fixture
def session(make_session: Callable[..., Scene], frames: list[PosedFrame]) -> Scene:
    made: Scene = make_session()
    for frame in frames:
        made.observe(frame)
    made.encode_pending()
    return made


def seen(answer: Answer) -> tuple[int, ...]:
    assert answer.report is not None
    return answer.report.spatial_per_layer


def test_a_prefill_that_does_not_fit_is_tried_once_more_with_half_the_tokens(
    session: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, freed, rows = ask(session, QUESTION), [], []
    embeds = session.spliced(QUESTION)[0].embeds.shape[1]
    original = answering.prefill
    monkeypatch.setattr(answering, "free_cached", lambda: freed.append(dict(session.prepared._blocks)))
    limited = fail_above(original, lambda _, embeds, *rest: embeds.shape[1], embeds - 1, rows)
    monkeypatch.setattr(answering, "prefill", limited)
    with caplog.at_level(logging.WARNING):
        answer = ask(session, QUESTION)
    assert answer.status == Status.TRUNCATED and answer.text
    assert answer.spatial_tokens == before.spatial_tokens // 2
    assert sum(seen(answer)) < sum(seen(before)) // 2
    assert rows == [embeds, embeds - before.spatial_tokens + answer.spatial_tokens]
    assert freed == [{}]  # nothing of the first attempt was held on to
    assert "memory ran out: the answer is by half the tokens" in answer.status_message
    assert "memory ran out" in answer.plan and "out of memory in the stage prefill" in caplog.text
    times = answer.times
    assert times.queue + times.encode + times.tokens + times.prefill + times.decode == pytest.approx(times.total)
    # The next question may use everything again.
    monkeypatch.setattr(answering, "prefill", original)
    assert ask(session, QUESTION).text == before.text


def test_what_does_not_fit_twice_is_an_error_that_says_where_and_the_next_question_is_answered(
    session: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    before, original = ask(session, QUESTION), answering.prefill
    monkeypatch.setattr(answering, "prefill", fail_above(original, lambda *_: 1, 0, rows))
    answer = ask(session, QUESTION)
    assert answer.status == Status.ERROR and len(rows) == 2
    first, second = answer.status_message.split("; ")
    assert first == "out of memory in the stage prefill: OutOfMemoryError: " + ADVICE.splitlines()[0]
    assert second.startswith("out of memory again, with half the tokens and the strongest pruning in the stage prefill")
    monkeypatch.setattr(answering, "prefill", original)
    assert ask(session, QUESTION).text == before.text


def test_views_that_do_not_fit_together_are_encoded_one_by_one_and_none_is_lost(
    make_session: Callable[..., Scene], frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    for frame in frames:
        session.observe(frame)
    sizes: list[int] = []
    features = session.runtime.model.encode_images
    monkeypatch.setattr(session.runtime.model, "encode_images", fail_above(features, lambda rgb: len(rgb), 1, sizes))
    answer = ask(session, QUESTION)
    assert answer.status == Status.TRUNCATED and sizes == [3, 1]
    assert answer.stamp_ns == frames[-1].stamp_ns == session.stamp_ns
    session.prepare()
    assert sorted(session.poses) == [frame.stamp_ns for frame in frames]


def test_a_cap_that_was_too_much_is_halved_and_a_budget_gives_way(
    session: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.controller.latency = LatencyModel(
        {"encode": [0.1], "tokens": [0.0] * 3, "prefill": [0.0, 1e-3, 0.0, 0.0, 0.0], "decode": [1e-6, 0.0]}
    )
    session.runtime.clock = lambda: 0.0  # nothing that is measured corrects what is predicted
    whole, rows = ask(session, QUESTION), []
    monkeypatch.setattr(answering, "prefill", fail_above(answering.prefill, lambda *_: len(rows), 0, rows))
    budget = 1e3 * sum(seen(whole)) * 1e-3
    answer = ask(session, Question("What is on the wall?", latency_budget_ms=budget, max_new_tokens=4))
    assert answer.status in (Status.OK, Status.TRUNCATED)
    assert answer.decision is not None and 0 < answer.spatial_tokens <= whole.spatial_tokens // 2


def test_a_kept_prefix_is_let_go(
    make_session: Callable[..., Scene], frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(SessionConfig(budget=BudgetConfig(reuse=Reuse.PREFIX)))
    session.observe(frames[0])
    monkeypatch.setattr(session.prepared, "read_prefix", fail_above(session.prepared.read_prefix, lambda *_: 1, 0, []))
    answer = ask(session, QUESTION)
    assert answer.status == Status.TRUNCATED and answer.strategy != "scene-prefix" and session.prepared.prefix is None


def test_a_frame_that_does_not_fit_waits_and_the_worker_lives_on(
    make_session: Callable[..., Scene], frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, fates = make_session(), []
    features = session.runtime.model.encode_images
    monkeypatch.setattr(session.runtime.model, "encode_images", fail_above(features, lambda *_: 1, 0, []))
    events = Listeners().add(FrameTaken, lambda told: fates.append(told.fate))
    worker, queue = working(session, events=events, ahead=0.0)
    worker.start()
    try:
        queue.submit_frame(lambda: frames[0])
        queue.call(lambda s: None).result(LIMIT)
        while not fates:
            queue.call(lambda s: None).result(LIMIT)
        assert fates == ["error: OutOfMemoryError: " + ADVICE.splitlines()[0] + " (the view waits to be encoded)"]
        monkeypatch.setattr(session.runtime.model, "encode_images", features)
        answer = queue.submit(QUESTION).result.result(LIMIT)
        assert answer.status == Status.TRUNCATED and answer.stamp_ns == frames[0].stamp_ns
    finally:
        assert worker.stop(LIMIT)


def test_while_nothing_can_be_encoded_no_more_waits_than_may_be_kept(
    make_session: Callable[..., Scene], wall_frame: Callable[..., PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(max_views=3)))
    encode = session.runtime.model.encode_images
    monkeypatch.setattr(session.runtime.model, "encode_images", fail_above(encode, len, 0, []))
    for i in range(8):
        session.observe(wall_frame(i))
        with pytest.raises(torch.OutOfMemoryError):
            session.encode_pending()
    monkeypatch.setattr(session.runtime.model, "encode_images", encode)
    assert session.encode_pending() == 3
    assert session.stamp_ns == wall_frame(7).stamp_ns


def test_while_nothing_can_be_encoded_the_scene_stays(
    make_session: Callable[..., Scene], wall_frame: Callable[..., PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(max_views=3), question_views=2))
    for i in range(3):
        session.observe(wall_frame(i))
        session.encode_pending()
    scene, encode = sorted(session.poses), session.runtime.model.encode_images
    asked = session.memory.asked.keys()
    monkeypatch.setattr(session.runtime.model, "encode_images", fail_above(encode, len, 0, []))
    for i in range(3, 9):
        session.observe(wall_frame(i))
        with pytest.raises(torch.OutOfMemoryError):
            session.encode_pending()
        assert sorted(session.poses) == scene and session.memory.asked.keys() == asked
    # The newest of those that wait, one at a time: each takes the place of one view, not of all for whom it waits.
    monkeypatch.setattr(session.runtime.model, "encode_images", encode)
    assert [frame.stamp_ns for frame in session.memory.pending] == [wall_frame(i).stamp_ns for i in (6, 7, 8)]
    assert session.encode_pending(1) == 1
    assert len(session.poses) == 3 and wall_frame(8).stamp_ns in session.poses
    assert wall_frame(8).stamp_ns in set(session.memory.asked.keys())


@pytest.mark.parametrize("failing", ["add_view", "carve", "remove_view"])
def test_a_view_for_which_the_map_has_no_room_waits_and_can_be_evicted_later(
    make_session: Callable[..., Scene],
    wall_frame: Callable[..., PosedFrame],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(max_views=2)))
    for i in range(2):
        session.observe(wall_frame(i))
        session.encode_pending()
    ask(session, QUESTION)
    original = getattr(TokenMap, failing)
    monkeypatch.setattr(TokenMap, failing, fail_above(original, lambda *_: 1, 0, []))
    session.observe(wall_frame(2))
    with pytest.raises(torch.OutOfMemoryError):
        session.encode_pending()
    assert ask(session, QUESTION).status in (Status.TRUNCATED, Status.ERROR)
    monkeypatch.setattr(TokenMap, failing, original)
    for i in range(3, 7):
        session.observe(wall_frame(i))
        session.encode_pending()
        assert session.memory._map.keys() == tuple(sorted(session.poses)) and len(session.poses) == 2
        assert session.memory._selector.stamps() == session.memory._map.keys()
    answer = ask(session, QUESTION)
    scene = session.tokens()
    assert scene is not None and answer.spatial_tokens == len(scene)


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError(ADVICE)) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied")) and not is_out_of_memory(ValueError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value) and "\n" not in describe(caught.value)
    assert describe(MemoryError()) == "MemoryError"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="gives back what glibc keeps")
def test_freed_memory_is_given_back() -> None:
    """Small pieces between others: their pages are kept by the process until it is told to give them back."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    pieces = [b"x" * (60_000 + i) for i in range(2000)]
    pieces[:] = pieces[::20]  # what is left keeps the heap from shrinking
    before = held()
    trim_heap()
    assert held() < before - 50_000_000
    assert len(pieces) == 100
