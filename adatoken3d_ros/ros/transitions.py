# SPDX-License-Identifier: Apache-2.0
"""Which transition a lifecycle request means, before anything is done for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lifecycle_msgs.msg import State
from lifecycle_msgs.msg import Transition as TransitionMsg

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
