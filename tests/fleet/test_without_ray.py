# SPDX-License-Identifier: Apache-2.0
"""Without the extra `fleet`: a robot asks a shared engine, commands are there, and the service says what to install."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.architectures import NAMES
from tests.fleet.shared import free_port, plain

_PROGRAM = """
import importlib, json, pkgutil, sys
BROUGHT = ("ray", "starlette", "uvicorn", "fastapi")
sys.modules.update(dict.fromkeys(BROUGHT))  # who imports one now gets an ImportError
import adatoken3d_ros.cli, adatoken3d_ros.fleet
for package in (adatoken3d_ros.fleet, adatoken3d_ros.cli):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.loading import open_scene
from adatoken3d_ros.fleet.loading import load_engine
from adatoken3d_ros.settings import Settings
settings = Settings(json.loads(sys.argv[1]))
engine = load_engine(settings)
answer = engine.ask(open_scene(engine, settings), Question("What is there?", latency_budget_ms=500.0))
assert answer.status.name == "NO_SCENE", answer
sys.exit(any(sys.modules[name] for name in BROUGHT))
"""


def test_a_robot_imports_nothing_of_ray(tiny_of: Callable[[str], Path]) -> None:
    settings: dict[str, Any] = dict(plain(tiny_of(NAMES[0]), **{"engine.url": f"http://127.0.0.1:{free_port()}"}))
    done = subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
