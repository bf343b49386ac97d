# SPDX-License-Identifier: Apache-2.0
"""Options that give settings: defaults and texts are the settings', and values are checked as parameters are."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from adatoken3d_ros.cli.main import parser
from adatoken3d_ros.cli.options import OPTIONS, settings_of
from adatoken3d_ros.settings import BY_NAME, DEFAULTS

# Without it, the demo can do with a model that knows nothing; `info` loads none.
OTHERS = (
    ("convert", "--quantization"),
    ("convert", "--vision-path"),
    ("demo", "--model"),
    ("info", "--model"),
    ("info", "--vision-path"),
)
ASK = ("ask", "What?", "--model", "M")
CALIBRATE = ("calibrate", "--model", "M")


def parsed(*arguments: str) -> argparse.Namespace:
    return parser()[0].parse_args(arguments)


def options() -> dict[tuple[str, str], argparse.Action]:
    """{(command, option): action} of those that give a setting."""
    top, _ = parser()
    (commands,) = [action.choices for action in top._actions if isinstance(action.choices, dict)]
    return {
        (command, option): action
        for command, one in commands.items()
        for action in one._actions
        for option in action.option_strings
        if option in OPTIONS and (command, option) not in OTHERS
    }


def test_options_are_made_from_the_settings() -> None:
    found = options()
    assert {option for _, option in found} == OPTIONS.keys()
    assert ("calibrate", "--max-views") in found and ("train", "--device") in found
    for (_, option), action in found.items():
        setting = BY_NAME[OPTIONS[option]]
        assert action.default == setting.default and tuple(action.choices or ()) == setting.choices
        assert action.help is not None and action.help.startswith(setting.description)


@pytest.mark.parametrize("command", [ASK, CALIBRATE], ids=["ask", "calibrate"])
def test_a_command_differs_from_the_node_where_it_says_so(command: tuple[str, ...]) -> None:
    differing = {"model.path": "M", "budget.warm_up": False}
    without_model = tuple(word for word in command if word not in ("--model", "M"))
    assert settings_of(parsed(*without_model, "--bag", "B"))["model.path"] == ""  # that in the package
    assert settings_of(parsed(*command, "--bag", "B")) == DEFAULTS | differing
    assert settings_of(parsed(*command, "--folder", "F")) == DEFAULTS | {**differing, "scene.min_sharpness": 0.0}


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (["--max-views", "3", "--device", "cpu", "--dtype", "bfloat16"],
         {"scene.max_views": 3, "model.device": "cpu", "model.dtype": "bfloat16"}),
        (["--budget-ms", "250"], {"latency_budget_ms": 250.0, "budget.warm_up": True}),
        (["--strategy", "none", "--max-new-tokens", "5"], {"strategy": "none", "max_new_tokens": 5}),
        (["--input-source", "points", "--vision-path", "V", "--slop", "0.1"],
         {"input.source": "points", "model.vision_path": "V", "sync.slop": 0.1}),
        (["--base-to-camera", "0 0 1, 0 0 0 1"], {"pose.base_to_camera": (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}),
    ],
)  # fmt: skip
def test_what_is_given_is_set(given: list[str], settings: dict[str, Any]) -> None:
    base = {"model.path": "M", "budget.warm_up": False}
    assert settings_of(parsed(*ASK, "--bag", "B", *given)) == DEFAULTS | {**base, **settings}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--max-views", "0"], "--max-views: scene.max_views must be between 1 and 1000, got 0"),
        (["--budget-ms", "nan"], "--budget-ms: latency_budget_ms must be finite, got nan"),
        (["--device", "gpu"], "--device: model.device: must be auto, cpu, cuda or cuda:<n>, got 'gpu'"),
    ],
)
def test_what_cannot_be_used_names_option_setting_value_and_range(given: list[str], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings_of(parsed(*ASK, "--bag", "B", *given))
    assert str(caught.value) == reason
