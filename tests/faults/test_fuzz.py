# SPDX-License-Identifier: Apache-2.0
"""Ten thousand spoilt messages and requests through the real conversions and checks: only documented errors come out.

Hypothesis chooses what is spoilt and a seed; the rest is drawn from the seed, which is much faster than drawing bytes.
`python -m benchmarks.hostile` goes on for as long as wanted, and sends them to the real node, too.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("rclpy")

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.requests import InvalidRequest
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm.text_places import parse_boxes
from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.ros.inputs.pictures import STREAMS
from adatoken3d_ros.ros.questions import question_of
from adatoken3d_ros.scene.frames import FrameError, PosedFrame
from benchmarks._hostile_messages import (
    CLOUD_SPOILS,
    DEFAULTS,
    FRAME_SPOILS,
    HARD_SPOILS,
    WORDS,
    Spoil,
    clouds,
    compressed_images,
    convert,
    images,
    poses,
    request,
)
from tests.engine.scenes import ask, new_scene

FRAMES, COMPRESSED, CLOUDS, VIRTUAL, POSES, REQUESTS = 4000, 1000, 1700, 300, 1000, 2000
assert FRAMES + COMPRESSED + CLOUDS + VIRTUAL + POSES + REQUESTS == 10_000

SEEDS = st.integers(0, 2**32 - 1)


def fuzz(n: int, **draws: Any) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    once = settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    return lambda test: once(given(seed=SEEDS, **draws)(test))


def taken(m: Any, source: str) -> bool:
    """Whether it gave frames; if not, it was refused with words."""
    try:
        return bool(convert(m, source))
    except (ConversionError, FrameError) as error:
        assert str(error)
        return False


@fuzz(FRAMES, spoils=st.lists(st.sampled_from([*FRAME_SPOILS, *HARD_SPOILS]), max_size=3))
def test_images_and_calibrations(seed: int, spoils: list[Spoil]) -> None:
    assert taken(images(random.Random(seed), spoils), "rgbd") or spoils


@fuzz(COMPRESSED, spoils=st.lists(st.sampled_from(FRAME_SPOILS[6:]), max_size=1))
def test_compressed_images(seed: int, spoils: list[Spoil]) -> None:
    taken(compressed_images(random.Random(seed), spoils), "rgbd")


@fuzz(
    CLOUDS,
    spoils=st.lists(st.sampled_from(CLOUD_SPOILS), max_size=3),
    source=st.sampled_from(["organised_points", "points_with_camera"]),
)
def test_clouds(seed: int, spoils: list[Spoil], source: str) -> None:
    assert taken(clouds(random.Random(seed), spoils, source), source) or spoils


@fuzz(VIRTUAL, spoils=st.lists(st.sampled_from(CLOUD_SPOILS), min_size=1, max_size=3), is_map=st.booleans())
def test_clouds_that_are_drawn_into_pictures(seed: int, spoils: list[Spoil], is_map: bool) -> None:
    m = clouds(random.Random(seed), spoils, "points")
    m.is_map = is_map
    taken(m, "points")


@fuzz(POSES)
def test_poses(seed: int) -> None:
    poses(random.Random(seed))


@pytest.fixture(scope="module")
def session(loaded: tuple[Any, Any]) -> Scene:
    """It has seen a wall."""
    made = new_scene(*loaded, SessionConfig(max_new_tokens=1))
    rgb = np.zeros((48, 64, 3), np.uint8)
    K = np.array([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
    made.observe(PosedFrame(rgb, np.full((48, 64), 2.0, np.float32), K, np.eye(4), 1_000_000_000))
    made.encode_pending()
    return made


@fuzz(REQUESTS, words=st.lists(st.sampled_from(WORDS), max_size=5))
def test_requests(session: Scene, seed: int, words: list[str]) -> None:
    rng = random.Random(seed)
    asked_for = request(rng, words)
    question = question_of(asked_for, DEFAULTS)
    try:
        session.prompt(question)
    except InvalidRequest as error:
        assert str(error)
        asked = ask(session, question)
        assert asked.status == Status.INVALID_REQUEST and asked.status_message
    else:
        if asked_for.max_new_tokens in (0, 1) and rng.random() < 0.05:
            assert ask(session, question).status in (
                Status.OK,
                Status.TRUNCATED,
                Status.INVALID_REQUEST,
                Status.NO_SCENE,  # of the places that it may see, nothing was seen
            )
    assert all(math.isfinite(v) for box in parse_boxes(question.text) for v in box)


def test_every_kind_of_source_is_fuzzed() -> None:
    assert set(STREAMS) == {"rgbd", "organised_points", "points_with_camera", "points"}
