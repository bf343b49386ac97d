# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: those that give a setting, and those that say where frames come from."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adatoken3d_ros.settings import BY_NAME, DEFAULTS, OF_CHOSEN_FRAMES, Setting, Settings

# Option -> the setting that it gives.
OPTIONS = {
    "--base-to-camera": "pose.base_to_camera",
    "--max-covariance": "pose.max_covariance",
    "--budget-ms": "latency_budget_ms",
    "--device": "model.device",
    "--depth-to-rgb": "pose.depth_to_rgb",
    "--dtype": "model.dtype",
    "--input-source": "input.source",
    "--decoding": "model.decoding",
    "--max-new-tokens": "max_new_tokens",
    "--max-views": "scene.max_views",
    "--model": "model.path",
    "--quantization": "model.quantization",
    "--origin-mode": "scene.origin_mode",
    "--slop": "sync.slop",
    "--strategy": "strategy",
    "--unsure-below": "unsure_below",
    "--vision-path": "model.vision_path",
}
_METAVARS = {int: "N", float: "X", str: "NAME", tuple: "'X Y Z ROLL PITCH YAW'"}
_FOLDERS = ("--model", "--vision-path")
_BAG = "ROS 2 bag: an .mcap or .db3 file, or a bag's folder"
_FOLDER = "color/, depth/, pose/ and intrinsics.json, see docs/data.md"


def add_settings(parser: argparse.ArgumentParser, *options: str) -> None:
    """Adds some of OPTIONS, with the default, the choices and the description of their settings."""
    for option in options:
        setting = BY_NAME[OPTIONS[option]]
        text, kind = setting.description.replace("%", "%%"), type(setting.default)
        parser.add_argument(
            option,
            type=partial(_pose, setting) if kind is tuple else kind,
            default=setting.default,
            choices=setting.choices or None,
            metavar=None if setting.choices else "DIR" if option in _FOLDERS else _METAVARS[kind],
            help=text if kind is tuple or option in _FOLDERS else f"{text} (%(default)s)",
        )


def _pose(setting: Setting, text: str) -> tuple[float, ...]:
    """Numbers between spaces or commas. Raises argparse.ArgumentTypeError, with the text."""
    try:
        numbers: tuple[float, ...] = setting.plain([float(word) for word in text.replace(",", " ").split()])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is no pose: {error}") from error
    return numbers


def add_scenes(
    parser: argparse.ArgumentParser, *, several: bool = False, only_bag: bool = False, required: bool = True
) -> None:
    """Adds the model's checkpoint, and bags or folders of frames: one, several that are a scene each, or the bag that a
    command is about."""
    add_settings(parser, *_FOLDERS)
    if only_bag:
        parser.add_argument("bag", type=Path, metavar="BAG", help=_BAG)
        parser.set_defaults(folder=None)
    else:
        source = parser.add_mutually_exclusive_group(required=required)
        for option, metavar, what in (("--bag", "PATH", _BAG), ("--folder", "DIR", _FOLDER)):
            what += ", one scene each" if several else ""
            source.add_argument(option, type=Path, metavar=metavar, help=what, nargs="+" if several else None)
    parser.add_argument(
        "--pose-source",
        default="auto",
        choices=["auto", "pose_topic", "pose_with_covariance", "odometry", "tf"],
        help="poses in the bag",
    )
    parser.add_argument(
        "--scene-frame", default="", metavar="NAME",
        help=f"frame of the scene (what the bag's poses are in; for TF {DEFAULTS['scene.frame_id']})",
    )  # fmt: skip
    for name in ("rgb", "depth", "points", "pose"):
        parser.add_argument(f"--{name}-topic", default="", metavar="NAME", help="in the bag, if it has several")
    add_settings(parser, "--input-source", "--slop", "--depth-to-rgb")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="use every N-th frame (%(default)s)")
    add_settings(parser, "--base-to-camera", "--max-covariance", "--max-views", "--device", "--dtype", "--quantization")


def check_files(args: argparse.Namespace, written_to: Sequence[str] = ("--json", "--out", "--report")) -> None:
    """Before any work: what is read is there, where something is to be written there is a folder, and frames are left.

    Raises:
        OSError: names option and path.
        ValueError: for a --stride below 1.
    """
    if getattr(args, "stride", 1) < 1:
        raise ValueError(f"--stride {args.stride} must be at least 1")
    for option in (*_FOLDERS, "--bag", "--folder", "--questions"):
        found = getattr(args, option.strip("-").replace("-", "_"), None) or ()
        for path in map(Path, found if isinstance(found, list) else [found] if found else []):
            if not path.exists():
                raise FileNotFoundError(f"{option}: {path} does not exist")
    for option in written_to:
        if (written := getattr(args, option.strip("-"), None)) is not None:
            folder = written.resolve().parent
            if not folder.is_dir():
                raise FileNotFoundError(f"{option}: {folder} is no folder")
            if written.is_dir() or not os.access(written if written.exists() else folder, os.W_OK):
                raise PermissionError(f"{option}: {written} cannot be written to")


def settings_of(args: argparse.Namespace) -> Settings:
    """What a command's options give; all else is as in the node, with these exceptions:

    Frames of a folder were chosen, so each of them counts, however blurred. How fast the machine is, is measured only
    for who has a budget.

    Raises:
        ValueError: for a value that cannot be used; names option, setting, value and range.
    """
    given: dict[str, Any] = {}
    for option, name in OPTIONS.items():
        if (value := getattr(args, option.strip("-").replace("-", "_"), None)) is not None:
            if problem := BY_NAME[name].problem(value):
                raise ValueError(f"{option}: {problem}")
            given[name] = value
    if getattr(args, "folder", None):
        given["scene.min_sharpness"] = OF_CHOSEN_FRAMES["scene.min_sharpness"]
    given["budget.warm_up"] = given.get("latency_budget_ms", 0.0) > 0
    return Settings(given)
