# SPDX-License-Identifier: Apache-2.0
"""Two clocks on one topic, told from time that jumps back; stamps and the clock in seconds, as messages come."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.ros.inputs.clocks import MEMORY, PATIENCE, Clocks

S = 1_000_000_000


class Stream:
    """One stream; what becomes of each message: "" used, "jump", or the reason for which it is refused."""

    def __init__(self, publishers: int = 1) -> None:
        self.now = math.inf
        self.clocks = Clocks(("rgb",), lambda: self.now, lambda _: publishers)

    def come(self, *stamps: float, arrival: float = math.inf) -> list[str]:
        found = []
        for stamp in stamps:
            self.now = arrival * S
            refusal = self.clocks.judge("rgb", round(stamp * S))
            if refusal is None:
                self.clocks.newest["rgb"] = max(self.clocks.newest["rgb"], round(stamp * S))
            found.append(refusal[0] if refusal else "jump" if self.clocks.jumped else "")
        return found


def test_one_publisher_whose_time_jumps_back_is_believed_at_once() -> None:
    assert Stream().come(100.0, 100.1, 10.0, 10.1, 10.2) == ["", "", "jump", "", ""]


def test_two_publishers_1500_ms_apart_are_no_jump() -> None:
    """Each message of the clock behind is refused with the distance; the one ahead is used. Before: 40 jumps in 6 s."""
    stream = Stream(publishers=2)
    for i in range(60):
        ahead, behind = 100 + 0.1 * i, 98.5 + 0.1 * i
        assert stream.come(ahead) == [""] and stream.come(behind) == ["two_clocks"]
    refusal = stream.clocks.judge("rgb", round(104.5 * S))
    assert refusal == (
        "two_clocks",
        "the stamp 104.500000 s is 1.400 s behind those that are used: two clocks on one topic",
    )


def test_the_first_clock_stays_where_the_time_of_arrival_tells_them_apart() -> None:
    stream = Stream(publishers=2)
    for i in range(30):
        now = 200 + 0.1 * i
        assert stream.come(now - 1.5, arrival=now) == [""]
        assert stream.come(now, arrival=now + 0.01) == ([""] if i == 0 else ["two_clocks"]) or i == 0
    assert stream.clocks.newest["rgb"] <= round(203 * S)


def test_two_clocks_of_one_publisher_cost_one_jump() -> None:
    """The graph tells of one (a relay of both): the first jump is believed, then time goes on where it was before."""
    stream = Stream()
    seen = []
    for i in range(60):
        seen += stream.come(100 + 0.1 * i, 98.5 + 0.1 * i)
    assert seen[:3] == ["", "jump", "two_clocks"] and seen.count("jump") == 1
    assert all({a, b} == {"", "two_clocks"} for a, b in zip(seen[2::2], seen[3::2], strict=True))


def test_when_the_followed_clock_falls_silent_the_other_one_counts() -> None:
    """A bag that starts again while the graph still shows its killed player."""
    stream = Stream(publishers=2)
    stream.come(100.0, 100.1)
    seen = stream.come(*(10 + 0.1 * i for i in range(20)))
    assert seen == ["two_clocks"] * PATIENCE + ["jump"] + [""] * (20 - PATIENCE - 1)


def test_a_message_in_between_keeps_the_clock() -> None:
    stream = Stream(publishers=2)
    for i in range(10):
        assert stream.come(100 + i) == [""]
        assert stream.come(*(98 + i + 0.1 * k for k in range(PATIENCE))) == ["two_clocks"] * PATIENCE
    assert stream.come(109.5) == [""]


def test_two_clocks_are_forgotten() -> None:
    stream = Stream()
    assert stream.come(100.0, 98.5, 100.1) == ["", "jump", "two_clocks"]
    stream.come(*(98.6 + 0.01 * i for i in range(MEMORY + 1)))
    assert stream.come(50.0) == ["jump"]


@pytest.mark.parametrize(
    ("stamps", "arrivals"),
    [
        ([100.0, 105.0, 105.1], [100.0, 105.0, 105.1]),  # a camera that was silent
        ([100.0, 102.0, 104.0, 106.0], [100.0, 102.0, 104.0, 106.0]),  # a slow one
        ([98.0, 98.1, 98.2, 100.2], [100.0, 100.0, 100.0, 100.2]),  # messages that were held up
    ],
)
def test_silence_and_delay_are_no_other_clock(stamps: list[float], arrivals: list[float]) -> None:
    stream = Stream(publishers=2)
    used = [stream.come(stamp, arrival=now)[0] for stamp, now in zip(stamps, arrivals, strict=True)]
    assert used.count("") >= len(stamps) - 1 and "jump" not in used


def test_a_bag_that_runs_in_a_loop_jumps_each_time() -> None:
    stream = Stream()
    seen = [stream.come(*(10 + 0.1 * i for i in range(50))) for _ in range(4)]
    assert seen[0] == [""] * 50 and all(lap == ["jump"] + [""] * 49 for lap in seen[1:])


@settings(max_examples=200, deadline=None)
@given(st.floats(1.2, 500.0), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(20, 60))
def test_two_publishers_never_clear_a_scene(
    apart: float, n_first: int, n_second: int, ahead: bool, known: bool, rounds: int
) -> None:
    """Whatever their clocks and rates, as long as neither falls silent."""
    stream = Stream(publishers=2)
    seen = []
    for i in range(rounds):
        now = 1000 + i
        for k in range(n_first):
            seen += stream.come(now + 0.1 * k, arrival=now + 0.1 * k + 600 if known else math.inf)
        for k in range(n_second):
            at = now + 0.5 + 0.1 * k
            seen += stream.come(at + (apart if ahead else -apart), arrival=at + 600 if known else math.inf)
    assert "jump" not in seen
