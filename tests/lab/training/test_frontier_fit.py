# SPDX-License-Identifier: Apache-2.0
"""Which of the fitted strategies are written, and which lie in a model's folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from benchmarks import _frontier_fit
from benchmarks._frontier_fit import choose_ours, shipped
from benchmarks._scenes import Reader

TARGETS = (0.37, 0.2)


def made(target: float, kl: float, named: float) -> Strategy:
    info = {"target": target, "figures": {"kl": kl}}
    return Strategy("ours", "ours", Schedule.of([0], [target]), options={"named": named}, info=info)


def chosen(monkeypatch: pytest.MonkeyPatch, kls: dict[float, list[float]], first_named: float = 0.25) -> list[Any]:
    """(target, share for names) of what is written where the strategies cost `kls`: with names, and without."""

    def fit(workers: Any, reader: Any, rooms: Any, named: Any = (0.0, first_named)) -> Any:
        return SimpleNamespace(options={"named": max(named)})

    def choose(workers: Any, rooms: Any, fitted: Any, work: Any, n_layers: int, targets: Any, names: Any) -> Any:
        named = fitted.options["named"]
        return [made(target, kls[target][0 if named else 1], named) for target in targets if target in kls]

    monkeypatch.setattr(_frontier_fit, "fit", fit)
    monkeypatch.setattr(_frontier_fit, "choose", choose)
    nobody: Any = None
    found = choose_ours(nobody, cast(Reader, SimpleNamespace(n_layers=12)), (), nobody, TARGETS, 0.37)
    return [(strategy.info["target"], strategy.options["named"]) for strategy in found]


@pytest.mark.parametrize(("without", "share"), [(0.0065, 0.0), (0.0084, 0.0), (0.0086, 0.25), (0.001, 0.0)])
def test_the_usual_strategy_names_only_what_is_worth_shared_layers(
    monkeypatch: pytest.MonkeyPatch, without: float, share: float
) -> None:
    """0.005 nats have to be saved; at other targets nothing is shared, and the least divergence counts."""
    assert chosen(monkeypatch, {0.37: [0.0035, without], 0.2: [0.012, 0.013]}) == [(0.37, share), (0.2, 0.25)]


def test_a_target_that_is_not_reached_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {0.2: [0.012, 0.013]}) == [(0.2, 0.25)]


def test_where_nothing_is_named_one_fit_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {0.37: [9.9, 0.1], 0.2: [9.9, 0.2]}, first_named=0.0) == [(0.37, 0.0), (0.2, 0.0)]


def test_what_lies_in_the_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "strategies").mkdir()
    for name, target, of in (("ours", 0.37, "a"), ("ours-0.2", 0.2, "b"), ("ours-0.5", 0.5, "a")):
        one = made(target, 0.1, 0.0)
        Strategy(name, "ours", one.schedule, options=one.options, info=one.info, model_hash=of, model_id="m").save(
            tmp_path / "strategies" / f"{name}.yaml"
        )
    reader = cast(Reader, SimpleNamespace(path=tmp_path, model=SimpleNamespace(identity="a")))
    (found,) = shipped(reader, TARGETS)  # not that of another model, nor that of another target
    assert found.schedule == Schedule.of([0], [0.37]) and found.options == {"named": 0.0}
    assert found.info == {"target": 0.37, "contestant": "ours_shipped", "setting": "as it comes with the model"}
