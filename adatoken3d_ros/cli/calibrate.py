# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d calibrate`: a pruning strategy for a model, from scenes and questions.

Mines how much each decoder layer and each spatial token contributes, chooses where to prune, and measures what that
does to the answers. Writes the strategy as YAML, and what was mined as files and a picture. No ROS is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli import ask

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.lab.calibration import Calibration
    from adatoken3d_ros.lab.information import InformationSet
    from adatoken3d_ros.lab.probe import Probe, Sample
    from adatoken3d_ros.pruning.decay import Decay
    from adatoken3d_ros.pruning.schedule import Schedule
    from adatoken3d_ros.pruning.view import Policy

KINDS = ("adatoken", "calibrated", "given")
DEFAULT_QUESTIONS = (
    "What is in this room?",
    "What is the largest object in the room?",
    "How many chairs are there?",
    "What colour is the object closest to the wall?",
    "Where can I put a cup down?",
    "What is next to the table?",
    "Is there a free path through the room?",
    "Describe the room.",
)
MAX_QUESTIONS_BYTES = 1 << 20
_TIMED_RUNS = 3
# Length of the answer whose operations are told.
_NEW_TOKENS = 16
_POOR_FIT = 0.5

# (step, done, total), total None where nobody knows it.
Report = Callable[[str, int, int | None], None]


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("calibrate", help="make a pruning strategy for a model", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--bag", type=Path, nargs="+", metavar="PATH", help="ROS 2 bags, one scene each: .mcap or .db3 files or folders"
    )
    source.add_argument(
        "--folder", type=Path, nargs="+", metavar="DIR", help="one scene each: color/, depth/, pose/, intrinsics.json"
    )
    parser.add_argument(
        "--pose-source", default="auto", choices=["auto", "pose_topic", "odometry", "tf"], help="poses in the bag"
    )
    parser.add_argument("--scene-frame", default="", metavar="NAME", help="frame of the scene, for TF in a bag (map)")
    for name in ("rgb", "depth", "pose"):
        parser.add_argument(f"--{name}-topic", default="", metavar="NAME", help="in the bag, if it has several")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="one a line (default: a few general ones)")
    parser.add_argument("--kind", choices=KINDS, default="adatoken", help="how gates are chosen (%(default)s)")
    parser.add_argument("--policy", default="ours", metavar="NAME", help="how tokens are chosen (%(default)s)")
    parser.add_argument("--debias", type=int, metavar="M", help="divide scores by attention to M relative positions")
    parser.add_argument("--sink-dims", metavar="auto|D,...", help="rank tokens last with a huge activation there")
    parser.add_argument("--max-gates", type=int, metavar="N", help="most gates (adatoken: 3; calibrated: 4, the most)")
    parser.add_argument("--end-share", type=float, metavar="A", help="adatoken: share at the last layer (0.1)")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--flops-reduction", type=float, metavar="R", help="calibrated: FLOPs to save (0.63)")
    limit.add_argument("--latency-reduction", type=float, metavar="R", help="calibrated: measured time to save")
    parser.add_argument("--max-kl", type=float, metavar="KL", help="calibrated: prune less if answers move more (nats)")
    parser.add_argument("--withdraw", action="store_true", help="calibrated: no spatial token past the horizon")
    parser.add_argument("--horizon-kl", type=float, metavar="KL", help="calibrated: what defines the horizon (0.003)")
    parser.add_argument("--gates", metavar="L:R,...", help="given: layers and keep ratios, e.g. 8:0.5,16:0.25,24:0.125")
    parser.add_argument("--answer-tokens", type=int, default=4, metavar="T", help="answer tokens judged (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("strategy.yaml"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("calibration"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--max-views", type=int, default=20, metavar="N", help="key frames of a scene (%(default)s)")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="use every N-th frame (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])


