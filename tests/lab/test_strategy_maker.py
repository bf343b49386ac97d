# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab.probe import Probe
from adatoken3d_ros.lab.strategy_maker import BY_NAME, Prompts, Wanted, policy_options
from adatoken3d_ros.pruning.policies.ours import Ours
from adatoken3d_ros.pruning.schedule import Schedule
from tests.lab.conftest import samples


class Judged(Probe):
    """Answers move the less, the nearer the share of what is named is to `best`."""

    def __init__(self, best: float, policy: Any = None) -> None:
        self.best, self.policy = best, policy

    def with_policy(self, policy: Any) -> Probe:
        return Judged(self.best, policy)

    def divergence(self, schedule: Schedule) -> float:
        assert schedule == BY_NAME and isinstance(self.policy, Ours) and self.policy.sink_dims == [3]
        return abs(self.policy.named - self.best)


@pytest.mark.parametrize(
    ("name", "best", "first_gate", "options"),
    [
        ("ours", 0.5, 0, {"named": 0.5}),
        ("ours", 0.0, 0, {}),
        ("ours", 0.5, 1, {}),  # nothing may be dropped before the first layer
        ("fastv", 0.5, 0, {}),
    ],
)
def test_what_is_named_counts_where_the_answers_say_so(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    best: float,
    first_gate: int,
    options: dict[str, float],
) -> None:
    monkeypatch.setattr(decoder, "first_gate", first_gate)
    scene: Any = SimpleNamespace(runtime=SimpleNamespace(model=SimpleNamespace(decoder=decoder)))
    unread: Any = None  # what was mined matters to `debias` alone
    wanted = Wanted(kind="mined", sink_dims=[3])
    found = policy_options(scene, name, wanted, Prompts(samples()), unread, Judged(best))
    assert found == {"sink_dims": [3], **options}
