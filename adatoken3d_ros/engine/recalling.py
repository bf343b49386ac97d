# SPDX-License-Identifier: Apache-2.0
"""Questions about time, answered in plain words from what a scene knows of its past, whatever its model is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Answer, Status
from adatoken3d_ros.engine.knowing import remembered
from adatoken3d_ros.engine.past import Past
from adatoken3d_ros.engine.requests import InvalidRequest, check_question
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.time_questions import NotUnderstood, WhatChanged, WhenSeen, parse, span
from adatoken3d_ros.engine.words import sees
from adatoken3d_ros.lmm.text_places import CLICK_MARK, PromptError, parse_clicks
from adatoken3d_ros.scene.evidence import Evidence, Observed
from adatoken3d_ros.scene.occupancy import VOXEL
from adatoken3d_ros.scene.tombstones import FEWEST
from adatoken3d_ros.text import quoted

NEAR = 0.3  # metres around a place that is asked about
MOST_TOLD = 5  # changes that are told in words; the fields have all
_STEPS = np.linspace(-NEAR, NEAR, 5)
_AROUND = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS, indexing="ij"), axis=-1).reshape(-1, 3)
_NOW = 0.05  # seconds; what is nearer to the newest frame is in it
_WALL_NS = 978_307_200 * 10**9  # 2001; a clock that tells less is simulated, counts from a start, or was never set


def recall(scene: Scene, answer: Answer, text: str, by_model: Callable[[Answer, bool], Answer]) -> Answer:
    """The answer to a question; to one about time from the scene's past, to any other `by_model`.

    Args:
        answer: what is known of it so far. text: the question as it was asked.
        by_model: the answer to the question that an answer has; told aloud, or to be told in other words.

    Raises:
        InvalidRequest: for a question that cannot be asked. NoScene, ContradictoryScene: as `Scene.check`.
    """
    asked = parse(text)
    if asked is None:
        return by_model(answer, True)
    check_question(answer.question)
    if isinstance(asked, NotUnderstood):
        return not_understood(answer, asked)
    memory = scene.memory
    points = np.zeros((0, 3))
    if isinstance(asked, WhenSeen):
        try:
            rest, points = _places(memory.marks.resolved(asked.thing))
            written = len(_places(asked.thing)[1])
        except PromptError as error:
            raise InvalidRequest(str(error)) from error
        if rest.strip() != CLICK_MARK:  # a thing; what its place tells is not yet of the thing
            if written:
                return not_understood(answer, NotUnderstood(f"one thing or one place, not both: {text!r}"))
            question = replace(answer.question, text=asking(asked))
            return told_when(by_model(replace(answer, question=question), False), asked, memory.confirmed_ns)
    scene.encode_usable()
    scene.check(points)
    newest = memory.stamp_ns
    answer = replace(answer, stamp_ns=newest, as_of_ns=newest, confirmed_ns=memory.confirmed_ns)
    if isinstance(asked, WhenSeen):
        return told_when_place(answer, memory.past, asked, points, memory.confirmed_ns)
    return told_changes(answer, memory.past, asked, memory.confirmed_ns)


def _places(text: str) -> tuple[str, NDArray[np.float64]]:
    """As `parse_clicks`, the points (n, 3)."""
    rest, points = parse_clicks(text)
    return rest, np.array(points, np.float64).reshape(-1, 3)


def not_understood(answer: Answer, asked: NotUnderstood) -> Answer:
    """The answer to a question about time that has none of the forms."""
    text = "I did not understand this question about time."
    return replace(answer, status=Status.UNSURE, text=text, status_message=asked.why, confidence=0.0)


def asking(asked: WhenSeen) -> str:
    """What a model is asked to find out what a thing is."""
    return f"Can you see {asked.thing}?"


def told_when(answer: Answer, asked: WhenSeen, now_ns: int) -> Answer:
    """What an answer about a thing says of when it was seen; nothing where the model and what was seen say otherwise.

    Args:
        answer: to `asking`, with what it rests on. now_ns: acquisition time of the newest frame.
    """
    if not answer.status.answered:
        return answer
    if answer.confidence == 0.0 or not answer.evidence or answer.verdict in (Observed.UNKNOWN, Observed.NOT_OBSERVED):
        why = answer.status_message if answer.confidence == 0.0 else answer.verdict_reason
        never = answer.verdict is Observed.NOT_OBSERVED
        if never and sees(answer.text):
            return _contradicted(answer, asked, answer.verdict_reason)
        text = f"I have never seen {asked.thing}." if never else f"I do not know when I saw {asked.thing}."
        return replace(answer, text=text, boxes=(), status=Status.OK if never else Status.UNSURE, status_message=why)
    gone = answer.verdict is Observed.SEEN_THEN_GONE
    if sees(answer.text) is False and not gone:
        return _contradicted(answer, asked, "what its answer rests on is there")
    found = next((one for one in answer.evidence if bool(one.gone_ns) == gone), answer.evidence[0])
    ns = found.first_ns if asked.first else found.last_ns
    text = f"I {'first' if asked.first else 'last'} saw {asked.thing} {when(ns, now_ns)}, at {place(found.place)}."
    if found.gone_ns:
        text += f" {_gone(found, now_ns)}"
    status = Status.OK if answer.status is Status.TRUNCATED else answer.status  # the model's own text was not wanted
    message = "" if answer.status is Status.TRUNCATED else answer.status_message
    return replace(answer, text=text, boxes=(), status=status, status_message=message)


def _contradicted(answer: Answer, asked: WhenSeen, known: str) -> Answer:
    message = f"the model answers {quoted(answer.text, 60)} to {quoted(asking(asked), 120)}, but {known}"
    message = "; ".join(filter(None, (message, answer.status_message)))
    text = f"I do not know when I saw {asked.thing}."
    return replace(answer, text=text, boxes=(), status=Status.UNSURE, status_message=message)


def told_when_place(answer: Answer, past: Past, asked: WhenSeen, points: NDArray[np.float64], now_ns: int) -> Answer:
    """When a place (n, 3), scene frame, metres, was looked at: it needs no model.

    Args:
        asked: by the name of the place. now_ns: acquisition time of the newest frame.
    """
    occupancy = past.occupancy
    cells = (points[:, None] + _AROUND).reshape(-1, 3)
    seen = occupancy.look_numbers(cells, "seen")
    stamps = past.holders(cells)
    last = max([occupancy.stamp_of(int(seen.max(initial=0))), *stamps])
    where = _triple(points.mean(axis=0))
    if not last:
        text = f"I have never looked at {asked.thing}, at {place(where)}."
        reason = "the place was never looked at"
        return replace(answer, text=text, verdict=Observed.NOT_OBSERVED, verdict_reason=reason)
    ns = min([*stamps, last]) if asked.first else last
    evidence = Evidence(where, (2 * NEAR,) * 3, min([*stamps, last]), last, len(stamps), math.nan)
    text = f"I {'first' if asked.first else 'last'} saw {asked.thing} {when(ns, now_ns)}, at {place(where)}."
    share = float((seen > 0).mean())
    reason = "the place was looked at"
    known: dict[str, Any] = {"verdict": Observed.SEEN, "verdict_reason": reason, "coverage": share}
    return replace(answer, text=text, evidence=(evidence,), **known)


def told_changes(answer: Answer, past: Past, asked: WhatChanged, now_ns: int) -> Answer:
    """What has gone, moved and appeared within the span before now, the newest first."""

    def recent(ns: int) -> bool:
        return abs(now_ns - ns) <= asked.seconds * 1e9  # later, where the clock was set back

    asked_about = past.asked
    gone = [
        remembered(thing) for thing in asked_about.gone if recent(thing.gone_ns) and int(thing.count.sum()) >= FEWEST
    ]
    targets = [np.array(one.moved_to) for one in gone if one.moved_to is not None]
    appeared = [
        replace(remembered(thing), contribution=math.nan)
        for thing in asked_about.appeared
        if recent(thing.first_ns) and not any(np.allclose(thing.place, target, atol=VOXEL) for target in targets)
    ]  # fmt: skip
    changes = sorted([*gone, *appeared], key=lambda one: -(one.gone_ns or one.first_ns))
    within = "" if math.isinf(asked.seconds) else f" in the last {span(asked.seconds).removeprefix('1 ')}"
    if not changes:
        text = f"Nothing that I have looked at has changed{within}."
    else:
        told = [_gone(one, now_ns) if one.gone_ns else _appeared(one, now_ns) for one in changes[:MOST_TOLD]]
        more = f" And {len(changes) - MOST_TOLD} more." if len(changes) > MOST_TOLD else ""
        things = "1 thing has" if len(changes) == 1 else f"{len(changes)} things have"
        text = f"{things} changed{within}. {' '.join(told)}{more}"
    verdict = Observed.SEEN_THEN_GONE if gone else Observed.SEEN
    reason = f"{len(gone)} things were found gone and {len(appeared)} appeared{within}"
    return replace(answer, text=text, evidence=tuple(changes), verdict=verdict, verdict_reason=reason)


def _gone(one: Evidence, now_ns: int) -> str:
    last = f"last seen {when(one.last_ns, now_ns)}"
    if one.moved_to is not None:
        sure = f"{one.moved_confidence:.0%} sure"
        return f"What was at {place(one.place)}, {last}, has moved to {place(one.moved_to)} ({sure})."
    return f"What was at {place(one.place)}, {last}, was gone {when(one.gone_ns, now_ns)}."


def _appeared(one: Evidence, now_ns: int) -> str:
    return f"Something has appeared at {place(one.place)}, first seen {when(one.first_ns, now_ns)}."


def when(ns: int, now_ns: int) -> str:
    """A time in words, by the newest frame, and as UTC where the stamps are those of a clock that was set."""
    clock = ""
    if min(ns, now_ns) >= _WALL_NS:
        clock = datetime.fromtimestamp(ns // 10**9, timezone.utc).strftime(" (%Y-%m-%d %H:%M:%S UTC)")
    ago = (now_ns - ns) / 1e9
    if ago < -_NOW:
        return f"{span(-ago)} after the newest frame, whose clock was set back{clock}"
    return f"in the newest frame{clock}" if ago < _NOW else f"{span(ago)} before the newest frame{clock}"


def place(point: Sequence[float]) -> str:
    """A place in words, scene frame, metres."""
    return "[" + ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in point) + "]"


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
