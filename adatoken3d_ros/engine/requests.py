# SPDX-License-Identifier: Apache-2.0
"""What of a question can be checked and taken apart before a model sees it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.lmm.text_places import MAX_CLICKS, MAX_WRITTEN_CHARS, PromptError, check_length, parse_clicks
from adatoken3d_ros.scene.frames import MAX_POSITION
from adatoken3d_ros.settings import BY_NAME

LONGEST_TEXT = MAX_WRITTEN_CHARS  # of a question that is asked, its points included
MAX_PLACES = 100_000  # that a question is not to see, or to see alone
MAX_CANDIDATES, LONGEST_CANDIDATE = 16, 2000
FAR_CLICK = 100.0  # metres from the box around all that has been seen; nobody asks about a point beyond it


class InvalidRequest(ValueError):
    """A question that cannot be asked; the message names the offending value."""


def check_question(question: Question) -> None:
    """Raises InvalidRequest, naming the value, for a question that no engine can answer."""
    try:
        check_length(question.text)
    except PromptError as error:
        raise InvalidRequest(str(error)) from error
    if not question.text.strip():
        raise InvalidRequest("the question is empty")
    clicks = question.clicks
    if clicks.ndim != 2 or clicks.shape[1] != 3:
        raise InvalidRequest(f"clicks must be (n, 3), got {clicks.shape}")
    if len(clicks) > MAX_CLICKS:
        raise InvalidRequest(f"{len(clicks)} clicks are more than {MAX_CLICKS}")
    check_points(clicks)
    for name, places in (("without", question.without), ("only", question.only)):
        if places.ndim != 2 or places.shape[1] != 3 or len(places) > MAX_PLACES:
            raise InvalidRequest(f"{name} must be (n, 3) with at most {MAX_PLACES} places, got {places.shape}")
        check_points(places, name)
    if len(question.candidates) > MAX_CANDIDATES:
        raise InvalidRequest(f"{len(question.candidates)} candidates are more than {MAX_CANDIDATES}")
    if any(len(text) > LONGEST_CANDIDATE for text in question.candidates):
        raise InvalidRequest(f"a candidate has more than {LONGEST_CANDIDATE} characters")
    budget = question.latency_budget_ms
    if budget is not None and not 0 <= budget < math.inf:
        raise InvalidRequest(f"latency_budget_ms must be 0 (no limit) or positive, got {budget}")
    most = int(BY_NAME["max_new_tokens"].high or 0)
    if question.max_new_tokens is not None and not 0 <= question.max_new_tokens <= most:
        raise InvalidRequest(
            f"max_new_tokens must be between 0 (the default) and {most}, got {question.max_new_tokens}"
        )


def check_points(clicks: NDArray[np.float64], what: str = "clicks") -> None:
    """Raises InvalidRequest, naming the first one, for points (n, 3) that are not finite or lie beyond any scene."""
    for index in np.flatnonzero(~(np.abs(clicks) <= MAX_POSITION).all(axis=1))[:1]:
        point = clicks[index].tolist()
        if not np.isfinite(point).all():
            raise InvalidRequest(f"{what} must be finite, got {point}")
        raise InvalidRequest(f"the point {point} is not within {MAX_POSITION:g} m of the scene's origin")


def clicks_of(question: Question, taken: bool) -> tuple[str, NDArray[np.float64]]:
    """The question with its written points taken out, and all clicks in the order of their placeholders.

    Raises:
        PromptError: for what cannot stand in a question (`parse_clicks`).
        InvalidRequest: for points, where the model takes none.
    """
    text, written = parse_clicks(question.text)
    clicks = np.concatenate([np.asarray(written, dtype=np.float64).reshape(-1, 3), question.clicks])
    if len(clicks) and not taken:
        raise InvalidRequest(f"the question has {len(clicks)} points, and this model takes none")
    return text, clicks


def about_point(question: Question, point: NDArray[np.float64]) -> Question:
    """The question about a point (3,), scene frame, metres: written where its text says {p}, else beside the text."""
    if "{p}" not in question.text:
        return replace(question, clicks=point[None])
    return replace(question, text=question.text.replace("{p}", "[{:.3f}, {:.3f}, {:.3f}]".format(*point)))
