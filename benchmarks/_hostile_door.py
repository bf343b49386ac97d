# SPDX-License-Identifier: Apache-2.0
"""Hostile messages and questions all the way: through the worker and a scene with a tiny model, and then a good one.

A try begins with an empty scene, so that it depends on nothing but its seed.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.ros.questions import question_of
from adatoken3d_ros.scene.frames import PosedFrame
from benchmarks._hostile import PATIENCE, Loss
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
    png_bomb,
    poses,
    request,
)

ANSWERED = tuple(status for status in Status if status.answered)
BOMB_SIDE = 20_000


class Refused(ConversionError):
    """A status or a fate that stands for a refusal; it is the worker that said so."""


class Door:
    """Worker and scene; what goes in is accounted for."""

    def __init__(self, model: Path, max_new_tokens: int = 2) -> None:
        self._fates: queue.Queue[str] = queue.Queue()
        config = SessionConfig(max_new_tokens=max_new_tokens)
        events = Listeners().add(FrameTaken, lambda told: self._fates.put(told.fate))
        self.worker = Worker(lambda: Engine(*load(model)[:2]))
        self.queue = self.worker.open(lambda engine: engine.open(config), events=events)
        self.worker.start()
        self.queue.ready.result()

    def begin(self) -> None:
        """Forgets the scene."""
        self.queue.call(lambda scene: scene.clear()).result(PATIENCE)

    def take(self, frame: PosedFrame) -> str:
        """What became of a frame. Raises Loss if nothing did."""
        self.queue.submit_frame(lambda: frame, lambda: (frame.stamp_ns, frame.T_world_camera))
        try:
            return self._fates.get(timeout=PATIENCE)
        except queue.Empty:
            raise Loss("a frame without a fate") from None

    def ask(self, question: Question) -> Answer:
        """Raises Loss for a question that is not answered."""
        try:
            return self.queue.submit(question).result.result(PATIENCE)
        except TimeoutError:
            raise Loss("a question without an answer") from None

    def good(self, index: int = 0) -> None:
        """A good frame becomes a key frame, and a good question is answered; raises Loss."""
        fate = self.take(good_frame(index))
        if fate != "key_frame":
            raise Loss(f"a good frame afterwards was {fate}")
        answer = self.ask(Question("What is there?", max_new_tokens=2))
        if answer.status not in ANSWERED:
            raise Loss(f"a good question afterwards was {answer.status.name}: {answer.status_message}")


def good_frame(index: int) -> PosedFrame:
    """A coloured wall 2 m ahead; each index is another place."""
    rng = np.random.default_rng(index)
    rgb = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    depth = rng.uniform(1.9, 2.1, (48, 64)).astype(np.float32)
    K = np.array([[50.0, 0.0, 31.5], [0.0, 50.0, 23.5], [0.0, 0.0, 1.0]])
    T = np.eye(4)
    T[:3, :3] = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    T[:3, 3] = (3.0, 7.0 + 0.5 * index, 1.0)
    return PosedFrame(rgb, depth, K, T, 2_000_000_000 + index)


def tiny(folder: Path) -> Path:
    from benchmarks._ros import endless_model

    return endless_model(folder / "tiny")


def _frames(folder: Path, make: Callable[[random.Random], tuple[Any, str]]) -> Callable[[random.Random], object]:
    door = Door(tiny(folder))

    def attempt(rng: random.Random) -> None:
        message, source = make(rng)
        door.begin()
        refusal: Exception | None = None
        try:
            for frame in convert(message, source)[:2]:
                fate = door.take(frame)
                assert not fate.startswith("error"), fate  # what a PosedFrame lets pass can be encoded
            # What waits is encoded with the next question; that, too, has to be answered.
            answer = door.ask(Question("What is there?", max_new_tokens=2))
            if answer.status not in (*ANSWERED, Status.NO_SCENE):
                refusal = Refused(f"{answer.status.name}: {answer.status_message}")
        except ValueError as error:
            refusal = error
        door.good()
        if refusal is not None:
            raise refusal

    return attempt


def _spoils(rng: random.Random, choices: list[Spoil]) -> list[Spoil]:
    return [rng.choice(choices) for _ in range(rng.randrange(1, 4))]


def image_attack(folder: Path) -> Callable[[random.Random], object]:
    return _frames(folder, lambda rng: (images(rng, _spoils(rng, FRAME_SPOILS + 2 * HARD_SPOILS)), "rgbd"))


def compressed_attack(folder: Path) -> Callable[[random.Random], object]:
    bomb = png_bomb(BOMB_SIDE)

    def make(rng: random.Random) -> tuple[Any, str]:
        m = compressed_images(rng, _spoils(rng, [*FRAME_SPOILS, *HARD_SPOILS]))
        if rng.random() < 0.03:
            rng.choice([m.rgb, m.depth]).data = bomb
        return m, "rgbd"

    return _frames(folder, make)


def cloud_attack(folder: Path) -> Callable[[random.Random], object]:
    def make(rng: random.Random) -> tuple[Any, str]:
        source = rng.choice(["organised_points", "points_with_camera", "points"])
        m = clouds(rng, _spoils(rng, CLOUD_SPOILS), source)
        m.is_map = source == "points" and rng.random() < 0.5
        return m, source

    return _frames(folder, make)


def pose_attack(folder: Path) -> Callable[[random.Random], object]:
    def attempt(rng: random.Random) -> None:
        if poses(rng):
            raise Refused("some of them")

    return attempt


def question_attack(folder: Path) -> Callable[[random.Random], object]:
    door = Door(tiny(folder))
    door.good()

    def attempt(rng: random.Random) -> None:
        question = question_of(request(rng, [rng.choice(WORDS) for _ in range(rng.randrange(6))]), DEFAULTS)
        answer = door.ask(question)
        if answer.status in (Status.ERROR, Status.NO_SCENE):
            raise AssertionError(f"{answer.status.name}: {answer.status_message}")
        good = door.ask(Question("What is there?", max_new_tokens=2))
        if good.status not in ANSWERED:
            raise Loss(f"a good question afterwards was {good.status.name}: {good.status_message}")
        if answer.status not in ANSWERED:
            raise Refused(answer.status_message)

    return attempt
