# SPDX-License-Identifier: Apache-2.0
"""Work that is not done twice: what was found is written down as soon as it is, a line for each piece of work.

A run that ended goes on where it was, and a run with one policy more answers with that alone. What a result belongs to
is in its line as a digest: the model, the questions, the schedule, and the source of the policy. Sources of the decoder
are not in it: after a change there, another file has to be taken.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.pruning import scores
from adatoken3d_ros.pruning.strategy import Strategy
from benchmarks._scenes import Reader, Workers

_BEGIN = b'["'  # of a line
T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Keyed(Protocol):
    """Work whose result is a JSON value that depends on the model and on this alone."""

    def kept_as(self) -> list[Any]:
        """Plain values."""
        ...


class Kept:
    """`Workers` that remember, in `path`, what they found for work that is `Keyed`; without a path, they do not.

    A line that was cut off when a run was killed counts as not there. `reused`: results that were there already.

    Raises:
        ValueError: the file is none that this wrote; it stays as it is.
    """

    def __init__(self, workers: Workers, path: Path | None, model: str) -> None:
        self._workers, self._path, self._model = workers, path, model
        self._found: dict[str, Any] = {}
        self.reused = 0
        if path is None:
            return
        self._found, length = read_kept(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            os.truncate(path, length)

    def map(self, what: str, function: Callable[[Reader, T], R], tasks: Sequence[T]) -> list[R]:
        """As `Workers.map`, results of work that is `Keyed` from where they are, or as they will be read from there."""
        if self._path is None or not all(isinstance(task, Keyed) for task in tasks):
            return self._workers.map(what, function, tasks)
        names = [self._name(function.__name__, task) for task in tasks]
        waiting = {name: task for name, task in zip(names, tasks, strict=True) if name not in self._found}
        self.reused += len(tasks) - len(waiting)
        order = list(waiting)
        with self._path.open("a", encoding="utf-8") as file:

            def keep(index: int, result: R) -> None:
                line = json.dumps([order[index], result])
                file.write(line + "\n")
                file.flush()
                self._found[order[index]] = json.loads(line)[1]

            self._workers.map(what, function, list(waiting.values()), keep)
        return [self._found[name] for name in names]

    def _name(self, function: str, task: Any) -> str:
        content = json.dumps([self._model, function, *task.kept_as()])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def read_kept(path: Path) -> tuple[dict[str, Any], int]:
    """The results in a file of `Kept`, none where there is none yet, and the bytes that they take.

    Raises:
        ValueError: the file is none that `Kept` wrote.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not content[len(whole) :].startswith(_BEGIN[: len(content) - len(whole)]):
        raise ValueError(f"{path} ends with what no run has begun to write")
    found: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            name, value = json.loads(line)
            found[name] = value
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no results of a run: line {number} is none") from error
    return found, len(whole)


def strategy_key(strategy: Strategy) -> list[Any]:
    """What a strategy does: policy, options, gates, and the sources of the policy and of the scores."""
    policy = make_rival(strategy.policy, **strategy.options)
    kinds = [kind for kind in type(policy).__mro__ if kind.__module__.startswith("adatoken3d_ros.")]
    sources = {inspect.getfile(kind) for kind in kinds} | {inspect.getfile(scores)}
    content = b"".join(Path(path).read_bytes() for path in sorted(sources))
    stages = [[stage.layer, stage.ratio] for stage in strategy.schedule.stages]
    options = json.loads(json.dumps(dict(strategy.options)))
    digest = hashlib.sha256(content).hexdigest()
    return [strategy.policy, options, stages, strategy.schedule.withdraw_layer, digest]
