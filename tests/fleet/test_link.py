# SPDX-License-Identifier: Apache-2.0
"""A robot and a shared engine over HTTP: the answers of an engine of one's own, whatever becomes of the link."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.loading import load_engine as load_here
from adatoken3d_ros.engine.loading import open_scene
from adatoken3d_ros.fleet.link import PATIENCE, LinkError
from adatoken3d_ros.fleet.loading import load_engine
from adatoken3d_ros.fleet.sender import Sender
from tests.architectures import NAMES
from tests.engine.scenes import room_frame
from tests.fleet.shared import LIMIT, TOKEN, free_port, held_up, listening, plain, unlike


def robot(url: str, path: Path, **more: Any) -> tuple[Any, Any, Any]:
    """A robot's engine and empty scene, and its settings."""
    settings = plain(path, **{"engine.url": url, "engine.token": TOKEN, "engine.robot": "tester", **more})
    engine = load_engine(settings)
    return engine, open_scene(engine, settings), settings


def show(scene: Any, *indices: int) -> None:
    for index in indices:
        scene.observe(room_frame(index))
    scene.encode_pending()


QUESTIONS = (
    Question("What is there?"),
    Question("What is at [0.0, 1.3, 0.5]?"),
    Question("What is there?", without=np.array([[0.0, 2.0, 1.0]]), candidates=("table", "chair")),
    Question("When did you last see the chair?"),
    Question("What has changed?"),
    Question(" "),
)


@pytest.mark.parametrize("encode", ["local", "picture"])
@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_those_of_an_engine_of_ones_own(
    name: str, encode: str, tiny_of: Callable[[str], Path], url_of: Callable[[str], str]
) -> None:
    """Features in 16 bits and pictures as JPEG are about the same; status, tokens, places and coverage are equal."""
    path = tiny_of(name)
    engine, scene, settings = robot(url_of(name), path, **{"engine.encode": encode})
    here = load_here(settings | {"engine.url": ""})
    own = open_scene(here, settings)
    for one in (scene, own):
        show(one, 0, 1, 2)
    for question in QUESTIONS:
        ours, theirs = here.ask(own, question), engine.ask(scene, question)
        assert theirs.status == ours.status, theirs.status_message
        assert (theirs.spatial_tokens, theirs.retained_tokens) == (ours.spatial_tokens, ours.retained_tokens)
        assert (theirs.stamp_ns, theirs.confirmed_ns, theirs.coverage) == pytest.approx(
            (ours.stamp_ns, ours.confirmed_ns, ours.coverage), nan_ok=True
        )
        assert theirs.model_id == ours.model_id and theirs.strategy == ours.strategy
        assert (theirs.report is None) == (ours.report is None)
        if ours.report is not None and theirs.report is not None:
            assert np.array_equal(ours.report.xyz, theirs.report.xyz)
            assert ours.report.spatial_per_layer == theirs.report.spatial_per_layer
            assert theirs.times.total > 0 and theirs.times.prefill > 0
        assert len(theirs.candidate_probabilities) == len(ours.candidate_probabilities)


def test_every_field_of_an_answer_is_that_of_an_engine_of_ones_own(tiny_of: Any, url_of: Any) -> None:
    """Numbers but for what 16 bits round; times are the clock's. With a budget, so that a plan is made."""
    name = NAMES[0]
    engine, scene, settings = robot(url_of(name), tiny_of(name))
    here = load_here(settings | {"engine.url": ""})
    own = open_scene(here, settings)
    for one in (scene, own):
        show(one, 0, 1, 2)
    for question in (*QUESTIONS, Question("What is there?", latency_budget_ms=60_000.0)):
        ours, theirs = here.ask(own, question), engine.ask(scene, question)
        assert (ours.decision is None) == (not ours.status.answered or ours.report is None)
        assert unlike(theirs, replace(ours, times=theirs.times), 5e-3) == [], question.text


