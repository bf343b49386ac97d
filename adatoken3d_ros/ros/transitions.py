# SPDX-License-Identifier: Apache-2.0
"""Lifecycle requests: which transition is meant, and one whose slow part does not hold up the executor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from lifecycle_msgs.msg import State
from lifecycle_msgs.msg import Transition as TransitionMsg

from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.spinning import Failures
from adatoken3d_ros.text import quoted

CONFIGURING = State.TRANSITION_STATE_CONFIGURING
CLEANING_UP = State.TRANSITION_STATE_CLEANINGUP
SHUTTING_DOWN = State.TRANSITION_STATE_SHUTTINGDOWN


class Available(NamedTuple):
    """A transition that the state machine would make now, as rclpy lists it: where it leads is `goal`, a State's id."""

    id: int
    label: str
    start: int
    start_label: str
    goal: int
    goal_label: str


def requested(transition: TransitionMsg, available: Iterable[tuple[int, str, int, str, int, str]]) -> Available:
    """The available transition that a request means: that of its label if it has one (as in rcl), else of its id.

    Raises:
        ValueError: if that is none now; names what was asked for and what there is.
    """
    choices = [Available(*one) for one in available]
    for one in choices:
        if one.label == transition.label if transition.label else one.id == transition.id:
            return one
    wanted = quoted(transition.label) if transition.label else f"with id {transition.id}"
    there = ", ".join(f"{one.label} ({one.id})" for one in choices) or "none"
    raise ValueError(f"there is no transition {wanted} from this state; there are: {there}")


class Transitions:
    """Stands before a lifecycle node's service `~/change_state`; what the state machine would refuse has no effect.

    Args:
        make: the service's own callback, which makes the transition at once.
        machine: the node's state machine, as rclpy has it.
        slow: awaited, with the transition's goal (a State's id), before the transition is made.
        failures: told what `slow` or the transition raises; it then counts as refused.
    """

    def __init__(
        self, make: Callable[[Any, Any], Any], machine: Any, slow: Callable[[int], Awaitable[None]], failures: Failures
    ) -> None:
        self._make = make
        self._machine = machine
        self._slow = slow
        self._failures = failures
        self._changing = False

    async def on_request(self, request: Any, response: Any) -> Any:
        """The service's callback."""
        response.success = False
        if self._changing:
            self._failures.log.error(
                "another lifecycle transition is still under way", throttle_duration_sec=WARN_SECONDS
            )
            return response
        try:
            goal = requested(request.transition, self._machine.available_transitions).goal
        except ValueError as error:
            text = f"the node is {self._machine.current_state[1]}: {error}"
            self._failures.log.error(text, throttle_duration_sec=WARN_SECONDS)
            return response
        try:
            await self.alone(self._slow(goal))
            return self._make(request, response)
        except Exception as error:
            self._failures.note(error)
            return response

    async def alone(self, work: Awaitable[None]) -> None:
        """Awaits something during which no transition may begin."""
        self._changing = True
        try:
            await work
        finally:
            self._changing = False
