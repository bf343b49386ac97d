# SPDX-License-Identifier: Apache-2.0
"""A prefill of eight layers with 100 spatial tokens and 20 others, by hand: 12 ms a layer, 10 ms a decode step."""

from __future__ import annotations

import pytest

from adatoken3d_ros.engine.budget.hurry import Hurry
from adatoken3d_ros.engine.budget.latency import LatencyModel

COEFFICIENTS = {"encode": [0.1], "tokens": [0.0] * 3, "prefill": [0.0, 1e-4, 0.0, 0.0, 0.0], "decode": [0.01, 0.0]}


class Run:
    """Asks before each layer, which then takes as long as is said, milliseconds."""

    def __init__(
        self, until_ms: float, counts: tuple[int, ...] = (100,) * 8, *, guard: float = 1.0, **options: bool
    ) -> None:
        self.now = 0.0
        self.seen = list(counts)
        latency = LatencyModel(COEFFICIENTS)
        for ratio in latency.ratios.values():
            ratio.guard = 1.0
        latency.ratios["prefill"].guard = guard
        self.hurry = Hurry(latency, lambda: self.now, until_ms / 1e3, counts, 100, 20, steps=3, **options)

    def layers(self, *took: float) -> list[int | None]:
        """What was said before each layer and before the one after them."""
        said = []
        for g, ms in enumerate((*took, 0.0)):
            if g == len(self.seen):
                break
            said.append(self.hurry(g, self.seen[g]))
            if said[-1] is not None:
                self.seen[g:] = [min(said[-1], n) for n in self.seen[g:]]
            self.now += ms / 1e3
        return said


def test_one_that_is_in_time_is_left_alone() -> None:
    # At layer 1: 12 ms were spent, 7 layers of 12 ms with a margin of a tenth are 92.4 ms, three more tokens 30 ms.
    run = Run(135.0)
    assert run.layers(*[12.0] * 8) == [None] * 8
    assert run.hurry.drops == [] and run.hurry.slower == pytest.approx(1.0) and run.hurry.removed_share == 0.0


def test_a_slow_layer_leads_to_the_mildest_drop_that_is_in_time() -> None:
    # At layer 2, after 52 ms: the layers took 1 and 3.33 times as long as predicted, the latter counts as 3, and with
    # the imagined one the pace is 5/3. Six layers take 72 ms * 1.1 * 5/3 = 132 ms, with 50 tokens 77 ms, with 25 of
    # them 49.5 ms; 30 ms for three more tokens.
    run = Run(150.0)
    assert run.layers(12.0, 40.0, 4.5, 4.5, 4.5) == [None, None, 25, None, None, None]
    assert run.hurry.drops == [(2, 100, 25)]
    assert run.hurry.removed_share == pytest.approx(6 * 75 / 800)
    assert Run(160.0).layers(12.0, 40.0) == [None, None, 50]
    assert Run(215.0).layers(12.0, 40.0) == [None, None, None]


def test_one_that_cannot_be_in_time_withdraws_the_scene() -> None:
    run = Run(60.0)
    assert run.layers(12.0, 40.0, 2.0, 2.0) == [None, 0, None, None, None]
    # Then there is nothing left that could be dropped.
    assert run.hurry.drops == [(1, 100, 0)]


def test_it_may_have_to_drop_more_than_once() -> None:
    run = Run(150.0)
    assert run.layers(12.0, 40.0, 40.0) == [None, None, 25, 0]


def test_a_stall_is_not_a_pace() -> None:
    run = Run(1e6)
    run.layers(12.0, 12.0, 12.0, 1200.0)
    assert run.hurry.slower == pytest.approx((4 + 3) / 5)
    steady = Run(1e6)
    steady.layers(*[36.0] * 7)
    assert steady.hurry.slower == pytest.approx((1 + 7 * 3) / 8)


def test_a_policy_that_cannot_choose_withdraws() -> None:
    assert Run(150.0, may_choose=False).layers(12.0, 40.0) == [None, None, 0]


def test_gates_of_the_plan_are_known() -> None:
    # Layers 4 to 7 are planned without the scene: at layer 1 three layers of 12 ms and four of 2 ms are left.
    planned = (100,) * 4 + (0,) * 4
    in_time = 12.0 + 1.1 * (3 * 12.0 + 4 * 2.0) + 30.0
    assert Run(in_time + 0.1, planned).layers(12.0) == [None, None]
    assert Run(in_time - 0.1, planned).layers(12.0) == [None, 50]
    assert Run(1.0, planned).layers(12.0, 2.0, 2.0, 2.0, 2.0, 2.0)[-1] is None


def test_what_may_turn_out_late_waits_as_long_as_it_can_be_mended() -> None:
    # Layers may take three times as long. At layer 1, after 12 ms, all that are left may take 252 ms; but if that is
    # seen, 36 ms later, six layers without the scene take 36 ms.
    fallback = 12.0 + 3 * (12.0 + 6 * 2.0) + 30.0
    likely = 12.0 + 1.1 * 7 * 12.0 + 30.0
    assert fallback < likely
    assert Run(likely + 0.1, guard=3.0).layers(*[12.0] * 4) == [None] * 5
    # Eight times as long could not be mended any more, with half of the tokens it could.
    needed = 12.0 + 8 * (12.0 + 6 * 2.0) + 30.0
    assert Run(needed + 0.1, guard=8.0).layers(12.0) == [None, None]
    assert Run(needed - 0.1, guard=8.0).layers(12.0) == [None, 50]
