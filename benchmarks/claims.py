# SPDX-License-Identifier: Apache-2.0
"""Is it so that 60 % of a scene's tokens hardly matter? AdaToken-3D's sentence (arXiv 2505.12782), tested.

It says that over 60 % of the spatial tokens contribute less than 5 %. Read of single tokens that is true of any scene
with more than 20 of them; so it is tested of their sum, in two ways:

* S(0.60), the share of the total contribution that the least contributing 60 % of the tokens hold, by attention, by
  the norm of what is read and by its projection on the output (`lab.mining`), in each layer and over all.
  The sentence holds where the interval of S(0.60) lies below 5 %, and fails where it lies above.
* Those 60 % are removed, before the first layer or in the middle, through `decoder.prefill`; beside it as many chosen
  at random, and the 60 % that contribute most. KL of the first answer token to that of the unpruned model, and
  accuracy.

Means are over rooms of questions about each; intervals are 95 % bootstrap intervals over rooms. Both are told of each
family of questions, too, and of a second model that is asked about the same rooms.

    python -m benchmarks.claims --json F [--picture PNG] [--model DIR] [--beside DIR] [--rooms 30] [--questions 360]
    python -m benchmarks.claims --from F --json F2 [--picture PNG] [--docs MD]    measures nothing, tells what F says
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.lab.information import CLAIMED_SHARE, CLAIMED_TOKENS, MEASURES, Concentration, FloatArray, lorenz
from adatoken3d_ros.lab.mining import mine
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Policy, Rope, Selection
from adatoken3d_ros.weights import embedded_path
from benchmarks._claims_docs import write_docs
from benchmarks._claims_picture import draw
from benchmarks._frontier_answers import judge
from benchmarks._paired import Tally, scene_interval
from benchmarks._refusals import refuse_missing, told_before
from benchmarks._reuse import remembering
from benchmarks._scenes import Reader, Room, Workers, balanced_rooms, bar, machine, write_json
from benchmarks.accuracy import MAX_ANSWER, SPLITS

REMOVALS = (*(f"least by {measure}" for measure in MEASURES), "random", f"most by {MEASURES[-1]}")
FIGURES = ("lowest_share", "largest_q", "gini")
_TOLD = ("contribution", "unpruned", "removal", "questions", "asked", "rooms", "verdict", "split", "model")
_POINTS = 101  # of a Lorenz curve
_MARGIN = 0.02  # of accuracy: what less than this is lost is called nothing


@dataclass(frozen=True, eq=False)
class Chosen:
    """Keeps the tokens that it is told to: (k,) int64, rising."""

    keep: Tensor
    name: str = "chosen"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        return Selection(self.keep)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule()

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class Found:
    """What Q questions about a room show on a model of L layers.

    Attributes:
        figures: (Q, measures, FIGURES) over all layers.
        by_layer: (Q, measures, L) S(0.60).
        curves: (Q, measures, points) Lorenz curves over all layers.
        kl: (Q, ways) nats; score: (Q, ways), see `ways`.
    """

    figures: FloatArray
    by_layer: FloatArray
    curves: FloatArray
    kl: FloatArray
    score: FloatArray


def removal_layers(n_layers: int) -> tuple[int, ...]:
    """Before the first layer, and in the middle."""
    return (0, n_layers // 2) if n_layers > 1 else (0,)


def ways(n_layers: int) -> list[tuple[int, str]]:
    """(layer, removal) in the order of the columns after the first, which is unpruned."""
    return [(layer, removal) for layer in removal_layers(n_layers) for removal in REMOVALS]


def kept_tokens(removal: str, shares: Mapping[str, FloatArray], seed: Sequence[int]) -> Tensor:
    """(k,) int64 rising: what is left when 60 % of the N tokens are removed. shares: (N,) of each measure."""
    n = len(shares[MEASURES[0]])
    removed = int(CLAIMED_TOKENS * n + 1e-9)
    kind, _, measure = removal.partition(" by ")
    if kind == "random":
        order = np.random.default_rng(seed).permutation(n)
    else:
        order = np.argsort(shares[measure] if kind == "least" else -shares[measure], kind="stable")
    return torch.from_numpy(np.sort(order[removed:]).astype(np.int64))


def examine(reader: Reader, room: Room) -> Found:
    """Measures the contributions of each question's prompt, and removes tokens by them."""
    samples = reader.samples(room.scene(), room.questions)
    mined = [
        mine(reader.decoder, s.embeds, spatial_start=s.spatial_start, n_spatial=s.n_spatial, layout=s.layout)
        for s in samples
    ]
    grid = np.linspace(0.0, 1.0, _POINTS)
    shares = [{measure: one.token_shares(measure) for measure in MEASURES} for one in mined]
    figures = [[[getattr(Concentration.of(s[m]), f) for f in FIGURES] for m in MEASURES] for s in shares]
    by_layer = [
        [[Concentration.of(layer).lowest_share for layer in one.layer_token_shares(m)] for m in MEASURES]
        for one in mined
    ]
    curves = [[np.interp(grid, *lorenz(s[m])) for m in MEASURES] for s in shares]
    columns: list[tuple[int, str] | None] = [None, *ways(reader.n_layers)]
    kl, score = np.zeros((len(samples), len(columns))), np.zeros((len(samples), len(columns)))
    with remembering(reader.decoder), torch.inference_mode():
        reference: list[Tensor] = []
        guesses: list[list[int]] = [[] for _ in samples]
        for column, way in enumerate(columns):
            for q, (sample, qa) in enumerate(zip(samples, room.questions, strict=True)):
                schedule, policy = Schedule(), make_policy("none")
                if way is not None:
                    keep = kept_tokens(way[1], shares[q], [room.seed, q])
                    schedule, policy = Schedule.of([way[0]], [len(keep) / sample.n_spatial]), Chosen(keep)
                filled = _read(reader, sample, schedule, policy)
                log_probs = filled.logits.double().log_softmax(-1)
                if way is None:
                    reference.append(log_probs)
                kl[q, column] = max(0.0, float((reference[q].exp() * (reference[q] - log_probs)).sum()))
                score[q, column] = judge(reader, filled, qa, guesses[q])
    return Found(np.array(figures), np.array(by_layer), np.array(curves), kl, score)


