# SPDX-License-Identifier: Apache-2.0
"""What the latency budgets' benchmark asks: rooms, an engine that has warmed up, and a scene in its worker."""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.budget.controller import BudgetConfig
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.budget.plans import options, removed_share
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.engine.loading import fitted_strategies, make_strategy
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.lab.probe import Probe, Sample
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.weights import embedded_path

WAIT = 120.0  # seconds until an answer that does not come ends the benchmark


@dataclass(frozen=True, eq=False)
class Shown:
    """A room: the views that are there when it is asked about, those that come later, and questions with answers."""

    first: list[PosedFrame]
    later: list[PosedFrame]
    questions: list[QA]


def make_scenes(args: argparse.Namespace) -> list[Shown]:
    """Test rooms, with enough questions for their share of the run."""
    each = -(-args.questions // args.scenes)
    scenes = []
    for seed in range(args.scenes):
        room = make_room(seed, "test")
        late = -(-each // 4)
        frames = [view.frame for view in render_views(room, seed=args.seed, count=args.views + late)]
        frames = [replace(frame, stamp_ns=frame.stamp_ns + 1) for frame in frames]
        asked = generate(room, np.random.default_rng([args.seed, seed]), per_family=4)
        random = np.random.default_rng([args.seed, seed, 1])
        questions = [asked[i] for i in random.permutation(len(asked))]
        scenes.append(Shown(frames[: args.views], frames[args.views :], (questions * each)[:each]))
    return scenes


class Bench:
    """A model and what all runs share: scenes, the fit to this machine, and the measured loss of each schedule."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        self.trained = args.model is not None
        path = args.model
        self._temporary = tempfile.TemporaryDirectory()
        if path is None:
            try:
                path, self.trained = embedded_path(), True
            except FileNotFoundError:
                path = write_tiny_checkpoint(
                    self._temporary.name,
                    args.seed,
                    layers=args.layers,
                    hidden_size=args.hidden,
                    intermediate_size=args.hidden * 11 // 4,
                    heads=max(1, args.hidden // 32),
                    image_size=args.image,
                )
        self.name = "embedded" if self.trained and args.model is None else "random" if not self.trained else str(path)
        self.model, self.tokenizer, _ = registry.load(path, dtype=torch.float32)
        self.n_layers = len(self.model.decoder)
        model_hash = self.model.identity
        self.fitted = fitted_strategies(path, model_hash)
        self.strategy = make_strategy(args.strategy, self.n_layers, model_hash, self.fitted)
        console.print("rendering rooms")
        self.scenes = make_scenes(args)
        console.print("warming up")
        engine = Engine(self.model, self.tokenizer)
        engine.warm_up(self.strategy)
        assert engine.latency is not None
        self._fit = engine.latency
        self.samples = [self._sample(scene) for scene in self.scenes[:3]]
        if not self.calibrated:
            console.print("measuring the loss of each schedule")
            self.fitted = self._calibrate()

    def engine(self) -> Engine:
        """A fresh engine; its latency model starts from the fit."""
        engine = Engine(self.model, self.tokenizer, fitted=self.fitted)
        engine.latency = LatencyModel(self._fit.coefficients, self._fit.key, self._fit.scatter)
        return engine

    def open(self, engine: Engine) -> Scene:
        """An empty scene."""
        config = SessionConfig(
            key_frames=KeyFrameConfig(min_translation=0.0, min_rotation=0.0, max_views=self.args.views + 4),
            max_new_tokens=self.args.max_new_tokens,
            seed=self.args.seed,
            budget=BudgetConfig(),
        )
        return engine.open(config, self.strategy)

    def _sample(self, shown: Shown) -> Sample:
        scene = self.open(self.engine())
        for frame in shown.first:
            scene.observe(frame)
        scene.encode_pending()
        spliced, block = scene.spliced(Question(shown.questions[0].question))
        return Sample(spliced.embeds, spliced.layout, block.scene)

    @property
    def calibrated(self) -> list[Strategy]:
        """Strategies of the configured policy with measured losses, by what they remove."""
        own = [one for one in self.fitted.values() if one.policy == self.strategy.policy]
        return sorted(own, key=lambda one: removed_share(one.schedule, self.n_layers))

    def _calibrate(self) -> dict[str, Strategy]:
        policy = make_policy(self.strategy.policy, **self.strategy.options)
        probe = Probe(self.model.decoder, self.samples, policy)
        found = {}
        for option in options(self.strategy, self.n_layers):
            figures = {"figures": {"kl": probe.divergence(option.strategy.schedule)}}
            found[option.strategy.name] = replace(option.strategy, info=figures)
        return found


class Runner:
    """One scene in its worker; frames and questions go in as they would from outside."""

    def __init__(self, bench: Bench) -> None:
        self._done = threading.Semaphore(0)
        self.worker = Worker(bench.engine)
        self.queue = self.worker.open(bench.open, events=Listeners().add(FrameTaken, lambda _: self._done.release()))
        self.worker.start()
        self.queue.ready.result(WAIT)

    def show(self, frames: list[PosedFrame]) -> None:
        """Each is encoded before the next comes."""
        for frame in frames:
            self.queue.submit_frame(partial(_itself, frame))
            assert self._done.acquire(timeout=WAIT)

    def ask(self, question: Question, frame: PosedFrame | None) -> tuple[Answer, float]:
        """The answer and the milliseconds until it was there; `frame` comes in just before the question."""
        if frame is not None:
            self.queue.submit_frame(partial(_itself, frame))
        began = time.monotonic()
        answer = self.queue.submit(question).result.result(WAIT)
        ended = time.monotonic()
        if frame is not None:
            assert self._done.acquire(timeout=WAIT)
        return answer, (ended - began) * 1e3


def _itself(frame: PosedFrame) -> PosedFrame:
    return frame
