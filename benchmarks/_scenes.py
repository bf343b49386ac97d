# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of a trained model share: furnished rooms encoded once, their questions, work on several cores.

Rooms come from the files that training keeps (`training.data.prepare`), so they are rendered and encoded once, for
every model with the same vision tower, number of views and voxels.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.fleet.spread import Cluster
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.spread import Alone, Processes, Spread
from adatoken3d_ros.lab.synthetic.furnished import Split
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.lab.training.data import Scene, SceneConfig, prepare, read_scene
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lab.training.pretrained import fingerprint
from adatoken3d_ros.lmm.interface import ViewTokens
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.pruning.view import SceneTokens

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int, int], None]

# Of the training split, where no training goes: for settings that are chosen by measurement, never by test rooms.
CALIBRATION_SEED = 7_000_000
_PER_ROOM = 18  # questions, about, at two a family


@dataclass(frozen=True, eq=False)
class Room:
    """A room on disk and what is asked about it; n_spatial: its tokens."""

    path: Path
    split: Split
    questions: tuple[QA, ...]
    n_spatial: int

    @property
    def seed(self) -> int:
        return int(self.path.stem)

    def key(self) -> list[Any]:
        """What is asked, and about which room."""
        return [self.split, self.seed, self.n_spatial, [(qa.question, qa.answer, qa.family) for qa in self.questions]]

    def scene(self) -> Scene:
        """Raises DataError if the file is damaged."""
        return read_scene(self.path, self.split)


@dataclass
class Reader:
    """A checkpoint and the prompts that it makes; `memory` is for what a process wants to keep between tasks.

    camera: what its rooms are seen through, as in `SceneConfig`.
    """

    path: Path
    memory: dict[str, Any] = field(default_factory=dict)
    quantization: str = "none"
    camera: str = "ideal"

    def __post_init__(self) -> None:
        self.model, tokenizer, _ = load(self.path, dtype=torch.float32, quantization=self.quantization)
        self.tokenizer: Any = tokenizer
        content = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        self.training: dict[str, Any] = content.get("training", {})
        self.blind = bool(self.training.get("blind", False))

    def again(self) -> Callable[[], Reader]:
        """Makes the same in another process."""
        return partial(Reader, self.path, quantization=self.quantization, camera=self.camera)

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    @property
    def n_layers(self) -> int:
        return len(self.model.decoder)

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def scene_config(self) -> SceneConfig:
        """How this model's rooms become scenes."""
        sizes = self.model.sizes
        return SceneConfig(
            views=sizes.num_views,
            image_size=sizes.patches.height,
            grid=sizes.patches.rows,
            voxel_size=sizes.voxel_size,
            max_tokens=sizes.max_spatial_tokens,
            vision=fingerprint(self.model.vision),
            tokens=sizes.tokens,
            camera=self.camera,
        )

    @torch.inference_mode()
    def samples(self, scene: Scene, questions: Sequence[QA]) -> list[Sample]:
        """Each question's prompt, as a scene makes it (`Scene.spliced`); a blind model gets one empty spatial token."""
        spatial = spatial_tokens(self.model, [scene], blind=self.blind)[0]
        # One object for all questions: it remembers what depends on the scene alone.
        if self.blind:
            tokens = SceneTokens(torch.zeros(1, 3), spatial)
        else:
            seen = torch.bincount(scene.voxel, minlength=len(scene.features))
            views = None if scene.where is None else torch.stack([scene.where.view, scene.where.cell], dim=1)
            tokens = SceneTokens(centroids(scene), spatial, seen, views=views)
        return [self.sample(spatial, tokens, qa, None if self.blind else scene.where) for qa in questions]

    @torch.inference_mode()
    def sample(self, spatial: torch.Tensor, tokens: SceneTokens, qa: QA, where: ViewTokens | None = None) -> Sample:
        """The prompt of one question about spatial tokens (M, D), which are `where` in views if they are of these."""
        text, points = parse_clicks(qa.question)
        prompt = self.model.prompt(self.tokenizer, text, n_clicks=len(points))
        clicks = self.model.embed_clicks(torch.tensor(points, dtype=torch.float32).reshape(-1, 3))
        spliced = self.model.splice(prompt, spatial, clicks, where=where)
        return Sample(spliced.embeds, spliced.layout, tokens)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def about(self) -> dict[str, Any]:
        """The model, for the JSON."""
        return {
            "name": self.path.resolve().name,
            "hash": self.model.identity,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": self.n_layers,
            "training": self.training,
        }