def test_text_comes_as_it_is_written_and_a_cancel_ends_it(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    stages: list[str] = []
    texts: list[int] = []
    answer = engine.ask(
        scene,
        Question("What is there?", max_new_tokens=6),
        on_text=lambda _, n: texts.append(n),
        on_stage=stages.append,
    )
    assert answer.status in (Status.OK, Status.TRUNCATED) and texts == list(range(1, len(texts) + 1)) and texts
    assert stages == ["encode", "tokens", "prefill", "decode"]
    seen: list[int] = []
    ended: list[Any] = []
    over, replica = threading.Event(), replica_of(NAMES[0])
    end = replica._ended
    monkeypatch.setattr(replica, "_ended", lambda *of: (ended.append(of[1]), end(*of), over.set()))
    long = Question("What is there?", max_new_tokens=400)
    stopped = engine.ask(scene, long, on_text=lambda _, n: seen.append(n), should_stop=lambda: len(seen) >= 3)
    assert stopped.status == Status.CANCELLED and len(seen) == 3
    assert over.wait(LIMIT) and ended[0].status == Status.CANCELLED
    assert ended[0].status_message.startswith("the robot has gone: cancelled after ")


def test_the_way_counts_and_questions_share_what_was_read_of_a_scene(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a budget goes with the question, the way there and back taken off; the second question about a
    scene reads on from what the first has read of it."""
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0, 1)
    sent: list[float] = []
    ask = engine.link.ask
    monkeypatch.setattr(
        engine.link,
        "ask",
        lambda s, content, *of, **more: (sent.append(content["elapsed_ms"]), ask(s, content, *of, **more))[1],
    )
    assert engine.link.way.seconds > 0
    assert engine.ask(scene, Question("What is there?")).status.answered
    held = next(one for one in replica_of(NAMES[0]).scenes.all() if one.name == scene.name)
    stems = held.queue.ready.result().prepared.stems
    used = stems.used
    assert engine.ask(scene, Question("What is near the chair?")).status.answered and stems.used == used + 1
    engine.link.way.met(30.0)  # seconds
    late = engine.ask(scene, Question("What is there?", latency_budget_ms=20_000.0))
    assert sent[-1] > 30_000 and max(sent[:-1]) < 30_000
    assert late.status == Status.BUDGET_INFEASIBLE, late.status_message


def test_each_token_comes_before_the_next_is_decoded(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep: the engine there decodes a token once the one before it has arrived here."""
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    seen, came, late = [0], threading.Condition(), []
    there = replica_of(NAMES[0]).engine
    decode = there.decode

    def once_seen(ids: list[int]) -> str:
        with came:
            late.append(not came.wait_for(lambda: seen[0] >= len(ids) - 1, LIMIT))
        return decode(ids)

    def on_text(text: str, tokens: int) -> None:
        with came:
            seen[0] = tokens
            came.notify_all()

    monkeypatch.setattr(there, "decode", once_seen)
    answer = engine.ask(scene, Question("What is there?", max_new_tokens=5), on_text=on_text)
    assert answer.status.answered and len(late) > 1 and not any(late)


def test_a_cancel_waits_for_no_line(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the engine there is in the middle of something and says nothing for a minute."""
    replica = replica_of(NAMES[0])
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    assert engine.ask(scene, Question("What is there?")).status.answered
    held, release = held_up(replica, monkeypatch)
    over, ended, end = threading.Event(), [], replica._ended
    monkeypatch.setattr("adatoken3d_ros.fleet.wire.heartbeat", lambda budget_ms: 60.0)
    monkeypatch.setattr(replica, "_ended", lambda *of: (ended.append(of[1]), end(*of), over.set()))
    looks = itertools.count()
    began = time.monotonic()
    answer = engine.ask(scene, Question("What is there?"), should_stop=lambda: held.is_set() and next(looks) > 9)
    assert answer.status == Status.CANCELLED and not ended
    assert time.monotonic() - began < PATIENCE  # after which the connection would count as broken
    release.set()
    assert over.wait(LIMIT) and ended[0].status == Status.CANCELLED


def test_only_what_is_missing_is_sent(url_of: Any, tiny_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = NAMES[0]
    engine, scene, _ = robot(url_of(name), tiny_of(name))
    sent: list[int] = []
    ask = engine.link.ask
    monkeypatch.setattr(
        engine.link, "ask", lambda s, c, bodies, **more: (sent.append(len(bodies) - 1), ask(s, c, bodies, **more))[1]
    )
    question = Question("What is there?")
    show(scene, 0, 1)
    assert engine.ask(scene, question).status.answered and sent == [0, 2]
    show(scene, 2)
    assert engine.ask(scene, question).status.answered and sent == [0, 2, 0, 1]
    assert engine.ask(scene, question).status.answered and sent == [0, 2, 0, 1, 0]
    # A view that was moved is another body, one that lost rows is not.
    newest = max(scene.poses)
    moved = scene.poses[newest].copy()
    moved[0, 3] += 0.05
    scene.move({newest: moved})
    assert engine.ask(scene, question).status.answered and sent[-2:] == [0, 1]
    voxels = scene.memory._map.occupied_keys[:3]
    assert scene.memory._map.carve(voxels, before=1 << 60) > 0
    before = len(sent)
    assert engine.ask(scene, question).status.answered and sent[before:] == [0]
    own = scene.tokens()
    # Others come and it goes; then it is sent again.
    for _ in range(3):
        _, other, _ = robot(url_of(name), tiny_of(name))
        show(other, 0)
        assert other.runtime.ask(other, question).status.answered
    before = len(sent)
    again = engine.ask(scene, question)
    assert sent[before:] == [0, 3] and again.report is not None
    assert np.array_equal(again.report.xyz, own.xyz.numpy())


def test_what_is_new_is_sent_before_anybody_asks(url_of: Any, tiny_of: Any, replica_of: Any) -> None:
    name = NAMES[0]
    _, scene, _ = robot(url_of(name), tiny_of(name))
    there = threading.Event()
    offer = scene.offer
    show(scene, 0)
    assert scene.work_ahead
    scene.offer = lambda *what: (offer(*what), there.set())
    scene.prepare()
    assert there.is_set() and not scene.work_ahead
    held = replica_of(name).scenes
    deadline = threading.Event()
    for _ in range(int(LIMIT / 0.02)):
        found = [one for one in held.all() if one.name == scene.name]
        if found and not found[0].shelf.want(scene._told):
            break
        deadline.wait(0.02)
    else:
        pytest.fail("nothing was sent")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engine.token": "another"}, r"refuses it: the request bears no token"),
        ({"engine.token": "two words"}, r"engine.token: letter 4 of the token is a space"),
        ({"engine.token": "/no/such/file"}, r"engine.token: .*No such file"),
        ({"engine.url": "https://127.0.0.1:9", "engine.ca_file": "/no/such/file"}, r"engine.ca_file /no/such/file"),
        ({"strategy": "magic"}, r"strategy 'magic' is none of"),
        ({"model.path": "other"}, r"encodes views as .* different models"),
    ],
)
def test_what_keeps_a_robot_from_its_engine_is_named(
    change: dict[str, Any], says: str, url_of: Any, tiny_of: Any, tmp_path: Path
) -> None:
    from tests.architectures import write_tiny

    if "model.path" in change:
        change = {"model.path": str(write_tiny(NAMES[0], tmp_path / "other", seed=5))}
    with pytest.raises((ValueError, OSError), match=says):
        robot(change.pop("engine.url", None) or url_of(NAMES[0]), tiny_of(NAMES[0]), **change)


def test_an_engine_with_another_model_refuses_by_name(url_of: Any, tiny_of: Any) -> None:
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    engine.model.identity = "0-0"
    answer = engine.ask(scene, Question("What is there?"))
    assert answer.status == Status.ERROR and "a request for the model 0-0, here is " in answer.status_message


@pytest.mark.parametrize("fallback", [False, True])
def test_without_a_link_the_fallback_answers_or_it_is_an_error_in_time(
    fallback: bool, tiny_of: Any, replica_of: Any
) -> None:
    """And when the link is back the engine answers again, with what it holds already."""
    name = NAMES[0]
    more = {"engine.fallback": str(tiny_of(NAMES[1]))} if fallback else {}
    question = Question("What is there?", latency_budget_ms=1500.0)
    with listening(replica_of(name)) as port:
        engine, scene, _ = robot(f"http://127.0.0.1:{port}", tiny_of(name), **more)
        show(scene, 0)
        assert engine.ask(scene, question).model_id.startswith(f"tiny-{name}")
    answer = engine.ask(scene, question)
    if fallback:
        assert answer.status.answered and answer.model_id.startswith(f"tiny-{NAMES[1]}")
        assert "answered by the fallback: http://127.0.0.1" in answer.status_message
    else:
        assert answer.status == Status.ERROR and "cannot be reached" in answer.status_message and answer.budget_met
    show(scene, 1)
    with listening(replica_of(name), port):
        answer = engine.ask(scene, Question("What is there?"))
        assert answer.status.answered and answer.model_id.startswith(f"tiny-{name}")


@pytest.mark.parametrize(("encode", "fallback"), [("local", True), ("local", False), ("picture", False)])
def test_an_engine_that_is_not_there_yet_is_met_later(
    encode: str, fallback: bool, tiny_of: Any, replica_of: Any, url_of: Any
) -> None:
    """Until then the fallback answers, or it is an error that says so; then answers are those of one that was there
    from the beginning, about all that was seen meanwhile."""
    name, port = NAMES[0], free_port()
    more = {"engine.encode": encode, **({"engine.fallback": str(tiny_of(NAMES[1]))} if fallback else {})}
    engine, scene, _ = robot(f"http://127.0.0.1:{port}", tiny_of(name), **more)
    assert not engine.met and engine.model_id.startswith(f"tiny-{NAMES[1]}") is fallback
    show(scene, 0, 1)
    scene.prepare()
    early = engine.ask(scene, Question("What is there?", latency_budget_ms=1500.0))
    if fallback:
        assert early.status.answered and early.model_id.startswith(f"tiny-{NAMES[1]}")
        assert "answered by the fallback: http://127.0.0.1" in early.status_message
    else:
        assert early.status == Status.ERROR and early.budget_met and not early.model_id
        assert "the shared engine did not answer: http://127.0.0.1" in early.status_message
    with listening(replica_of(name), port):
        later = engine.ask(scene, Question("What is there?"))
    assert engine.met and engine.model_id == later.model_id
    always, other, _ = robot(url_of(name), tiny_of(name), **{"engine.encode": encode})
    show(other, 0, 1)
    was_there = always.ask(other, Question("What is there?"))
    assert unlike(replace(later, times=was_there.times, question=was_there.question), was_there) == []


def test_an_engine_that_turns_out_to_have_another_model_is_named(tiny_of: Any, replica_of: Any) -> None:
    port = free_port()
    for encode, says in (("local", "they are of different models"), ("picture", "here its configuration is of")):
        engine, scene, _ = robot(f"http://127.0.0.1:{port}", tiny_of(NAMES[1]), **{"engine.encode": encode})
        show(scene, 0)
        with listening(replica_of(NAMES[0]), port):
            answer = engine.ask(scene, Question("What is there?", latency_budget_ms=5000.0))
        assert answer.status == Status.ERROR and says in answer.status_message and not engine.met


def test_whoever_gives_a_scene_up_sends_nothing_more(tiny_of: Any) -> None:
    """Its thread ends, although the engine is out of reach and what was offered is not there."""
    others = set(threading.enumerate())  # another test's may not have ended yet
    engine, scene, _ = robot(f"http://127.0.0.1:{free_port()}", tiny_of(NAMES[0]))
    show(scene, 0)
    scene.prepare()
    (sender,) = (one for one in set(threading.enumerate()) - others if one.name == "adatoken3d-sender")
    del engine, scene
    gc.collect()
    sender.join(LIMIT)
    assert not sender.is_alive()


def test_each_change_of_a_scene_is_offered_as_often() -> None:
    """Also one that comes while an older one is tried: a robot that stands still then has its scene brought, too."""
    tried: list[str] = []

    def send(what: str) -> None:
        tried.append(what)
        if len(tried) == 2:
            sender.offer("newer")
        raise LinkError("out of reach")

    sender = Sender(send, again=0.0, attempts=3)
    sender._offer, sender._running = "older", True  # as its thread finds it
    sender._run()
    assert tried == ["older"] * 2 + ["newer"] * 3


def test_what_has_gone_is_asked_about_there_too(tiny_of: Any, url_of: Any) -> None:
    """A thing that a later frame looks through travels with the scene; the verdict rests on the same places."""
    name = NAMES[0]
    engine, scene, settings = robot(url_of(name), tiny_of(name), **{"max_new_tokens": 1})
    here = load_here(settings | {"engine.url": ""})
    own = open_scene(here, settings)
    for one in (scene, own):
        one.observe(room_frame(0))
        one.encode_pending()
        one.observe(room_frame(1, boxes=()))
        one.encode_pending()
    assert own.memory.past.tombstones.gone and len(scene.memory.past.tombstones.gone) == len(
        own.memory.past.tombstones.gone
    )
    ours, theirs = here.ask(own, QUESTIONS[0]), engine.ask(scene, QUESTIONS[0])
    assert scene.described()[0].things
    assert theirs.status == ours.status and theirs.spatial_tokens == ours.spatial_tokens, theirs.status_message
    assert theirs.verdict == ours.verdict and theirs.verdict_reason == ours.verdict_reason
