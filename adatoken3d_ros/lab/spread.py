# SPDX-License-Identifier: Apache-2.0
"""Work on several cores or machines: one abstraction, whatever does it.

A worker makes its state once (a model that is loaded, mostly) and is then given tasks. What a task gives depends on
the state and the task alone, so all backends give the same, in the order of the tasks: `Alone` in this process,
`Processes` of this machine, and over a cluster `fleet.spread.Cluster`, which this package's layers above choose.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from typing import Any, Generic, Protocol, TypeVar

import torch

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")
R = TypeVar("R")


class Spread(Protocol[S_co]):
    """Workers with a state of type S each. Tasks, results and functions, which are a module's own, can be pickled."""

    def map(self, function: Callable[[S_co, T], R], tasks: Sequence[T]) -> Iterator[R]:
        """What function(state, task) gives, in the order of the tasks, each as soon as it and those before are there.

        What a function raises is raised here.
        """
        ...

    def share(self, value: T) -> Callable[[], T]:
        """Something large that several tasks need: what is given back may be part of a task, and gives the value where
        the task runs."""
        ...

    def close(self) -> None:
        """Ends the workers; tasks that have not begun are given up."""
        ...


class Alone(Generic[S]):
    """This process, which makes its state when it is first needed."""

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make

    @cached_property
    def _state(self) -> S:
        return self._make()

    def map(self, function: Callable[[S, T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See Spread."""
        return (function(self._state, task) for task in tasks)

    def share(self, value: T) -> Callable[[], T]:
        """See Spread."""
        return lambda: value

    def close(self) -> None:
        """Nothing is to be ended."""


class Processes(Generic[S]):
    """Processes of this machine, each with one thread of torch and a state of its own."""

    def __init__(self, make: Callable[[], S], count: int) -> None:
        # Not forked: torch has threads of its own.
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (make,))

    def map(self, function: Callable[[S, T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See Spread."""
        return self._pool.map(partial(_call, function), tasks)

    def share(self, value: T) -> Callable[[], T]:
        """See Spread; it travels with each task."""
        return partial(_itself, value)

    def close(self) -> None:
        """See Spread."""
        self._pool.shutdown(cancel_futures=True)


_state: Any = None


def _start(make: Callable[[], Any]) -> None:
    global _state
    torch.set_num_threads(1)
    _state = make()


def _call(function: Callable[[Any, T], R], task: T) -> R:
    return function(_state, task)


def _itself(value: T) -> T:
    return value