# Options that only one kind reads: with another kind they are a mistake, not something to pass over.
_ONLY_FOR = {
    "end_share": "adatoken",
    "flops_reduction": "calibrated",
    "latency_reduction": "calibrated",
    "max_kl": "calibrated",
    "withdraw": "calibrated",
    "horizon_kl": "calibrated",
    "gates": "given",
}


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0. Raises ValueError or OSError naming what is wrong."""
    check_arguments(args)
    questions = read_questions(args.questions) if args.questions else DEFAULT_QUESTIONS
    args.report.mkdir(parents=True, exist_ok=True)

    from rich.console import Console

    from adatoken3d_ros.pruning.policies import make_policy
    from adatoken3d_ros.pruning.strategy import Strategy

    _, scene = ask.open_scene(argparse.Namespace(**vars(args), strategy=""))
    with progress_display() as report:
        prompts = collect(scene, args, questions, report)
        information = mine_all(scene, prompts, report)
        options = policy_options(scene, args, prompts, information)
        policy = make_policy(args.policy, **options)
        schedule, made, extra = choose(scene, args, policy, prompts, information, report)
        schedule.check(scene.runtime.n_layers)
        figures = extra.divergence_figures(schedule) | measure(scene, policy, schedule, prompts, report)
    concentration = information.figures()["concentration"]
    strategy = Strategy(
        name=f"{args.kind}-{args.policy}",
        policy=args.policy,
        options=options,
        schedule=schedule,
        model_hash=scene.runtime.model.identity,
        model_id=args.model.resolve().name,
        info={
            "kind": args.kind,
            "made_from": {"scenes": list(dict.fromkeys(information.scenes)), "prompts": len(prompts.samples)},
            "settings": made,
            "figures": figures,
        },
    )
    strategy.save(args.out)
    information.save(args.report / "information")
    extra.save(args.report / "calibration.json")
    draw_picture(information, schedule, extra.decay, args.report / "information.png", scene.runtime.n_layers)
    print_tables(Console(), strategy, concentration)
    print(f"wrote {args.out} and, in {args.report}, {', '.join(sorted(p.name for p in args.report.iterdir()))}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for what cannot work, before anything large is loaded."""
    from adatoken3d_ros.pruning.policies import make_policy

    for option in ("model", "questions"):
        if getattr(args, option) is not None and not getattr(args, option).exists():
            raise FileNotFoundError(f"--{option}: {getattr(args, option)} does not exist")
    for path in args.folder or args.bag:
        if not path.exists():
            raise FileNotFoundError(f"--{'folder' if args.folder else 'bag'}: {path} does not exist")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out: {args.out.resolve().parent} is no folder")
    for name, kind in _ONLY_FOR.items():
        if getattr(args, name) not in (None, False) and args.kind != kind:
            raise ValueError(f"--{name.replace('_', '-')} is for --kind {kind}, not {args.kind}")
    if args.kind == "given":
        parse_gates(args.gates)
    for name in ("end_share", "flops_reduction", "latency_reduction"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is outside (0, 1)")
    for name in ("max_kl", "horizon_kl"):
        value = getattr(args, name)
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive")
    for name, least in (("max_gates", 1), ("max_views", 1), ("stride", 1), ("answer_tokens", 0), ("debias", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    given = {"debias": [1.0]} if args.debias is not None else {}
    make_policy(args.policy, **given, **({"sink_dims": parse_dims(args.sink_dims)} if args.sink_dims else {}))


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


def read_questions(path: Path) -> tuple[str, ...]:
    """One question a line; empty lines and lines that begin with # are passed over. Raises ValueError, OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_QUESTIONS_BYTES + 1)
    if len(content) > MAX_QUESTIONS_BYTES:
        raise ValueError(f"{path} is larger than {MAX_QUESTIONS_BYTES} bytes")
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    questions = tuple(line for line in lines if line and not line.startswith("#"))
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


@contextmanager
def progress_display() -> Iterator[Report]:
    """A progress bar per step; the function that it gives is called with (step, done, total)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, TimeRemainingColumn()) as progress:

        def report(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield report


@dataclass
class Prompts:
    """Calibration prompts, the scene and question that each comes from, and the views of its scene."""

    samples: list[Sample] = field(default_factory=list)
    scenes: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    views: list[int] = field(default_factory=list)


def collect(scene: Scene, args: argparse.Namespace, questions: tuple[str, ...], report: Report) -> Prompts:
    """Shows each folder or bag to the scene and asks for the model's input of every question about it."""
    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.lab.probe import Sample

    prompts = Prompts()
    sources = args.folder or args.bag
    # Two scenes may be folders of the same name; their paths tell them apart.
    names = [p.name for p in sources] if len({p.name for p in sources}) == len(sources) else [str(p) for p in sources]
    n_frames = 0
    for name, path in zip(names, sources, strict=True):
        scene.clear()
        one = {"folder": path, "bag": None} if args.folder else {"folder": None, "bag": path}
        for frame in ask.frames(argparse.Namespace(**{**vars(args), **one})):
            scene.observe(frame)
            scene.encode_pending()
            n_frames += 1
            report("frames", n_frames, None)
        if scene.tokens() is None:
            raise ValueError(f"{path} has no frame with valid depth")
        for question in questions:
            spliced, block = scene.spliced(Question(question))
            prompts.samples.append(Sample(spliced.embeds, spliced.spatial_start, spliced.n_spatial, block.scene))
            prompts.scenes.append(name)
            prompts.questions.append(question)
            prompts.views.append(len(scene.poses))
    report("frames", n_frames, n_frames)
    return prompts


def mine_all(scene: Scene, prompts: Prompts, report: Report) -> InformationSet:
    """Mines every prompt."""
    from adatoken3d_ros.lab.information import InformationSet
    from adatoken3d_ros.lab.mining import mine

    found = []
    total = len(prompts.samples) * scene.runtime.n_layers
    for index, sample in enumerate(prompts.samples):
        before = index * scene.runtime.n_layers
        found.append(
            mine(
                scene.runtime.model.decoder,
                sample.embeds,
                spatial_start=sample.spatial_start,
                n_spatial=sample.n_spatial,
                progress=lambda done, _, before=before: report("information", before + done, total),  # type: ignore[misc]
            )
        )
    return InformationSet(tuple(found), tuple(prompts.scenes), tuple(prompts.questions), scene.runtime.model.identity)


@dataclass
class Extra:
    """What a kind of strategy leaves behind besides its schedule."""

    probe: Probe
    decay: Decay | None = None
    calibration: Calibration | None = None

    def divergence_figures(self, schedule: Schedule) -> dict[str, Any]:
        """Measured divergence of the schedule; of a calibrated one also what was planned and asked for."""
        if self.calibration is None:
            return {"kl": self.probe.divergence(schedule)}
        found = self.calibration
        return {
            "kl": found.divergence,
            "kl_sum_of_single_gates": found.planned.divergence,
            "cost_share": found.cost,
            "cost_share_asked": found.limit,
            "cost_within_limit": found.within_limit,
        }

    def save(self, path: Path) -> None:
        """Writes the fit, or the sensitivity and the withdrawal scan, as JSON."""
        content: dict[str, Any] = {}
        if self.decay is not None:
            content["decay"] = {name: getattr(self.decay, name) for name in ("A", "B", "C", "D", "end_share", "error")}
            content["curve"] = self.decay.curve().tolist()
        if (found := self.calibration) is not None:
            content["layers"], content["ratios"] = found.layers, found.ratios
            content["sensitivity"] = found.sensitivity.tolist()
            content["withdrawal"] = None if found.withdrawal is None else found.withdrawal.tolist()
            content["factor"] = found.factor
            content["planned_kl"] = found.planned_divergence
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def policy_options(
    scene: Scene, args: argparse.Namespace, prompts: Prompts, information: InformationSet
) -> dict[str, list[float] | list[int]]:
    """What the policy is told of the model beside the schedule: attention by position, dimensions of sinks."""
    from adatoken3d_ros.lab.probe import massive_dims

    options: dict[str, list[float] | list[int]] = {}
    if args.debias is not None:
        options["debias"] = information.position_curve(args.debias)
    if args.sink_dims == "auto":
        options["sink_dims"] = list(massive_dims(scene.runtime.model.decoder, prompts.samples))
    elif args.sink_dims:
        options["sink_dims"] = parse_dims(args.sink_dims)
    return options


def choose(
    scene: Scene,
    args: argparse.Namespace,
    policy: Policy,
    prompts: Prompts,
    information: InformationSet,
    report: Report,
) -> tuple[Schedule, dict[str, Any], Extra]:
    """The schedule of the kind that was asked for, the settings behind it, and what else came of it."""
    from adatoken3d_ros.lab.calibration import calibrate
    from adatoken3d_ros.lab.cost import FlopsCost, LatencyCost, time_layer
    from adatoken3d_ros.lab.gates import MAX_GATES
    from adatoken3d_ros.lab.probe import HORIZON_KL, Probe
    from adatoken3d_ros.pruning.decay import adatoken_schedule

    decoder, samples = scene.runtime.model.decoder, prompts.samples
    end_of_answer = scene.runtime.tokenizer.eos_token_id
    probe = Probe(
        decoder,
        samples,
        policy,
        n_tokens=args.answer_tokens,
        eos_ids=() if end_of_answer is None else (end_of_answer,),
        progress=lambda done, total: report("answers", done, total),
    )
    if args.kind == "given":
        return parse_gates(args.gates), {"gates": args.gates}, Extra(probe)
    if args.kind == "adatoken":
        end_share, max_gates = args.end_share or 0.10, args.max_gates or 3
        schedule, decay = adatoken_schedule(information.contribution, end_share, max_gates)
        settings = {"end_share": end_share, "max_gates": max_gates}
        fit = {"fit_rate": decay.B, "fit_error": decay.error, "fit_correlation": decay.correlation}
        return schedule, settings | {name: round(value, 6) for name, value in fit.items()}, Extra(probe, decay=decay)
    by_latency = args.latency_reduction is not None
    cost = (
        LatencyCost(partial(time_layer, decoder, progress=partial(report, "latency")), samples)
        if by_latency
        else FlopsCost(decoder.size, samples)
    )
    saved = args.latency_reduction if by_latency else args.flops_reduction or 0.63
    eta = args.horizon_kl or HORIZON_KL
    found = calibrate(
        probe,
        cost,
        1.0 - saved,
        max_gates=args.max_gates or MAX_GATES,
        withdraw=args.withdraw,
        eta=eta,
        max_divergence=args.max_kl,
        progress=report,
    )
    settings = {
        "latency_reduction" if by_latency else "flops_reduction": saved,
        "max_gates": args.max_gates or MAX_GATES,
    }
    settings |= {"horizon_kl": eta} if args.withdraw else {}
    settings |= {"max_kl": args.max_kl} if args.max_kl else {}
    return found.schedule, settings, Extra(probe, calibration=found)


def measure(scene: Scene, policy: Policy, schedule: Schedule, prompts: Prompts, report: Report) -> dict[str, Any]:
    """FLOPs saved in three conventions (mean over the prompts) and measured prefill times of one prompt."""
    from adatoken3d_ros.decoder.prefill import Layout, prefill
    from adatoken3d_ros.pruning import flops
    from adatoken3d_ros.pruning.schedule import Schedule

    decoder = scene.runtime.model.decoder
    saved = defaultdict[str, list[float]](list)
    for sample, views in zip(prompts.samples, prompts.views, strict=True):
        encoder = views * scene.runtime.model.vision.flops_per_view
        n_question = sample.n_text - sample.spatial_start
        pruned, whole = (
            flops.three_conventions(
                decoder.size,
                counts := one.counts(sample.n_spatial, scene.runtime.n_layers, policy.kept),
                sample.n_text,
                n_new=_NEW_TOKENS,
                encoder=encoder,
                scoring=flops.scoring_flops(policy, decoder.size, sample.n_spatial, counts, sample.n_text, n_question),
            )
            for one in (schedule, Schedule())
        )
        for convention, operations in pruned.items():
            saved[convention].append(flops.reduction(operations, whole[convention]))
    sample = prompts.samples[0]
    layout = Layout(sample.spatial_start, sample.n_spatial, sample.n_tokens)
    times: dict[str, list[float]] = {"unpruned": [], "pruned": []}
    for index in range(_TIMED_RUNS + 1):
        for name, one in (("unpruned", Schedule()), ("pruned", schedule)):
            start = time.perf_counter()
            filled = prefill(decoder, sample.embeds, layout, one, policy, scene=sample.scene)
            filled.logits.cpu()  # waits for the device
            times[name].append((time.perf_counter() - start) * 1e3)
        report("timing", index + 1, _TIMED_RUNS + 1)
    return {
        "flops_reduction": {name: round(statistics.fmean(values), 4) for name, values in saved.items()},
        # The first run of each warms up.
        "prefill_ms": {name: round(statistics.median(values[1:]), 3) for name, values in times.items()},
        "spatial_tokens": sample.n_spatial,
        "spatial_tokens_by_layer": list(schedule.counts(sample.n_spatial, scene.runtime.n_layers, policy.kept)),
    }


def draw_picture(
    information: InformationSet, schedule: Schedule, decay: Decay | None, path: Path, n_layers: int
) -> None:
    """The picture of `picture.draw` with the fitted curve, where there is one, and what the schedule keeps."""
    import numpy as np

    from adatoken3d_ros.lab.picture import draw

    kept = np.array(schedule.counts(10**6, n_layers)) / 1e6
    draw(information, path, curve=None if decay is None else decay.curve(), kept=kept)


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