def centroids(scene: Scene) -> torch.Tensor:
    """(M, 3) float32 mean of the points of each token, or its place where it has one."""
    if scene.place is not None:
        return scene.place
    count = torch.bincount(scene.voxel, minlength=len(scene.features)).double()
    total = torch.zeros(len(scene.features), 3, dtype=torch.float64).index_add(0, scene.voxel, scene.xyz.double())
    return (total / count[:, None]).float()


def find_rooms(
    reader: Reader,
    folder: Path,
    split: Split,
    questions: int,
    *,
    first: int = 0,
    seed: int = 0,
    per_family: int = 2,
    workers: int = 1,
    progress: Advance = lambda done, total: None,
) -> list[Room]:
    """The rooms from seed `first` on that have so many questions together, made where they are not there yet.

    Raises:
        DataError: if the folder holds scenes of other settings.
    """
    config, rooms, found = reader.scene_config(), list[Room](), 0
    while found < questions:
        start = first + len(rooms)
        count = max(1, math.ceil((questions - found) / _PER_ROOM))
        seeds = range(start, start + count)
        for path in prepare(folder, split, seeds, reader.model.vision, config, progress, workers=workers):
            if found >= questions:
                break
            scene = read_scene(path, split)
            rng = np.random.default_rng([seed, int(path.stem)])
            asked = tuple(generate(scene.room, rng, scene.sights, per_family=per_family))
            rooms.append(Room(path, split, asked, len(scene.features)))
            found += len(asked)
    return rooms


def balanced_rooms(
    reader: Reader,
    folder: Path,
    split: Split,
    *,
    rooms: int,
    per_family: int,
    seed: int = 0,
    most: int = 16,
    workers: int = 1,
    progress: Advance = lambda done, total: None,
) -> list[Room]:
    """The first `rooms` rooms, asked so that every family comes to about `per_family` questions in all.

    Of a family that rooms seldom have a question of, up to `most` are asked in a room that has them; what the rooms so
    far lack, those left are asked for. Some families may stay short of it.

    Raises:
        DataError: if the folder holds scenes of other settings.
    """
    found, asked = list[Room](), dict.fromkeys(FAMILIES, 0)
    paths = prepare(folder, split, range(rooms), reader.model.vision, reader.scene_config(), progress, workers=workers)
    for k, path in enumerate(paths):
        scene = read_scene(path, split)
        rng = np.random.default_rng([seed, int(path.stem)])
        offered = generate(scene.room, rng, scene.sights, per_family=most)
        questions = list[QA]()
        for family in FAMILIES:
            quota = math.ceil((per_family - asked[family]) / (rooms - k))
            chosen = [qa for qa in offered if qa.family == family][: max(0, quota)]
            asked[family] += len(chosen)
            questions += chosen
        found.append(Room(path, split, tuple(questions), len(scene.features)))
    return found


# Several cores ---------------------------------------------------------------------------------------------------


class Workers:
    """Calls functions of (reader, task), in this process or, with a thread and a reader each, in several.

    ray: address of the Ray that has those processes ("local": one of their own), instead of this machine alone.
    """

    def __init__(self, reader: Reader, count: int, console: Console, ray: str | None = None) -> None:
        self._reader, self._count, self._console, self._ray = reader, count, console, ray
        self._spread: Spread[Reader] = Alone(lambda: reader)

    def __enter__(self) -> Workers:
        if self._ray is not None:
            self._spread = Cluster(self._reader.again(), self._count, threads=1, address=self._ray)
        elif self._count > 1:
            self._spread = Processes(self._reader.again(), self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._spread.close()

    def map(
        self,
        what: str,
        function: Callable[[Reader, T], R],
        tasks: Sequence[T],
        each: Callable[[int, R], None] = lambda index, result: None,
    ) -> list[R]:
        """Results in the order of the tasks, with a progress bar. `function` must be one of a module's own.

        each: called with the number of a task and its result, as soon as that and all before it are there.
        """
        found: list[R] = []
        with bar(self._console, what) as advance:
            advance(0, len(tasks))
            for index, result in enumerate(self._spread.map(function, tasks)):
                each(index, result)
                found.append(result)
                advance(len(found), len(tasks))
        return found


@contextmanager
def bar(console: Console, what: str) -> Iterator[Advance]:
    """A progress bar; the function that it gives is called with (done, total)."""
    columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def machine() -> dict[str, Any]:
    """For the JSON."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes what was found, into a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
