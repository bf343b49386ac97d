# SPDX-License-Identifier: Apache-2.0
"""The settings as parameters of the node: declared, described, range-checked, and refused when it is too late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from adatoken3d_ros.settings import ACTIVATE, ANY_TIME, BY_NAME, CONFIGURE, SETTINGS, START, Setting, Settings
from adatoken3d_ros.text import shown

_CHANGEABLE = {
    CONFIGURE: ("unconfigured", "clean the node up first"),
    ACTIVATE: ("unconfigured", "inactive", "deactivate the node first"),
}


def descriptor(setting: Setting) -> ParameterDescriptor:
    """What `ros2 param describe` shows."""
    parts = [setting.description]
    if setting.choices:
        parts.append(f"One of: {', '.join(setting.choices)}.")
    parts.append(f"Read by: {setting.read}." if setting.read != ANY_TIME else "May be changed at any time.")
    made = ParameterDescriptor(name=setting.name, description=" ".join(parts), read_only=setting.read == START)
    if setting.low is not None and setting.high is not None:
        if isinstance(setting.default, int):
            made.integer_range = [IntegerRange(from_value=int(setting.low), to_value=int(setting.high))]
        else:
            made.floating_point_range = [
                FloatingPointRange(from_value=float(setting.low), to_value=float(setting.high))
            ]
    return made


def at_start(error: ParameterException) -> str:
    """What to say, in one line, of a parameter that cannot be used at the start."""
    text = str(error)
    hint = ": a number with a decimal point is wanted" if "INTEGER" in text and "DOUBLE" in text else ""
    return text + hint


class Parameters:
    """Declares the settings on a node, refuses what cannot be used, and reads values.

    Args:
        node: the node that carries the parameters.
        state: returns the node's lifecycle state, such as 'unconfigured'.
        checks: {name: check} for what only the running node can tell; a check raises ValueError or OSError.

    Raises:
        rclpy.exceptions.InvalidParameterValueException, InvalidParameterTypeException: for a bad value given at start.
    """

    def __init__(self, node: Node, state: Callable[[], str], checks: Mapping[str, Callable[[Any], object]]) -> None:
        self._node = node
        self._checks = checks
        self._state = state
        self._declared = False
        node.add_on_set_parameters_callback(self._check)
        node.declare_parameters("", [(one.name, one.default, descriptor(one)) for one in SETTINGS])
        self._declared = True

    def __getitem__(self, name: str) -> Any:
        return self._node.get_parameter(name).value

    def settings(self) -> Settings:
        """All values as they are now."""
        return Settings({name: self[name] for name in BY_NAME})

    def _check(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            setting = BY_NAME.get(parameter.name)
            reason = "" if setting is None else self._problem(setting, parameter.value)
            if reason:
                return SetParametersResult(successful=False, reason=shown(reason))
        return SetParametersResult(successful=True)

    def _problem(self, setting: Setting, value: Any) -> str:
        reason = setting.problem(value) or self._too_late(setting)
        if not reason and setting.name in self._checks:
            try:
                self._checks[setting.name](value)
            except (ValueError, OSError) as error:
                return f"{setting.name}: {error}"
        return reason

    def _too_late(self, setting: Setting) -> str:
        if not self._declared or setting.read not in _CHANGEABLE:
            return ""
        *allowed, advice = _CHANGEABLE[setting.read]
        state = self._state()
        return "" if state in allowed else f"{setting.name} is read by {setting.read} and the node is {state}: {advice}"
