# SPDX-License-Identifier: Apache-2.0
"""The queue of the simulation against what is known of queues, and times of a machine against operations by hand."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.engine.budget.latency import decode_terms, read_terms
from adatoken3d_ros.pruning.flops import prefill_flops
from benchmarks.fleet_capacity import carried, computed_model, queue
from benchmarks.machines import MULTIPLYING, READING, Machine
from tests.lab.conftest import decoder as decoder


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_waits_are_those_of_an_m_d_1_queue(load: float) -> None:
    """Poisson arrivals, a service of 1 s, no deadlines: the mean wait is load / (2 (1 - load)) (Pollaczek-Khinchine),
    the server is busy for the load, and a share of 1 - load does not wait."""
    n = 100_000
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / load, n))
    found = queue(arrivals, np.ones(n), np.full(n, np.inf))
    waits = found.took - 1.0
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.05)
    assert found.busy == pytest.approx(load, rel=0.02)
    assert (waits < 1e-9).mean() == pytest.approx(1 - load, abs=0.01)


def test_the_earliest_deadline_comes_first_and_what_is_too_late_not_at_all() -> None:
    """At 0 the first begins and ends at 2. Then the third, due at 4, before the second, due at 9; the fourth, due at
    4.5, could end at 5 and is refused."""
    arrivals, services = np.array([0.0, 0.5, 1.0, 1.5]), np.array([2.0, 1.0, 1.5, 1.5])
    found = queue(arrivals, services, np.array([3.0, 8.5, 3.0, 3.0]))
    assert found.took.tolist() == [2.0, 4.0, 2.5, np.inf]
    assert found.busy == 1.0


def test_how_many_robots_are_carried_grows_with_the_budget() -> None:
    """A service of 0.1 s and a question a second a robot: never ten robots, and nobody where a service is too long."""

    def make(rng: np.random.Generator, count: int) -> np.ndarray:
        return np.full(count, 0.1)

    found = [carried(make, 1.0, budget, np.random.default_rng(0)) for budget in (0.11, 0.3, 3.0)]
    robots = [count for count, _ in found]
    assert robots[0] == 0 < robots[1] < robots[2] <= 10
    assert found[2][1] == pytest.approx(robots[2] / 10, rel=0.03)


def test_a_machine_as_its_peaks(decoder: Decoder) -> None:
    """A prefill: the operations over the peak, and the layers' weights once; a step: the weights, and a row's keys."""
    size, machine = decoder.size, Machine("m", 1, 100.0, 10.0)
    model = computed_model(machine, decoder)
    weights = 2 * sum(part.weight.numel() for part in decoder.linears())
    head = 2 * size.hidden * size.vocabulary
    reading = READING * 100e9
    whole = prefill_flops(size, [40] * size.n_layers, 10) - head
    terms = read_terms(np.full(size.n_layers, 40.0), 40, 10)
    expected = whole / (MULTIPLYING * 10e12) + weights / reading
    assert model.p50("prefill", terms) == pytest.approx(expected)
    step = (weights + head + 50 * size.n_layers * 4 * size.keys) / reading
    assert model.p50("decode", decode_terms(1, 50 * size.n_layers, size.n_layers)) == pytest.approx(step)
