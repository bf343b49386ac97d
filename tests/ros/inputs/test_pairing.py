# SPDX-License-Identifier: Apache-2.0
"""Pairs: which messages belong together, and that none is lost without being counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import MS

from adatoken3d_ros.ros.inputs.clocks import Clocks
from adatoken3d_ros.ros.inputs.pairing import Pairer
from adatoken3d_ros.ros.inputs.pictures import DEPTH, RGB


def test_equal_stamps_pair_in_either_order() -> None:
    pairer = Pairer()
    assert pairer.add(RGB, 10, "c10") is None
    pair = pairer.add(DEPTH, 10, "d10")
    assert pair is not None and (pair.rgb, pair.depth, pair.rgb_ns, pair.depth_ns) == ("c10", "d10", 10, 10)
    assert pairer.add(DEPTH, 20, "d20") is None
    assert pairer.add(RGB, 20, "c20") is not None


def test_within_the_slop_the_nearest_partner_counts() -> None:
    pairer = Pairer(slop_ns=5)
    pairer.add(DEPTH, 100, "far")
    pairer.add(DEPTH, 104, "near")
    pair = pairer.add(RGB, 103, "colour")
    assert pair is not None and pair.depth == "near"
    assert pairer.counts[DEPTH].dropped == {"unmatched": 1}
    assert pairer.add(RGB, 120, "x") is None
    assert pairer.add(DEPTH, 126, "x") is None


def test_no_stamp_is_used_twice() -> None:
    pairer = Pairer()
    pairer.add(RGB, 10, "a")
    pairer.add(RGB, 10, "b")
    pairer.add(DEPTH, 10, "a")
    pairer.add(DEPTH, 10, "b")
    assert pairer.counts[RGB].dropped == {"duplicate_stamp": 1}
    assert pairer.counts[DEPTH].dropped == {"duplicate_stamp": 1}


def test_what_is_older_than_a_pair_is_dropped() -> None:
    pairer = Pairer()
    for stamp in (10, 20, 30):
        pairer.add(RGB, stamp, "")
    pairer.add(DEPTH, 30, "")
    pairer.add(DEPTH, 20, "")
    assert pairer.counts[RGB].dropped == {"unmatched": 2}
    assert pairer.counts[DEPTH].dropped == {"out_of_order": 1}
    assert pairer.pending(RGB) == pairer.pending(DEPTH) == 0


def test_a_stream_alone_is_bounded() -> None:
    pairer = Pairer(capacity=3)
    for stamp in range(1, 11):
        pairer.add(RGB, stamp, "")
    assert pairer.pending(RGB) == 3
    assert pairer.counts[RGB].dropped == {"unmatched": 7}


def test_time_that_goes_back_begins_again() -> None:
    pairer = Pairer()
    pairer.add(RGB, 50_000 * MS, "")
    assert pairer.add(RGB, 10 * MS, "") is None
    assert pairer.counts[RGB].dropped == {"time_jump": 1}
    assert pairer.add(DEPTH, 10 * MS, "") is not None


@pytest.mark.parametrize(("first", "second"), [(RGB, DEPTH), (DEPTH, RGB)])
def test_what_was_under_way_while_the_other_stream_jumped_back(first: str, second: str) -> None:
    """It is of the old time: dropped, and the other stream's own jump is not a second one."""
    pairer = Pairer()
    for stamp in (50_000, 50_100):
        for stream in (first, second):
            pairer.add(stream, stamp * MS, "")
    assert pairer.add(first, 10 * MS, "") is None
    for stamp in (50_200, 50_300):
        assert pairer.add(second, stamp * MS, "") is None
        assert pairer.refused == (
            "time_jump",
            f"{second}: the stamp {stamp / 1e3:.6f} s is of before {first} has jumped back",
        )
    assert pairer.add(second, 10 * MS, "") is not None
    assert pairer.jumps == 1 and not pairer.counts[first].dropped
    assert pairer.counts[second].dropped == {"time_jump": 2}
    # Both go on, past the stamps of before.
    for stamp in (20_000, 50_400, 60_000):
        pairer.add(first, stamp * MS, "")
        assert pairer.add(second, stamp * MS, "") is not None


