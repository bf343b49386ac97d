# SPDX-License-Identifier: Apache-2.0
"""One Ray for all tests of the fleet, with two processors to hand out, whatever the machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from adatoken3d_ros.fleet.cluster import connected


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Any]:
    """The module, connected to a Ray of its own."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the extra fleet is not installed")
    with connected(cpus=2, objects=100 * 2**20) as ray:
        yield ray
