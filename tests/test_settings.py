# SPDX-License-Identifier: Apache-2.0
"""The table of settings, and everything that is made from it: values, classes, parameter files, the README."""

from __future__ import annotations

import importlib.util
import math
import pickle
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.ros.wiring import read_parameters
from adatoken3d_ros.settings import (
    ACTIVATE,
    ANY_TIME,
    BY_NAME,
    CONFIGURE,
    DEFAULTS,
    OF_CHOSEN_FRAMES,
    SETTINGS,
    START,
    Setting,
    Settings,
)

ROOT = Path(__file__).resolve().parents[1]
OTHER_NODES = {"demo_camera.yaml", "nav2.yaml"}
FILES = [path for path in sorted((ROOT / "config").rglob("*.yaml")) if path.name not in OTHER_NODES]


def test_every_setting_is_whole() -> None:
    assert len(BY_NAME) == len(SETTINGS) == len(DEFAULTS)
    for setting in SETTINGS:
        assert setting.plain(setting.default) == setting.default, setting.name
        assert type(setting.plain(setting.default)) is type(setting.default), setting.name
        assert len(setting.description) > 10 and setting.description.endswith("."), setting.name
        assert setting.read in (START, CONFIGURE, ACTIVATE, ANY_TIME), setting.name
        assert (setting.low is None) == (setting.high is None) == (type(setting.default) not in (int, float))


def bad_values(setting: Setting) -> list[Any]:
    """What cannot be used, of the right type and of others."""
    kind = type(setting.default)
    wrong: list[Any] = [{bool: "true", int: True, float: "1", str: 3, tuple: "0 0 0"}[kind], None, [None]]
    if setting.low is not None and setting.high is not None:
        wrong += [setting.low - 1, setting.high + max(1, abs(setting.high) / 2)]
        wrong += [math.nan, math.inf] if kind is float else [1.5]
    if setting.choices:
        wrong += ["nonsense", ""]
    if kind is tuple:
        wrong += [[1.0], [math.nan] * len(setting.default), [True] * len(setting.default)]
    return wrong


@pytest.mark.parametrize("name", BY_NAME)
def test_what_cannot_be_used_is_refused_by_name(name: str) -> None:
    for value in bad_values(BY_NAME[name]):
        with pytest.raises(ValueError) as caught:
            Settings({name: value})
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("scene.max_views", 0, "scene.max_views must be between 1 and 1000, got 0"),
        ("scene.max_views", 2.0, "scene.max_views must be an integer, got 2.0"),
        ("scene.near", math.nan, "scene.near must be finite, got nan"),
        ("question_policy", "maybe", "question_policy must be one of queue, replace, reject, got 'maybe'"),
        ("strategy", " ", "strategy: must not be empty"),
        ("model.device", "cuda:x", "model.device: must be auto, cpu, cuda or cuda:<n>, got 'cuda:x'"),
        ("scene.file", "https://example.org/x", "scene.file: must be an absolute path on this machine"),
        ("scene.origin", [0.0] * 4, "scene.origin: x y z are three numbers, got [0.0, 0.0, 0.0, 0.0]"),
        ("pose.static", [0.0] * 5, "pose.static: a pose is x y z roll pitch yaw or x y z qx qy qz qw"),
        ("pose.static", [0.0] * 7, "pose.static: quaternion (0.0, 0.0, 0.0, 0.0) has length 0, not 1"),
        ("scene.views", 3, "there is no setting 'scene.views'"),
    ],
)
def test_reasons(name: str, value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        Settings({name: value})
    assert str(caught.value).startswith(reason)


def test_values_are_plain_and_can_be_sent() -> None:
    given = {"scene.near": 3, "scene.origin": array("d", [1, 2, 3]), "pose.static": [0, 0, 1, 0, 0, 0, 1]}
    settings = Settings(given)
    assert (settings["scene.near"], settings["scene.origin"]) == (3.0, (1.0, 2.0, 3.0))
    assert {type(value) for value in settings.values()} == {bool, int, float, str, tuple}
    assert pickle.loads(pickle.dumps(settings)) == settings != DEFAULTS
    changed = settings | {"seed": 4}
    assert (changed["seed"], changed["scene.near"], settings["seed"]) == (4, 3.0, 0)
    assert repr(Settings({"seed": 4})) == "Settings({'seed': 4})"


def test_the_table_imports_nothing_heavy() -> None:
    code = "import sys, adatoken3d_ros.settings; print({'rclpy', 'torch', 'scipy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_engine_s_defaults_are_the_settings() -> None:
    from adatoken3d_ros.engine.config import SessionConfig, session_config
    from adatoken3d_ros.scene.patches import PatchConfig

    made = session_config(OF_CHOSEN_FRAMES)
    assert made == SessionConfig()
    assert PatchConfig().max_depth == DEFAULTS["scene.max_depth"]
    differing = {name for name in DEFAULTS if DEFAULTS[name] != OF_CHOSEN_FRAMES[name]}
    assert differing == {"scene.min_gain", "scene.min_sharpness", "scene.max_disagreement", "scene.origin_mode"}


def test_choices_are_what_there_is() -> None:
    from adatoken3d_ros.engine.budget.controller import Infeasible, Reuse
    from adatoken3d_ros.engine.tickets import QuestionPolicy
    from adatoken3d_ros.ros.inputs.pictures import STREAMS
    from adatoken3d_ros.scene.window import OriginMode

    for name, found in (
        ("budget.infeasible", Infeasible),
        ("budget.reuse", Reuse),
        ("question_policy", QuestionPolicy),
        ("scene.origin_mode", OriginMode),
    ):
        assert {member.value for member in found} == set(BY_NAME[name].choices)  # type: ignore[attr-defined]
    assert set(BY_NAME["input.source"].choices) == set(STREAMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_parameter_files_hold_settings_with_good_values(path: Path) -> None:
    given = read_parameters(path, "adatoken3d")
    assert given
    Settings(given)
    for name, value in given.items():  # ROS takes no integer for a number with a decimal point
        assert type(value) is type(BY_NAME[name].default), f"{name} is a {type(value).__name__}"
    if path.name == "adatoken3d.yaml":
        assert given == {name: DEFAULTS[name] for name in given}


def test_nav2_s_manager_waits_for_no_bond() -> None:
    content = read_parameters(ROOT / "config" / "nav2.yaml", "lifecycle_manager")
    assert content == {"node_names": ["adatoken3d"], "autostart": True, "bond_timeout": 0.0}


def test_the_readme_s_table_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "scripts" / "readme_table.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    readme = script.README.read_text(encoding="utf-8")
    assert script.renewed(readme) == readme, "run: python scripts/readme_table.py"
    assert script.renewed(readme.replace("| `seed` | `0` |", "| `seed` | `1` |")) == readme
    with pytest.raises(ValueError, match="parameters: begin"):
        script.renewed("nothing")
