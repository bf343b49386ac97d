# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from adatoken3d_ros.engine.scene import Scene
from tests.engine.budget.world import World


@pytest.fixture
def make_world(make_session: Callable[..., Scene], monkeypatch: Any) -> Callable[..., World]:
    return lambda **budget: World(make_session, monkeypatch, **budget)
