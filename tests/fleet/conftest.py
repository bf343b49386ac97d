# SPDX-License-Identifier: Apache-2.0
"""One Ray for all tests of the fleet, with two processors to hand out, and engines behind HTTP that need none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adatoken3d_ros.fleet.cluster import connected
from adatoken3d_ros.fleet.door import guard
from tests.fleet.shared import TOKEN, listening, plain


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Any]:
    """The module, connected to a Ray of its own."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the extra fleet is not installed")
    with connected(cpus=2, objects=100 * 2**20) as ray:
        yield ray


@pytest.fixture(scope="session")
def replica_of(tiny_of: Any) -> Iterator[Callable[[str], Any]]:
    """A replica of an architecture's tiny checkpoint, one for the session."""
    pytest.importorskip("uvicorn", reason="without the extra fleet")
    from adatoken3d_ros.fleet.replica import Replica, ReplicaConfig

    made: dict[str, Any] = {}

    def replica(name: str) -> Any:
        if name not in made:
            made[name] = Replica(ReplicaConfig(dict(plain(tiny_of(name), **{"scene.max_views": 20})), max_scenes=3))
        return made[name]

    yield replica
    for one in made.values():
        one.stop()


@pytest.fixture(scope="session")
def url_of(replica_of: Callable[[str], Any]) -> Iterator[Callable[[str], str]]:
    """Where such a replica listens, behind a door that asks for TOKEN."""
    from contextlib import ExitStack

    from adatoken3d_ros.fleet.door import DoorConfig

    with ExitStack() as stack:
        urls: dict[str, str] = {}

        def url(name: str) -> str:
            if name not in urls:
                app = guard(replica_of(name), DoorConfig(token=TOKEN, scenes=1000, rate=1e4, burst=10000))
                urls[name] = f"http://127.0.0.1:{stack.enter_context(listening(app))}"
            return urls[name]

        yield url
