# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d calibrate`: a pruning strategy for a model, from scenes and questions.

Mines how much each decoder layer and each spatial token contributes, chooses where to prune, and measures what that
does to the answers. Writes the strategy as YAML, and what was mined as files and a picture. No ROS is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli import ask
from adatoken3d_ros.cli.options import add_scenes, check_files, settings_of
from adatoken3d_ros.cli.progress import step_progress
from adatoken3d_ros.cli.questions import read_questions
from adatoken3d_ros.cli.spreading import absolute, add_ray, spread_over
from adatoken3d_ros.text import described

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.lab.spread_calibration import Bench
    from adatoken3d_ros.lab.strategy_maker import Wanted
    from adatoken3d_ros.pruning.schedule import Schedule
    from adatoken3d_ros.scene.frames import PosedFrame

KINDS = ("adatoken", "mined", "calibrated", "given")
GENERAL_QUESTIONS = (
    "What is in this room?",
    "What is the largest object in the room?",
    "How many chairs are there?",
    "What colour is the object closest to the wall?",
    "Where can I put a cup down?",
    "What is next to the table?",
    "Is there a free path through the room?",
    "Describe the room.",
)
_POOR_FIT = 0.5
_MOVES_MUCH = 0.05  # nats; the strategies that the package brings move answers by less down to 15 % of the operations


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("calibrate", help="make a pruning strategy for a model", description=__doc__)
    add_scenes(parser, several=True)
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="one a line (default: like those of its training, or general)",
    )
    parser.add_argument("--kind", choices=KINDS, default="adatoken", help="how gates are chosen (%(default)s)")
    parser.add_argument("--policy", default="ours", metavar="NAME", help="how tokens are chosen (%(default)s)")
    parser.add_argument("--debias", type=int, metavar="M", help="divide scores by attention to M relative positions")
    parser.add_argument("--sink-dims", metavar="auto|D,...", help="rank tokens last with a huge activation there")
    parser.add_argument("--max-gates", type=int, metavar="N", help="most gates (adatoken: 3; others: 4, the most)")
    parser.add_argument("--end-share", type=float, metavar="A", help="adatoken: share at the last layer (0.1)")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--flops-reduction", type=float, metavar="R", help="mined, calibrated: FLOPs to save (0.63)")
    limit.add_argument("--latency-reduction", type=float, metavar="R", help="mined, calibrated: measured time to save")
    parser.add_argument(
        "--max-kl", type=float, metavar="KL", help="mined, calibrated: prune less if answers move more (nats)"
    )
    parser.add_argument("--withdraw", action="store_true", help="mined, calibrated: no spatial token past the horizon")
    parser.add_argument(
        "--horizon-kl", type=float, metavar="KL", help="mined, calibrated: what defines the horizon (0.003)"
    )
    parser.add_argument("--gates", metavar="L:R,...", help="given: layers and keep ratios, e.g. 8:0.5,16:0.25,24:0.125")
    parser.add_argument("--answer-tokens", type=int, default=4, metavar="T", help="answer tokens judged (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("strategy.yaml"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("calibration"), metavar="DIR", help="(%(default)s)")
    add_ray(parser)


# Options that only some kinds read: with another kind they are a mistake, not something to pass over.
_LIMITED = ("mined", "calibrated")
_ONLY_FOR = {
    "end_share": ("adatoken",),
    "flops_reduction": _LIMITED,
    "latency_reduction": _LIMITED,
    "max_kl": _LIMITED,
    "withdraw": _LIMITED,
    "horizon_kl": _LIMITED,
    "gates": ("given",),
}


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0. Raises ValueError or OSError naming what is wrong."""
    wanted = check_arguments(args)

    from adatoken3d_ros.engine.loading import checkpoint_path

    questions = _questions(args)
    args.report.mkdir(parents=True, exist_ok=True)

    from rich.console import Console

    from adatoken3d_ros.lab import strategy_maker
    from adatoken3d_ros.lab.picture import draw
    from adatoken3d_ros.lab.spread_calibration import spread_calibration
    from adatoken3d_ros.pruning.policies import make_policy
    from adatoken3d_ros.pruning.strategy import Strategy

    _, scene = ask.open_scene(args)
    if wanted.given is not None:  # before anything is mined, which can take hours
        wanted.given.check(scene.runtime.n_layers, scene.runtime.model.decoder.first_gate)
    console = Console()
    with step_progress(console) as report, spread_over(args, partial(_bench, absolute(args), wanted)) as cluster:
        if cluster is not None:
            count = len(args.folder or args.bag)
            prompts, information, probe = spread_calibration(cluster, scene, count, wanted, report)
        else:
            prompts = strategy_maker.collect(scene, scenes(args), questions, report)
            information = strategy_maker.mine_all(scene, prompts, report)
            probe = strategy_maker.make_probe(scene, wanted, prompts, report)
        options = strategy_maker.policy_options(scene, args.policy, wanted, prompts, information, probe)
        policy = make_policy(args.policy, **options)
        schedule, made, extra = strategy_maker.choose(scene, wanted, policy, prompts, information, probe, report)
        schedule.check(scene.runtime.n_layers)
        figures = extra.divergence_figures(schedule)
        figures |= strategy_maker.measure(scene, policy, schedule, prompts, report)
    concentration = information.figures()["concentration"]
    strategy = Strategy(
        name=f"{args.kind}-{args.policy}",
        policy=args.policy,
        options=options,
        schedule=schedule,
        model_hash=scene.runtime.model.identity,
        model_id=scene.runtime.model_id.partition("@")[0],
        info={
            "kind": args.kind,
            "made_from": {"scenes": list(dict.fromkeys(information.scenes)), "prompts": len(prompts.samples)},
            "settings": {"gates": args.gates} if wanted.given else made,
            "figures": figures,
        },
    )
    strategy.save(args.out)
    information.save(args.report / "information")
    extra.save(args.report / "calibration.json")
    picture = args.report / "information.png"
    curve = None if extra.decay is None else extra.decay.curve()
    draw(information, picture, curve=curve, kept=schedule.ratios(scene.runtime.n_layers))
    print_tables(console, strategy, concentration)
    print(f"wrote {args.out} and, in {args.report}, {', '.join(sorted(p.name for p in args.report.iterdir()))}")
    if told := write_self_test(checkpoint_path(args.model), scene):
        print(told)
    if figures["kl"] > _MOVES_MUCH:
        print(moves_much(args.kind, args.out, figures["kl"]))
    return 0


def _questions(args: argparse.Namespace) -> Sequence[str] | Callable[[Scene, int], Sequence[str]]:
    from adatoken3d_ros.engine.loading import checkpoint_path

    return read_questions(args.questions) if args.questions else default_questions(checkpoint_path(args.model))


def _bench(args: argparse.Namespace, wanted: Wanted) -> Bench:
    """A worker's model and what it may be asked to build."""
    from adatoken3d_ros.lab.spread_calibration import Bench

    return Bench(ask.open_scene(args)[1], list(scenes(args)), _questions(args), wanted)


def write_self_test(directory: Path, scene: Scene) -> str:
    """Beside a checkpoint that does not have it, what its model answers to the self-test; which file, or why there is
    none, in words. Weights that were quantised are not what others are compared with."""
    from adatoken3d_ros.engine.self_test import FILE, SelfTestError, is_missing, write_known

    model = scene.runtime.model
    try:
        if not is_missing(directory, model):
            return ""
        write_known(directory, model, scene.runtime.tokenizer)
    except (OSError, SelfTestError) as error:
        return f"{directory / FILE} is not written: {described(error)}"
    return f"wrote {directory / FILE}: loads of this model, quantised or not, are compared with it"


def moves_much(kind: str, path: Path, kl: float) -> str:
    """A warning of a strategy that moves answers by more nats than any that the package brings."""
    ways = "save fewer operations or set --max-kl"
    if kind in ("adatoken", "given"):
        ways = "try --kind calibrated, which puts gates where they move answers least"
    return (
        f"WARNING: {path} moves answers by {kl:.2g} nats, more than {_MOVES_MUCH:g}: some will be others than those of "
        f"the unpruned model. Before it is used, {ways}."
    )


def default_questions(model: Path) -> Callable[[Scene, int], Sequence[str]]:
    """What is asked about a scene where nobody says: questions about places of it, as `adatoken3d train` teaches them.

    Of a model that says what it understands, those that it does; of one that was not trained on any of them, and says
    nothing, the general ones.

    Raises:
        CheckpointError: if config.json is missing or damaged.
    """
    import numpy as np

    from adatoken3d_ros.lab.synthetic.invented import invented
    from adatoken3d_ros.lmm.safetensors_files import read_json
    from adatoken3d_ros.lmm.text_places import parse_clicks

    trained = isinstance(read_json(model / "config.json").get("training"), dict)

    def questions(scene: Scene, number: int) -> Sequence[str]:
        rng = np.random.default_rng(number)  # of the scene: whoever builds it asks the same
        tokens, known = scene.tokens(), scene.runtime.understanding
        if tokens is None or not (trained or known.wordings):
            return GENERAL_QUESTIONS
        found = invented(rng, tokens.xyz.cpu().numpy(), clicks=scene.runtime.model.takes_clicks)
        if known.wordings:
            found = [one for one in found if known.judge(parse_clicks(one)[0])[0]]
        return found or GENERAL_QUESTIONS

    return questions


def scenes(args: argparse.Namespace) -> Iterator[tuple[str, Path, Iterator[PosedFrame]]]:
    """(name, path, frames) of each folder or bag. Two may have one name; their paths tell them apart."""
    sources = args.folder or args.bag
    names = [p.name for p in sources] if len({p.name for p in sources}) == len(sources) else [str(p) for p in sources]
    for name, path in zip(names, sources, strict=True):
        one = {"folder": path, "bag": None} if args.folder else {"folder": None, "bag": path}
        yield name, path, ask.frames(argparse.Namespace(**{**vars(args), **one}))


def check_arguments(args: argparse.Namespace) -> Wanted:
    """How gates are to be chosen. Raises ValueError or OSError for what cannot work, before a model is loaded."""
    from adatoken3d_ros.lab.strategy_maker import Wanted
    from adatoken3d_ros.pruning.policies import make_policy

    check_files(args, ("--json", "--out"))  # its report is a folder, made or gone on with
    for name, kinds in _ONLY_FOR.items():
        if getattr(args, name) not in (None, False) and args.kind not in kinds:
            raise ValueError(f"--{name.replace('_', '-')} is for --kind {' or '.join(kinds)}, not {args.kind}")
    schedule = parse_gates(args.gates) if args.kind == "given" else None
    for name in ("end_share", "flops_reduction", "latency_reduction"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is outside (0, 1)")
    for name in ("max_kl", "horizon_kl"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive")
    for name, least in (("max_gates", 1), ("stride", 1), ("answer_tokens", 0), ("debias", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    sink_dims = parse_dims(args.sink_dims) if args.sink_dims else None
    given = {"debias": [1.0]} if args.debias is not None else {}
    make_policy(args.policy, **given, **({} if sink_dims is None else {"sink_dims": sink_dims}))
    settings_of(args)
    known = {field.name: getattr(args, field.name) for field in fields(Wanted) if field.name != "given"}
    return Wanted(given=schedule, **{**known, "sink_dims": sink_dims})


def parse_gates(text: str | None) -> Schedule:
    """A schedule from "8:0.5,16:0.25". Raises ValueError naming the part that is wrong."""
    from adatoken3d_ros.pruning.schedule import Schedule, Stage

    if not text:
        raise ValueError("--kind given needs --gates, e.g. 8:0.5,16:0.25,24:0.125")
    stages = []
    for part in text.split(","):
        layer, _, ratio = part.partition(":")
        try:
            stages.append((int(layer), float(ratio)))
        except ValueError as error:
            raise ValueError(f"--gates: {part!r} is no LAYER:RATIO") from error
    return Schedule(tuple(Stage(layer, ratio) for layer, ratio in stages))


def parse_dims(text: str) -> list[int]:
    """Dimensions from "1415,2533"; none yet from "auto". Raises ValueError naming what is no number."""
    if text == "auto":
        return []
    for part in (parts := text.split(",")):
        if not part.strip().isdecimal():
            raise ValueError(f"--sink-dims: {part!r} is no dimension; expected numbers or auto")
    return [int(part) for part in parts]


def print_tables(console: Any, strategy: Any, concentration: dict[str, Any]) -> None:
    """Prints what was chosen, what it costs, and whether the paper's claim about tokens holds here."""
    from rich.table import Table

    figures = strategy.info["figures"]
    table = Table(title=f"Strategy {strategy.name} for {strategy.model_id}", title_justify="left", show_header=False)
    for stage in strategy.schedule.stages:
        table.add_row(f"from layer {stage.layer} on", f"{stage.ratio:.1%} of the spatial tokens")
    if strategy.schedule.withdraw_layer is not None:
        table.add_row(f"from layer {strategy.schedule.withdraw_layer} on", "no spatial token")
    for name, value in figures["flops_reduction"].items():
        table.add_row(f"FLOPs saved, {name.replace('_', ' ')}", f"{value:.1%}")
    before, after = figures["prefill_ms"]["unpruned"], figures["prefill_ms"]["pruned"]
    table.add_row("prefill", f"{before:.1f} ms -> {after:.1f} ms ({before / after:.2f} times as fast)")
    table.add_row("answers move by (KL)", f"{figures['kl']:.2e} nats")
    if figures.get("cost_within_limit") is False:
        table.add_row("cost", f"{figures['cost_share']:.1%}, more than the {figures['cost_share_asked']:.1%} asked for")
    correlation = strategy.info["settings"].get("fit_correlation", 1.0)
    if correlation < _POOR_FIT:
        table.add_row(
            "note",
            f"the contributions of this model's layers do not decay as AdaToken-3D supposes (correlation "
            f"{correlation:.2f} with the fit): compare with --kind calibrated",
        )
    console.print(table)
    claim = Table(title="The least contributing 60 % of the spatial tokens", title_justify="left")
    for heading in ("measure", "have in sum", "95 % interval", "below 5 %", "q with 5 %", "Gini"):
        claim.add_column(heading)
    for measure_name, found in concentration.items():
        low, high = found["lowest_share"]["low"], found["lowest_share"]["high"]
        claim.add_row(
            measure_name,
            f"{found['lowest_share']['mean']:.1%}",
            "one scene" if low is None else f"{low:.1%} to {high:.1%}",
            "yes" if (high if high is not None else found["lowest_share"]["mean"]) < 0.05 else "no",
            f"{found['largest_q']['mean']:.1%}",
            f"{found['gini']['mean']:.2f}",
        )
    console.print(claim)
