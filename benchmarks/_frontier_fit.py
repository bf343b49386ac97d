# SPDX-License-Identifier: Apache-2.0
"""What the frontier measures beforehand, in rooms set aside, and the strategies that it chooses by that."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adatoken3d_ros.engine.loading import fitted_strategies
from adatoken3d_ros.lab.cost import FlopsCost
from adatoken3d_ros.lab.information import Information, InformationSet
from adatoken3d_ros.lab.mining import mine
from adatoken3d_ros.lab.probe import RATIOS, Probe, Sample
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.lab.strategy_maker import BY_NAME, NAMED
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.pruning.decay import fit_decay
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, Stage
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import Watching
from benchmarks._budgets import CONTESTANTS, SHIPPED, Fitted, Work, candidates
from benchmarks._kept import Kept, strategy_key
from benchmarks._reuse import remembering
from benchmarks._scenes import Reader, Room

_PROMPTS_PER_ROOM = len(FAMILIES)  # of the rooms that are calibrated on; of a few, what helps cannot be told from luck
_BIAS_POINTS = 16
_SHARED = 0.005  # nats that naming has to save: twelve rooms tell no less


@dataclass(frozen=True, eq=False)
class Measurement:
    """The divergence of a strategy on the prompts of the calibration rooms."""

    rooms: tuple[Room, ...]
    strategy: Strategy

    def kept_as(self) -> list[Any]:
        """For `Kept`."""
        return [[room.key() for room in self.rooms], strategy_key(self.strategy)]


def calibration_prompts(reader: Reader, rooms: Sequence[Room]) -> list[Sample]:
    """A few prompts a room, of families in turn."""
    prompts: list[Sample] = []
    for k, room in enumerate(rooms):
        turn = [FAMILIES[(k * _PROMPTS_PER_ROOM + j) % len(FAMILIES)] for j in range(_PROMPTS_PER_ROOM)]
        asked = [qa for family in turn for qa in room.questions if qa.family == family]
        first = {qa.family: qa for qa in reversed(asked)}
        prompts += reader.samples(room.scene(), list(first.values()) or room.questions[:1])
    return prompts


def divergence(reader: Reader, task: Measurement) -> float:
    """KL to the unpruned answers, in nats."""
    policy = make_rival(task.strategy.policy, **task.strategy.options)
    # What watches layers has to see all rows in them.
    with nullcontext() if isinstance(policy, Watching) else remembering(reader.decoder):
        if "probe" not in reader.memory:
            prompts = calibration_prompts(reader, task.rooms)
            reader.memory["probe"] = Probe(reader.decoder, prompts, make_policy("none"), eos_ids=(reader.eos,))
        probe: Probe = reader.memory["probe"]
        return probe.with_policy(policy).divergence(task.strategy.schedule)


def mined(reader: Reader, room: Room) -> list[Information]:
    """How much layers and tokens contribute to the answers of a calibration room."""
    (spread,) = [calibration_prompts(reader, [room])]
    return [
        mine(reader.decoder, s.embeds, spatial_start=s.spatial_start, n_spatial=s.n_spatial, layout=s.layout)
        for s in spread
    ]


def fit(workers: Kept, reader: Reader, rooms: tuple[Room, ...], named: Sequence[float] = NAMED) -> Fitted:
    """Measures what the schedules of `adatoken` and `ours` are made from; `named`: shares to choose among."""
    found = workers.map("what layers contribute", mined, rooms)
    information = InformationSet(
        tuple(one for of_room in found for one in of_room),
        tuple(room.path.stem for room, of_room in zip(rooms, found, strict=True) for _ in of_room),
        tuple("" for of_room in found for _ in of_room),
        reader.model.identity,
    )
    n_layers = reader.n_layers

    def measure(what: str, strategies: Sequence[Strategy]) -> list[float]:
        return workers.map(what, divergence, [Measurement(rooms, strategy) for strategy in strategies])

    curve = information.position_curve(_BIAS_POINTS)
    tried: list[dict[str, Any]] = [{}, {"coverage": 0.0}, {"rows": "last"}, {"rows": "last", "coverage": 0.0}]
    tried += [{**tried[k], "debias": curve} for k in (0, 1)]
    own = make_policy("ours").default_schedule(n_layers)
    halves = [Schedule(tuple(Stage(s.layer, s.ratio * f) for s in own.stages)) for f in (1.0, 0.5)]
    trials = [Strategy("options", "ours", schedule, options=options) for options in tried for schedule in halves]
    by_options = np.array(measure("options of ours", trials)).reshape(len(tried), len(halves)).mean(axis=1)
    options = tried[int(by_options.argmin())]
    by_share: list[float] = []
    if reader.decoder.first_gate == 0:
        shares = [{**options, "named": share} for share in named]
        by_share = measure("words of ours", [Strategy("options", "ours", BY_NAME, options=one) for one in shares])
        options = shares[int(np.argmin(by_share))]
    layers = tuple(range(n_layers))
    gates = [Schedule((Stage(layer, ratio),)) for layer in layers for ratio in RATIOS]
    gaps = measure("single gates of ours", [Strategy("gate", "ours", one, options=options) for one in gates])
    ends = [Schedule(withdraw_layer=layer) for layer in layers]
    withdrawal = measure("withdrawals", [Strategy("end", "none", one) for one in ends])
    prompts = [sample for k, room in enumerate(rooms) for sample in calibration_prompts(reader, [room])[:1]]
    decay = fit_decay(information.contribution)
    return Fitted(
        rate=decay.B,
        options=options,
        layers=layers,
        ratios=RATIOS,
        gaps=np.array(gaps).reshape(n_layers, len(RATIOS)),
        withdrawal=np.array([*withdrawal, 0.0]),
        cost=FlopsCost(reader.decoder.size, prompts),
        notes={
            "rooms": [room.seed for room in rooms],
            "split": "train",
            "contribution": information.contribution.tolist(),
            "decay_correlation": decay.correlation,
            "options_tried": [{"options": o, "kl": float(kl)} for o, kl in zip(tried, by_options, strict=True)],
            "named_tried": dict(zip(map(str, named), by_share, strict=False)),
            "withdrawal_kl": withdrawal,
        },
    )


def choose(
    workers: Kept,
    rooms: tuple[Room, ...],
    fitted: Fitted,
    work: Work,
    n_layers: int,
    targets: Sequence[float],
    contestants: Sequence[str] = CONTESTANTS,
) -> list[Strategy]:
    """A strategy for every contestant at every target that one of its settings reaches, in that order."""
    names = [name for name in contestants if name != "random"]
    tried = {(n, t): candidates(n, t, work, n_layers, fitted) for n in names for t in targets}
    flat = [strategy for some in tried.values() if len(some) > 1 for strategy in some]
    measured = iter(workers.map("settings of all", divergence, [Measurement(rooms, strategy) for strategy in flat]))
    chosen: dict[tuple[str, float], Strategy] = {}
    for (name, target), some in tried.items():
        if not some:
            continue
        kls = [next(measured) for _ in some] if len(some) > 1 else [0.0]
        best = some[int(np.argmin(kls))]
        tried_here = {one.info["setting"]: kl for one, kl in zip(some, kls, strict=True) if len(some) > 1}
        measured_here = {"kl_of_settings": tried_here, "figures": {"kl": min(kls)}} if tried_here else {}
        chosen[name, target] = replace(best, info={**best.info, "contestant": name, **measured_here})
    for target in targets if "random" in contestants else ():
        if (ours := chosen.get(("ours", target))) is not None:
            info = {"target": target, "contestant": "random", "setting": "the schedule of ours"}
            chosen["random", target] = Strategy(f"random at {target:g}", "random", ours.schedule, info=info)
    return [chosen[key] for name in contestants for target in targets if (key := (name, target)) in chosen]


def choose_ours(
    workers: Kept, reader: Reader, rooms: tuple[Room, ...], work: Work, targets: Sequence[float], usual: float
) -> list[Strategy]:
    """`ours` at every target; `usual` is that of the strategy of answers without a budget.

    Questions without a budget share the layers before the first gate that looks at them (`decoder.stem`). A gate for
    what they name is before all layers, so there it is chosen only where it is worth that.
    """
    fitted, n_layers = fit(workers, reader, rooms), reader.n_layers
    found = {one.info["target"]: one for one in choose(workers, rooms, fitted, work, n_layers, targets, ("ours",))}
    if usual in found and fitted.options.get("named"):
        fitted = fit(workers, reader, rooms, (0.0,))
        for shared in choose(workers, rooms, fitted, work, n_layers, [usual], ("ours",)):
            if _kl(shared) < _kl(found[usual]) + _SHARED:
                found[usual] = shared
    return [found[target] for target in targets if target in found]


def shipped(reader: Reader, targets: Sequence[float]) -> list[Strategy]:
    """`ours_shipped`: the strategies in the model's folder that were made for these targets, as they are."""
    found = fitted_strategies(reader.path, reader.model.identity).values()
    of_target = {one.info["target"]: one for one in found if one.info.get("target") in targets}
    told = {"contestant": SHIPPED, "setting": "as it comes with the model"}
    return [replace(of_target[target], info={"target": target, **told}) for target in targets if target in of_target]


def _kl(strategy: Strategy) -> float:
    return float(strategy.info["figures"]["kl"])