def _read(reader: Reader, sample: Sample, schedule: Schedule, policy: Policy) -> Any:
    return prefill(reader.decoder, sample.embeds, sample.layout, schedule, policy, max_new_tokens=MAX_ANSWER)


# --- figures ---


def summarise(rooms: Sequence[Room], found: Sequence[Found], n_layers: int, seed: int = 0) -> dict[str, Any]:
    """All figures of the JSON but where they come from."""
    asked = [(room.seed, qa.family) for room in rooms for qa in room.questions]
    seeds = [place for place, _ in asked]
    of_family = {family: [q for q, (_, one) in enumerate(asked) if one == family] for family in FAMILIES}
    concentration, by_layer = (np.concatenate([getattr(f, name) for f in found]) for name in ("figures", "by_layer"))
    kl, score = (np.concatenate([getattr(f, name) for f in found]) for name in ("kl", "score"))
    overall = scene_interval(seeds, concentration, seed=seed)
    layers = scene_interval(seeds, by_layer, seed=seed)
    contribution = {
        measure: {
            **{name: _estimate(overall[:, m, k]) for k, name in enumerate(FIGURES)},
            "lowest_share_by_layer": [_estimate(layers[:, m, layer]) for layer in range(n_layers)],
            "families": {
                family: _estimate(scene_interval([seeds[q] for q in rows], concentration[rows, m, 0], seed=seed))
                for family, rows in of_family.items()
                if rows
            },
            "lorenz": np.concatenate([f.curves for f in found])[:, m].mean(axis=0).round(5).tolist(),
        }
        for m, measure in enumerate(MEASURES)
    }
    tally = Tally(seeds, [family for _, family in asked], score.T, seed=seed)
    moved = scene_interval(seeds, kl, seed=seed)
    removal: dict[str, dict[str, Any]] = {}
    columns = ways(n_layers)
    for column, (layer, name) in enumerate(columns, 1):
        random = 1 + columns.index((layer, "random"))
        beyond = scene_interval(seeds, kl[:, column] - kl[:, random], seed=seed)
        removal.setdefault(str(layer), {})[name] = {
            "kl": _estimate(moved[:, column]),
            "kl_to_random": _estimate(beyond),
            "macro": float(tally.macro[column]),
            "interval": tally.interval(column),
            "difference": tally.difference(column, 0),
            "difference_interval": tally.difference_interval(column, 0),
            "to_random": tally.difference(column, random),
            "to_random_interval": tally.difference_interval(column, random),
            "families": tally.column_differences(column, 0),
        }
    return {
        "claim": {"tokens": CLAIMED_TOKENS, "share": CLAIMED_SHARE},
        "contribution": contribution,
        "unpruned": {"macro": float(tally.macro[0]), "interval": tally.interval(0), "families": tally.families(0, 0)},
        "removal": removal,
        "questions": len(asked),
        "asked": {family: len(rows) for family, rows in of_family.items()},
        "rooms": tally.rooms,
    }


