# SPDX-License-Identifier: Apache-2.0
"""Calibration with its scenes, and then its schedules, spread over workers that have the model each.

A scene is built, mined and answered without pruning where a worker is free; the prompts come back. A schedule is judged
on all prompts by one worker, so that its divergence is added up as it would be in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.information import InformationSet
from adatoken3d_ros.lab.probe import Probe, Reference
from adatoken3d_ros.lab.spread import Spread
from adatoken3d_ros.lab.strategy_maker import Prompts, Report, Wanted, collect, make_probe, mine_all
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import Policy
from adatoken3d_ros.scene.frames import PosedFrame


@dataclass
class Bench:
    """A worker's place: a scene of its engine, what to build and to ask, and the probe that it was last asked for."""

    scene: Scene
    sources: Sequence[tuple[str, Path, Iterable[PosedFrame]]]
    questions: Sequence[str] | Callable[[Scene, int], Sequence[str]]
    wanted: Wanted
    probe: tuple[Any, Probe] | None = None


def build_and_mine(bench: Bench, index: int) -> tuple[Prompts, InformationSet, list[Reference]]:
    """Of one of the sources its prompts, what is mined of them, and the unpruned answers."""
    prompts = collect(bench.scene, [bench.sources[index]], bench.questions, _silent, first=index)
    information = mine_all(bench.scene, prompts, _silent)
    return prompts, information, make_probe(bench.scene, bench.wanted, prompts, _silent).references


def judge(bench: Bench, task: tuple[Callable[[], Any], Policy, Schedule]) -> float:
    """How far a schedule moves the answers to the prompts that were shared."""
    shared, policy, schedule = task
    if bench.probe is None or bench.probe[0] != shared:
        prompts, references = shared()
        bench.probe = shared, make_probe(bench.scene, bench.wanted, prompts, _silent, references)
    return bench.probe[1].with_policy(policy).divergence(schedule)


class SpreadProbe(Probe):
    """A probe that has several schedules judged at once."""

    spread: Spread[Bench]
    shared: Callable[[], Any]

    def divergences(self, schedules: Sequence[Schedule]) -> Iterator[float]:
        """See Probe."""
        yield from self.spread.map(judge, [(self.shared, self._policy, schedule) for schedule in schedules])


def spread_calibration(
    spread: Spread[Bench], scene: Scene, n_sources: int, wanted: Wanted, report: Report
) -> tuple[Prompts, InformationSet, Probe]:
    """Prompts of all sources in their order, what was mined, and the probe; as `collect`, `mine_all` and `make_probe`.

    `scene`: of an engine of this process, with the same model, which judges single schedules.

    Raises:
        ValueError: for a scene without valid depth; names its path.
    """
    prompts, references = Prompts(), list[Reference]()
    mined: list[InformationSet] = []
    report("scenes", 0, n_sources)
    for own, information, answers in spread.map(build_and_mine, range(n_sources)):
        prompts.extend(own)
        mined.append(information)
        references += answers
        report("scenes", len(mined), n_sources)
    whole = InformationSet(
        tuple(one for some in mined for one in some.prompts),
        tuple(prompts.scenes),
        tuple(prompts.questions),
        scene.runtime.model.identity,
    )
    probe = make_probe(scene, wanted, prompts, report, references, kind=SpreadProbe)
    assert isinstance(probe, SpreadProbe)
    probe.spread, probe.shared = spread, spread.share((prompts, references))
    return prompts, whole, probe


def _silent(step: str, done: int, total: int | None) -> None:
    """A worker tells nobody how far it is."""
