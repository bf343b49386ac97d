# SPDX-License-Identifier: Apache-2.0
"""The frames of a scene that a question set names, below a folder of scenes in any of the forms that are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.scannet_folder import layout_of, read_scannet
from adatoken3d_ros.text import quoted

_SCANNET = "-scannet-"  # in OpenEQA's names: 002-scannet-scene0709_00
BAGS = (".mcap", ".db3")


def find_scene(root: Path, name: str) -> Path:
    """Where the scene `name` is: as the set writes it ("scannet/scene0011_00"), by its last part, or by ScanNet's name;
    a folder, or a bag's file.

    Raises:
        FileNotFoundError: names what was looked for.
    """
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or not plain.parts:
        raise FileNotFoundError(f"the scene {quoted(name)} is no name of something below {root}")
    names = dict.fromkeys((str(plain), plain.name, plain.name.rpartition(_SCANNET)[2]))
    for candidate in names:
        for suffix in ("", *BAGS):
            if (path := root / f"{candidate}{suffix}").exists():
                return path
    raise FileNotFoundError(f"there is no scene {quoted(name)} in {root} (looked for {', '.join(names)})")


def frames_of(path: Path, most: int, read_bag: Callable[[Path], Iterator[PosedFrame]]) -> Iterator[PosedFrame]:
    """Frames of a scene: of `most` of them, evenly; all if it is 0.

    Args:
        path: a folder of posed frames, a ScanNet scene, or a bag. read_bag: reads one.

    Raises:
        ValueError, OSError: for a scene that cannot be read; the text names it.
    """
    if (path / "intrinsics.json").is_file():
        n = sum(1 for file in (path / "color").glob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        frames = read_folder(path, stride=max(1, n // most) if most else 1)
    elif path.is_dir() and layout_of(path) is not None:
        frames = read_scannet(path, most)
    elif path.is_dir() and not (path / "metadata.yaml").is_file():
        raise ValueError(f"{path} is no scene: neither posed frames (docs/data.md), nor ScanNet's export, nor a bag")
    else:
        # Read twice rather than held: an hour of frames is more than a machine has memory.
        n = sum(1 for _ in read_bag(path)) if most else 0
        frames = islice(read_bag(path), None, None, max(1, n // most) if most else 1)
    yield from islice(frames, most or None)