def _estimate(values: FloatArray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(("mean", "low", "high"), values, strict=True)}


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """The sentence by each measure, the removal at each layer, and both in words.

    A removal is called harmless where the interval of the difference lies above a loss of two points, harmful where
    it lies below none, and undecided between; it is better than chance where the interval of its difference to the
    random one lies above 0, in accuracy or, as less divergence, in KL.
    """
    by_measure, lines = {}, []
    for measure, found in result["contribution"].items():
        share = found["lowest_share"]
        holds = True if share["high"] < CLAIMED_SHARE else False if share["low"] > CLAIMED_SHARE else None
        by_measure[measure] = holds
        says = {True: "holds", False: "does not hold", None: "is undecided"}[holds]
        lines.append(
            f"By {measure} share the least contributing 60 % of the spatial tokens hold {share['mean']:.1%} "
            f"[{share['low']:.1%}, {share['high']:.1%}] of the contribution: the sentence {says}."
        )
    removals: dict[str, dict[str, dict[str, str | bool]]] = {}
    for layer, some in result["removal"].items():
        for name, one in some.items():
            low, high = one["difference_interval"]
            effect = "harmless" if low > -_MARGIN else "harmful" if high < 0 else "undecided"
            judged: dict[str, str | bool] = {
                "effect": effect,
                "better_than_random": one["to_random_interval"][0] > 0 or one["kl_to_random"]["high"] < 0,
            }
            removals.setdefault(layer, {})[name] = judged
            chance = (
                ""
                if name == "random"
                else (", and better than chance" if judged["better_than_random"] else ", and no better than chance")
            )
            lines.append(
                f"Removed before layer {layer}, {name}: {100 * one['difference']:+.1f} "
                f"[{100 * low:+.1f}, {100 * high:+.1f}] points, KL {one['kl']['mean']:.2g}: {effect}{chance}."
            )
    decided = set(by_measure.values())
    if decided == {True}:
        words = "The sentence holds on this model, by every measure."
    elif decided == {False}:
        words = "The sentence does not hold on this model, by any measure."
    else:
        words = "The sentence stands or falls with the measure of contribution."
    return {"sentence": by_measure, "removal": removals, "in_words": [words, *lines]}


