# SPDX-License-Identifier: Apache-2.0
"""The view's source in another process: a node that runs, asked by its action, seen by its topics."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.pictures import Left
from adatoken3d_ros.ros.client import AnswerStream, SceneClient
from adatoken3d_ros.ros.watching import SceneWatcher, Seen
from adatoken3d_ros.text import shown
from adatoken3d_ros.view.report import Reported
from adatoken3d_ros.view.source import Ages, Shown, SourceError, Told


class NodeSource:
    """See `Source`.

    Args:
        client: of the node; closed with this.
        strategies: that the menu has: the node refuses what it does not know, and says what it knows.
        budget_ms, click_question: see `Source`.
        record: an adatoken3d/msg/Answer as plain values.
    """

    def __init__(
        self,
        client: SceneClient,
        strategies: tuple[str, ...],
        budget_ms: float,
        click_question: str,
        record: Callable[[Any], dict[str, Any]],
    ) -> None:
        self.strategies, self.budget_ms, self.click_question = strategies, budget_ms, click_question
        self._client, self._record = client, record
        self._watcher, self._ages = SceneWatcher(client), Ages()
        self._seen, self._shown = Seen(), Shown()
        self._stream: AnswerStream | None = None

    def scene(self) -> Shown:
        seen = self._watcher.seen
        if seen is not self._seen:
            self._seen = seen
            since = self._ages.of(seen.xyz, seen.count, seen.stamp_ns)
            self._shown = Shown(seen.xyz, seen.rgb, since, seen.pictures, seen.stamp_ns)
        return self._shown

    def ask(self, question: Question, strategy: str, on_text: Told, on_stage: Told) -> Reported:
        self._watcher.forget_report()
        try:
            self._stream = stream = self._client.stream(
                question.text,
                clicks=question.clicks.tolist(),
                latency_budget_ms=question.latency_budget_ms or 0.0,
                max_new_tokens=question.max_new_tokens or 0,
                strategy=_named(strategy),
                without=question.without.tolist(),
                only=question.only.tolist(),
                candidates=question.candidates,
                timeout=None,
            )
            stream.on_stage = on_stage  # most stages come and go before there is a piece of text
            for _ in stream:
                on_text(stream.text)
            answer = stream.answer
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(shown(error)) from error
        finally:
            self._stream = None
        record = {**self._record(answer), "clicks": question.clicks.tolist()}
        tokens, voxels = self._watcher.report_of(answer), self._watcher.seen.voxels
        if tokens is None or voxels is None:
            return Reported(record, tokens)
        return Reported(record, tokens, Left.of(voxels, tokens.xyz[tokens.retained]))

    def command(self, question: Question, strategy: str) -> str:
        fields = [f"question: {json.dumps(question.text, ensure_ascii=False)}"]
        if question.latency_budget_ms:
            fields.append(f"latency_budget_ms: {question.latency_budget_ms:g}")
        if name := _named(strategy):
            fields.append(f"strategy: {json.dumps(name)}")
        for name, places in (("clicks", question.clicks), ("without", question.without), ("only", question.only)):
            if len(places):
                told = ", ".join("{{x: {:.4f}, y: {:.4f}, z: {:.4f}}}".format(*place) for place in np.asarray(places))
                fields.append(f"{name}: [{told}]")
        request = "{" + ", ".join(fields) + "}"
        names = ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE")
        where = "".join(f"{name}={shlex.quote(os.environ[name])} " for name in names if name in os.environ)
        call = ["ros2", "service", "call", f"{self._client.name}/ask", "adatoken3d/srv/AskScene", request]
        return where + shlex.join(call)

    def cancel(self) -> None:
        if (stream := self._stream) is not None:
            stream.cancel()

    def close(self) -> None:
        self._client.close()


def _named(strategy: str) -> str:
    """What a question says of its strategy: a file is for who starts the node, whose own it can only be."""
    return "" if strategy.endswith((".yaml", ".yml")) else strategy
