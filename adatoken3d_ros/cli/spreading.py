# SPDX-License-Identifier: Apache-2.0
"""`--ray`: the scenes of a command spread over a Ray cluster, with the results of this machine alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from adatoken3d_ros.fleet.spread import Cluster

S = TypeVar("S")
LOCAL = "local"


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Adds --ray and --ray-workers."""
    parser.add_argument(
        "--ray", nargs="?", const=LOCAL, metavar="ADDRESS",
        help="spread scenes over the Ray at this address, or over processes of this machine: same results",
    )  # fmt: skip
    parser.add_argument(
        "--ray-workers", type=int, default=0, metavar="N",
        help="with --ray: workers with a model each (one a GPU, else as processors allow; 2 on this machine)",
    )  # fmt: skip


def absolute(args: argparse.Namespace) -> argparse.Namespace:
    """The options with paths that mean the same in another folder."""

    def whole(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [whole(name, one) for one in value]
        if name in ("model", "vision_path") and value:
            return str(Path(value).resolve())
        return value.resolve() if isinstance(value, Path) else value

    return argparse.Namespace(**{name: whole(name, value) for name, value in vars(args).items()})


@contextmanager
def spread_over(args: argparse.Namespace, make: Callable[[], S]) -> Iterator[Cluster[S] | None]:
    """Workers whose state `make` makes, where --ray says so; else None.

    Raises:
        ValueError, OSError: as `fleet.spread.Cluster`, and for --ray-workers below 0 or without --ray.
    """
    if args.ray_workers < 0 or (args.ray_workers and args.ray is None):
        why = "must not be negative" if args.ray is not None else "is for --ray"
        raise ValueError(f"--ray-workers {args.ray_workers} {why}")
    if args.ray is None:
        yield None
        return
    import torch

    from adatoken3d_ros.fleet.spread import Cluster

    count: Any = args.ray_workers or (2 if args.ray == LOCAL else 0)
    with closing(Cluster(make, count, threads=torch.get_num_threads(), address=args.ray)) as cluster:
        yield cluster