# --- for people ---


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Contributions, and what removal does."""
    first = Table(title="What the least contributing 60 % of the spatial tokens hold; by layer and over all")
    first.add_column("layer")
    for measure in MEASURES:
        first.add_column(measure, justify="right")
    of = result["contribution"]
    for layer in range(len(of[MEASURES[0]]["lowest_share_by_layer"])):
        first.add_row(str(layer), *(_percent(of[m]["lowest_share_by_layer"][layer]) for m in MEASURES))
    first.add_row("all", *(_percent(of[m]["lowest_share"]) for m in MEASURES))
    whole = result["unpruned"]["macro"]
    second = Table(title=f"60 % of the spatial tokens removed (unpruned: {whole:.3f}); differences in points")
    for heading in ("before layer", "which", "KL in nats", "macro", "to unpruned", "to random"):
        second.add_column(heading)
    for layer, some in result["removal"].items():
        for name, one in some.items():
            kl = "{mean:.3g} [{low:.3g}, {high:.3g}]".format(**one["kl"])
            gaps = [_points(one[key], one[f"{key}_interval"]) for key in ("difference", "to_random")]
            second.add_row(layer, name, kl, f"{one['macro']:.3f}", *gaps)
    return [first, second]


def _percent(value: Mapping[str, float]) -> str:
    return "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**value)


def _points(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def family_table(result: Mapping[str, Any]) -> Table:
    """Families down: what the least contributing hold, and what removing tokens before the first layer does."""
    measure, removal = MEASURES[-1], next(iter(result["removal"].values()))
    shown = Table(title=f"By family; contribution by {measure}; differences in points, before the first layer")
    for heading in ("family", "asked", "held by the least 60 %", "unpruned", f"least by {measure}", "random"):
        shown.add_column(heading, justify="left" if heading == "family" else "right")
    for name, whole in result["unpruned"]["families"].items():
        family = name.partition("@")[0]
        gaps = [removal[way]["families"][name] for way in (f"least by {measure}", "random")]
        shown.add_row(
            name,
            str(result["asked"][family]),
            _percent(result["contribution"][measure]["families"][family]),
            f"{whole['accuracy']:.3f}",
            *(_points(gap["difference"], gap["interval"]) for gap in gaps),
        )
    return shown


def of_model(args: argparse.Namespace, reader: Reader, folder: Path, console: Console) -> dict[str, Any]:
    """All figures of a model."""
    with bar(console, f"rooms of {args.split}") as progress:
        laid_out = balanced_rooms(
            reader,
            folder,
            args.split,
            rooms=args.rooms,
            per_family=math.ceil(args.questions / len(FAMILIES)),
            seed=args.seed,
            workers=args.workers,
            progress=progress,
        )
    rooms = [room for room in laid_out if room.questions]
    with Workers(reader, args.workers, console) as workers:
        found = workers.map("contributions and removals", examine, rooms)
    result = summarise(rooms, found, reader.n_layers, args.seed)
    result |= {"verdict": verdict(result), "split": args.split, "model": reader.about(), "machine": machine()}
    for shown in (*tables(result), family_table(result)):
        console.print(shown)
    for line in result["verdict"]["in_words"]:
        console.print(line, highlight=False)
    return result


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures of one model or of two."""
    own, beside = Reader(args.model or embedded_path()), None if args.beside is None else Reader(args.beside)
    with TemporaryDirectory() as temporary:
        result = of_model(args, own, args.scenes or Path(temporary, "own"), console)
        if beside is not None:
            folder = args.beside_scenes or Path(temporary, "beside")
            result["beside"] = of_model(args, beside, folder, console)
    return result


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--from", type=Path, metavar="F", dest="source", help="read them from it instead of measuring")
    parser.add_argument("--picture", type=Path, help="PNG to draw them in")
    parser.add_argument("--docs", type=Path, nargs="+", default=(), metavar="MD", help="pages to put them in")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="checkpoint of a second model (none)")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    parser.add_argument("--beside-scenes", type=Path, metavar="DIR", help="those of the second model")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--rooms", type=int, default=30, help="new rooms (%(default)s)")
    parser.add_argument("--questions", type=int, default=360, help="about them, of all families alike (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    return parser


def main() -> None:
    commands = parser()
    args = commands.parse_args()
    for name in ("rooms", "questions", "workers"):
        if getattr(args, name) < 1:
            commands.error(f"--{name} {getattr(args, name)} must be at least 1")
    refuse_missing(commands, args, "model", "beside")
    told = told_before(commands, args, "claims", _TOLD)
    result = run(args, Console()) if told is None else told
    write_json(args.json, result)
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(result, args.picture)
    write_docs(result, args.json, args.docs)


if __name__ == "__main__":
    main()