def test_a_stream_whose_clock_is_off_jumps_back_with_the_other() -> None:
    """Three seconds apart nothing pairs, but the later stream's new time is not taken for the old one."""
    pairer = Pairer()
    for stamp in (50_000, 10_000, 11_000):
        pairer.add(RGB, stamp * MS, "")
        pairer.add(DEPTH, (stamp + 3000) * MS, "")
    assert pairer.counts[DEPTH].dropped == {"time_jump": 1} and pairer.pending(DEPTH) == 2


def test_without_a_stamp_nothing_pairs() -> None:
    pairer = Pairer()
    assert pairer.add(RGB, 0, "") is None
    assert pairer.add(DEPTH, 0, "") is None
    assert pairer.counts[RGB].dropped == {"no_stamp": 1}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([RGB, DEPTH]), st.integers(0, 40) | st.integers(0, 4000)), max_size=60),
    st.integers(0, 5),
    st.integers(1, 6),
)
def test_every_message_is_accounted_for(events: list[tuple[str, int]], slop: int, capacity: int) -> None:
    pairer = Pairer(slop * MS, capacity)
    pairs = [pair for stream, ms in events if (pair := pairer.add(stream, ms * MS, "")) is not None]
    for stream, counts in pairer.counts.items():
        assert counts.received == sum(name == stream for name, _ in events)
        assert counts.received == counts.paired + sum(counts.dropped.values()) + pairer.pending(stream)
        assert counts.paired == len(pairs)
    assert all(abs(pair.rgb_ns - pair.depth_ns) <= slop * MS for pair in pairs)
    if not pairer.jumps:
        for stamps in ([pair.rgb_ns for pair in pairs], [pair.depth_ns for pair in pairs]):
            assert stamps == sorted(set(stamps))
    pairer.stop()
    assert pairer.pending(RGB) == pairer.pending(DEPTH) == 0


def stamps_used(pairer: Pairer, clock: list[float], arrivals: list[tuple[float, float]]) -> list[float]:
    """Of (clock, stamp) in seconds: the stamps that became pairs of a stream alone."""
    used = []
    for now, stamp in arrivals:
        clock[0] = now * 1e9
        pair = pairer.add(pairer.streams[0], round(stamp * 1e9), "")
        used += [pair.rgb_ns / 1e9] if pair is not None else []
    return used


@pytest.mark.parametrize(
    ("arrivals", "lost"),
    [
        ([(100.0, 100.0), (100.1, 105.1), (100.2, 100.2), (100.3, 100.3)], [105.1]),
        # A clock that is off from the start, at any rate; delays; a node's clock that is set back.
        ([(100.0, 105.0), (100.1, 105.1), (100.2, 105.2)], []),
        ([(100.0, 105.0), (102.0, 107.0), (104.0, 109.0)], []),
        ([(100.0, 100.0), (103.0, 100.1), (103.0, 103.0)], []),
        ([(100.0, 100.0), (97.1, 100.1), (97.2, 100.2), (99.2, 102.2)], []),
        # A sensor's clock that is set: its second stamp is believed, then all.
        ([(100.0, 100.0), (100.1, 105.1), (100.2, 105.2), (102.2, 107.2)], [105.1]),
        # Nothing to compare with: a bag of the past, and simulated time that has not begun.
        ([(100.0, 10.0), (100.1, 15.0), (100.2, 15.1)], []),
        ([(np.inf, 10.0), (np.inf, 15.0), (15.1, 15.1), (15.2, 15.2)], []),
    ],
)
def test_one_stamp_that_leaps_ahead_is_not_believed(arrivals: list[tuple[float, float]], lost: list[float]) -> None:
    clock = [0.0]
    pairer = Pairer(streams=("points",), clocks=Clocks(("points",), lambda: clock[0]))
    used = stamps_used(pairer, clock, arrivals)
    assert used == [stamp for _, stamp in arrivals if stamp not in lost] and pairer.jumps == 0
    assert pairer.counts["points"].dropped["future_stamp"] == len(lost)
