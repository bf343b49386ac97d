# SPDX-License-Identifier: Apache-2.0
"""Work spread over a Ray cluster, as `lab.spread.Spread` describes it, for calibrations, evaluations and the frontier.

Every worker computes with as many threads as this process would, because sums that are split otherwise are rounded
otherwise: the results are those of this process alone, to the bit, where processors and libraries are alike. A worker
that dies is made anew, and its task with it. Files are named by their paths, so all machines have to see them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from adatoken3d_ros.fleet.cluster import LOCAL, connected

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_AGAIN = 3  # times that a worker or a task is begun anew after a death


class Cluster(Generic[S]):
    """Workers on a cluster, with a state each.

    Args:
        make: makes a worker's state, there.
        count: workers; 0: as many as the cluster has GPUs, or, without any, `threads` processors each.
        threads: of torch in each worker.
        address: as `cluster.connected` takes it.

    Raises:
        OSError: if there is no Ray. ValueError: if the cluster has too few processors for so many workers.
    """

    def __init__(self, make: Callable[[], S], count: int = 0, *, threads: int, address: str = LOCAL) -> None:
        self._stack = ExitStack()
        if address == LOCAL and not count:
            raise ValueError("a Ray on this machine alone needs to know how many workers it is to have")
        self._ray = self._stack.enter_context(connected(address, cpus=count * threads))
        try:
            self._workers = self._started(make, count, threads)
        except BaseException:
            self.close()
            raise

    def _started(self, make: Callable[[], S], count: int, threads: int) -> list[Any]:
        there = self._ray.cluster_resources()
        cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        count = count or gpus or cpus // threads
        if not 0 < count * threads <= cpus:
            raise ValueError(
                f"{count} workers of {threads} threads each need more than the cluster's {cpus} processors"
            )
        kind = self._ray.remote(
            num_cpus=threads, num_gpus=min(1.0, gpus / count), max_restarts=_AGAIN, max_task_retries=_AGAIN
        )(_Worker)
        return [kind.remote(make, threads) for _ in range(count)]

    def map(self, function: Callable[[S, T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See `lab.spread.Spread`."""
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool

        results = ActorPool(self._workers).map(lambda worker, task: worker.call.remote(function, task), list(tasks))
        try:
            yield from results
        except RayTaskError as error:  # what the function raised, not that it was raised elsewhere
            raise (error.cause or error) from error

    def share(self, value: T) -> Callable[[], T]:
        """See `lab.spread.Spread`: it goes to each machine once."""
        return Shared(self._ray.put(value))

    def close(self) -> None:
        """See `lab.spread.Spread`."""
        self._stack.close()


@dataclass(frozen=True)
class Shared:
    """Gives a value that lies in the cluster's memory; a worker keeps the last one that it was asked for."""

    reference: Any

    def __call__(self) -> Any:
        import ray

        if self.reference not in _shared:
            _shared.clear()
            _shared[self.reference] = ray.get(self.reference)
        return _shared[self.reference]


_shared: dict[Any, Any] = {}


class _Worker:
    """A process of the cluster with its state."""

    def __init__(self, make: Callable[[], Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._state = make()

    def call(self, function: Callable[[Any, Any], Any], task: Any) -> Any:
        return function(self._state, task)
