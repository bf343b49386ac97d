# SPDX-License-Identifier: Apache-2.0
"""What answers say of themselves, in furnished rooms that change.

A camera goes round a part of a room; then a thing is taken out, another is put elsewhere, and one comes that was not
there before; the camera goes round once more. It never looks where one thing is: frames that would show the thing
that the fewest show are left out. Things are asked about at their place (a click) and by their name. What is right
follows from the instances that the renderer gives: a thing is there; it was seen and its place was seen again without
it; or no frame has a pixel of it. What was seen by less than `MIN_PIXELS` is not asked about. That something has gone
is only asked where `LOOKED_AT` frames show its place without it, and where it is now only where as many show it
there. It was last seen between the last frame that has `MIN_PIXELS` of it and the last one that has any.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.synthetic.camera import intrinsics
from adatoken3d_ros.lab.synthetic.facts import MIN_PIXELS
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, FLOOR, Footprint, Item, placed
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import noisy_depth, orbit
from adatoken3d_ros.scene.evidence import Observed
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.goal import NEAR_CAMERA
from adatoken3d_ros.settings import Settings

WIDTH, HEIGHT = 320, 240
STEP = 1.0  # seconds between two frames
ROUND = 26  # frames of each round: two thirds of the camera's circle
FIRST_ROOM = 8000  # what is decided by numbers was tried on rooms before
PER_ROOM = 10
ELSEWHERE = 1.0  # metres that a thing is moved, at least
CAP_MB = 12.0
ROBOT = 0.25  # metres, its radius
LOOKED_AT = 3  # frames that show a place, at least, if it is to be known what became of it
LEFT_OUT = 1 / 3  # of the frames, at most, for a thing that is never looked at
SETTINGS = {"budget.warm_up": False, "scene.max_views": 60, "scene.min_sharpness": 0.0}


@dataclass
class Asked:
    """A question, what is right, and what came back."""

    question: Question
    right: Observed
    by_name: bool
    last_seen_ns: tuple[int, ...]  # two: by enough pixels, and by any
    moved_to: NDArray[np.float64] | None = None
    added: bool = False
    answer: Answer | None = None


@dataclass
class Story:
    """A room, how it became, the frames of both rounds, which of them are left out, and what the others show."""

    before: FurnishedRoom
    after: FurnishedRoom
    removed: Item
    moved: tuple[Item, Item] | None
    added: int | None = None  # the instance of what comes
    frames: list[PosedFrame] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    pixels: list[dict[int, int]] = field(default_factory=list)  # of each thing in each frame
    shown: list[dict[int, NDArray[np.float64]]] = field(default_factory=list)  # points of those with enough of them
    would: list[dict[int, int]] = field(default_factory=list)  # pixels of each thing as if nothing had changed

    @property
    def taken(self) -> list[PosedFrame]:
        """The frames that the scene is shown."""
        return [frame for n, frame in enumerate(self.frames) if n not in self.left_out]


def with_items(room: FurnishedRoom, items: list[Item]) -> FurnishedRoom:
    return replace(room, items=tuple(replace(item, instance=FIRST_ITEM + k) for k, item in enumerate(items)))


def free_place(room: FurnishedRoom, item: Item, rng: np.random.Generator) -> Item | None:
    """The item at another place on the floor, off every other; None where none was found."""
    own = item.footprint
    others = [other.footprint for other in room.items if other is not item]
    for _ in range(200):
        x, y = (float(rng.uniform(-1, 1) * (side / 2 - max(own.hx, own.hy) - 0.1)) for side in room.size[:2])
        box = Footprint(x, y, own.hx, own.hy, item.yaw, own.z0, own.z1)
        far = math.hypot(x - own.x, y - own.y) > ELSEWHERE
        if far and not any(box.overlaps(other, 0.1) for other in others):
            return placed(
                item.instance, item.model, item.colour, None, (x, y, item.position[2]), item.yaw, item.scale, FLOOR
            )
    return None


def tell_story(seed: int) -> Story | None:
    """A room that changes; None where nothing can be taken out."""
    room, rng = make_room(seed, "test"), np.random.default_rng(seed)
    supports = {item.supported_by for item in room.items}
    loose = [i for i in room.items if i.supported_by == FLOOR and i.instance not in supports]
    alone = [item for item in loose if max(item.size) < 1.3 and min(item.size) > 0.2]
    if len(alone) < 2:
        return None
    removed, moving, *more = (alone[i] for i in rng.permutation(len(alone)))
    added = more[0] if more else None
    left = [item for item in room.items if item is not removed]
    elsewhere = free_place(with_items(room, left), moving, rng)
    moved = None if elsewhere is None else (moving, elsewhere)
    # Instances keep their numbers: what has gone is moved under the floor, where no camera sees it.
    before = tuple(_below(item) if item is added else item for item in room.items)
    after = [_below(item) if item is removed else item for item in room.items]
    if elsewhere is not None:
        after = [elsewhere if item is moving else item for item in after]
    story = Story(
        replace(room, items=before),
        replace(room, items=tuple(after)),
        removed,
        moved,
        None if added is None else added.instance,
    )
    K = intrinsics(WIDTH, HEIGHT)
    first, second = Renderer(story.before), Renderer(story.after)
    for index in range(2 * ROUND):
        again = index >= ROUND
        pose = orbit(room, STEP * (index % ROUND) + (0.5 if again else 0.0))
        rgb, depth, ids = (second if again else first).render(K, WIDTH, HEIGHT, pose)
        stamp = int((index + 1) * STEP * 1e9)
        story.frames.append(PosedFrame(rgb, noisy_depth(depth, rng), K, pose, stamp))
        story.pixels.append(_pixels(ids))
        story.shown.append(_points(ids, depth, K, pose))
        story.would.append(_pixels(first.instances(K, WIDTH, HEIGHT, pose)) if again else {})
    _look_away(story)
    return story


def _below(item: Item) -> Item:
    """The item under the floor."""
    return placed(item.instance, item.model, item.colour, None, (0, 0, -5.0), 0.0, item.scale, FLOOR)


def _look_away(story: Story) -> None:
    """Leaves out the frames that show the thing that the fewest show, where they are few enough."""
    changed = {story.removed.instance, story.added} | ({story.moved[0].instance} if story.moved else set())
    showing = {
        item.instance: {n for n, pixels in enumerate(story.pixels) if item.instance in pixels}
        for item in story.before.items
        if item.instance not in changed
    }
    fewest = min(showing.values(), key=len, default=set())
    if len(fewest) <= LEFT_OUT * len(story.frames):
        story.left_out = fewest
        for n in fewest:
            story.pixels[n], story.shown[n], story.would[n] = {}, {}, {}


def _pixels(ids: NDArray[np.int16]) -> dict[int, int]:
    values, counts = np.unique(ids, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _points(
    ids: NDArray[np.int16], depth: NDArray[np.float32], K: NDArray[np.float64], T: NDArray[np.float64]
) -> dict[int, NDArray[np.float64]]:
    """Points of what is shown by enough pixels, by instance."""
    found = {}
    for instance, pixels in _pixels(ids).items():
        if instance >= FIRST_ITEM and pixels >= MIN_PIXELS:
            v, u = np.nonzero(ids == instance)
            z = depth[v, u]
            camera = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z], axis=1)
            found[instance] = camera @ T[:3, :3].T + T[:3, 3]
    return found


def ask_about(story: Story, rng: np.random.Generator) -> list[Asked]:
    """Questions about what was seen, has gone, has moved, has come, and was never looked at; what has come first."""
    changed = {story.removed.instance}
    if story.moved is not None:
        changed.add(story.moved[0].instance)
    kinds = defaultdict(list)
    for item in story.before.items:
        kinds[item.kind].append(item)
    seen = {instance for pixels in story.pixels for instance in pixels}
    asked = []
    for item in story.before.items:
        i = item.instance
        first = [n for n in range(ROUND) if i in story.shown[n]]
        second = [n for n in range(ROUND, 2 * ROUND) if i in story.shown[n]]
        again = [n for n in range(ROUND, 2 * ROUND) if story.would[n].get(i, 0) >= 2 * MIN_PIXELS]
        moved_to, added = None, i == story.added
        if added and len(second) < LOOKED_AT:
            continue
        if i in changed:
            if not first or len(again) < LOOKED_AT:
                continue
            last, right = first[-1], Observed.SEEN_THEN_GONE
            if story.moved is not None and i == story.moved[0].instance and len(second) >= LOOKED_AT:
                moved_to = story.moved[1].centre
            points = story.shown[first[-1]][i]
        elif first or second:
            last, right = (first + second)[-1], Observed.SEEN
            points = story.shown[last][i]
        elif i not in seen:
            last, right, points = -1, Observed.NOT_OBSERVED, item.vertices.astype(np.float64)
        else:
            continue
        before = ROUND if i in changed else 2 * ROUND
        shown = max((n for n in range(before) if i in story.pixels[n]), default=-1)
        stamp = tuple(story.frames[n].stamp_ns if n >= 0 else 0 for n in (last, shown))
        middle = points[int(np.linalg.norm(points - np.median(points, axis=0), axis=1).argmin())]
        asked.append(Asked(Question("What is this?", middle[None]), right, False, stamp, moved_to, added))
        if len(kinds[item.kind]) == 1 and moved_to is None:
            asked.append(Asked(Question(f"What colour is the {item.kind}?"), right, True, stamp, added=added))
    order = sorted(rng.permutation(len(asked)), key=lambda n: not asked[n].added)
    wanted = {Observed.SEEN: 4, Observed.SEEN_THEN_GONE: 4, Observed.NOT_OBSERVED: 2}
    chosen = []
    for n in order:
        if wanted[asked[n].right]:
            wanted[asked[n].right] -= 1
            chosen.append(asked[n])
    return chosen[:PER_ROOM]


def show(
    engine: Engine,
    frames: list[PosedFrame],
    changes: Mapping[str, Any],
    *,
    bare: bool = False,
    parts: Mapping[str, list[float]] | None = None,
) -> tuple[Scene, list[float], int]:
    """A scene that has been shown the frames, milliseconds of each key frame, and how often it was over its cap.

    Args:
        bare: it does not note where it looked and what has gone.
        parts: gets the milliseconds of each time that free space is kept up and that something is taken out.
    """
    scene = open_scene(engine, Settings({**SETTINGS, **changes}))
    if parts is not None:
        _time(scene.memory.past.occupancy, "look", parts["occupancy_ms"])
        _time(scene.memory, "_carve", parts["carving_ms"])
    if bare:
        for name in ("look", "went", "came"):
            setattr(scene.memory.past, name, lambda *_, **__: None)
    times, over = [], 0
    for frame in frames:
        begin = time.process_time()
        kept = scene.observe(frame).value == "key_frame"
        scene.encode_pending()
        if kept:
            times.append(1e3 * (time.process_time() - begin))
        limit = scene.config.memory_limit_mb * 1e6
        over += bool(limit) and scene.nbytes > limit
    return scene, times, over


def _time(owner: Any, name: str, times: list[float]) -> None:
    """Has a method of an object note how many milliseconds it takes."""
    method = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.process_time()
        try:
            return method(*args, **options)
        finally:
            times.append(1e3 * (time.process_time() - begin))

    setattr(owner, name, timed)


def measure_memory(questions: int) -> dict[str, Any]:
    """The figures over as many rooms as so many questions take."""
    engine = load_engine(Settings(SETTINGS))
    asked: list[tuple[Asked, Story]] = []
    times: list[float] = []
    bare: list[float] = []
    parts: dict[str, list[float]] = {"occupancy_ms": [], "carving_ms": []}
    over = 0
    seeds = iter(range(FIRST_ROOM, FIRST_ROOM + 10 * questions))
    progress = iter(track(range(questions), "questions", transient=True))
    while len(asked) < questions:
        seed = next(seeds)
        story = tell_story(seed)
        if story is None:
            continue
        scene, took, _ = show(engine, story.taken, {}, parts=parts)
        times += took
        if len(bare) < 100:
            bare += show(engine, story.taken, {}, bare=True)[1]
            over += show(engine, story.taken, {"memory.limit_mb": CAP_MB})[2]
        for item in ask_about(story, np.random.default_rng(seed))[: questions - len(asked)]:
            item.answer = engine.ask(scene, item.question)
            asked.append((item, story))
            next(progress, None)
    costs = _costs(times, bare) | {name: statistics.median(values) for name, values in parts.items()}
    return {**figures(asked), **costs, "memory_over_cap": over}


def _costs(times: list[float], bare: list[float]) -> dict[str, float]:
    ours, without = statistics.median(times), statistics.median(bare)
    return {"key_frame_ms": ours, "key_frame_ms_without": without, "key_frame_ratio": ours / without}


def figures(asked: list[tuple[Asked, Story]]) -> dict[str, Any]:
    """What became of the questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    seen_error, moved, false_gone, goals, given = [], [], [], [], []
    missed = {"not_gone": 0, "no_tombstone": 0, "not_linked": 0, "linked_elsewhere": 0}
    for item, story in asked:
        answer = item.answer
        assert answer is not None
        # What is asked about by its name has moved if it stands elsewhere now.
        ok = answer.verdict == item.right
        right["all"].append(ok)
        right["by_name" if item.by_name else "at_place"].append(ok)
        right[f"{'by_name' if item.by_name else 'at_place'}_{item.right.name.lower()}"].append(ok)
        if item.added:
            right["by_name_come" if item.by_name else "at_place_come"].append(ok)
        if item.right is Observed.SEEN:
            false_gone.append(answer.verdict is Observed.SEEN_THEN_GONE)
        gone = [e for e in answer.evidence if e.gone_ns]
        if item.right is Observed.SEEN_THEN_GONE and ok and gone:
            seen_error.append(_off(gone[0].last_ns, item.last_seen_ns))
        elif item.right is Observed.SEEN and ok and answer.evidence and not item.by_name:
            seen_error.append(_off(answer.evidence[0].last_ns, item.last_seen_ns))
        if item.moved_to is not None and not item.by_name:
            found = [e.moved_to for e in gone if e.moved_to is not None]
            moved.append(bool(found) and float(np.linalg.norm(np.array(found[0]) - item.moved_to)) < 0.5)
            if not moved[-1]:
                why = "linked_elsewhere" if found else "not_linked" if gone else "no_tombstone"
                missed[why if ok else "not_gone"] += 1
        if ok and item.right is not Observed.NOT_OBSERVED:
            given.append(answer.goal is not None)
            if answer.goal is not None:
                goals.append(reachable(story.after, answer.goal, story.taken[-1].T_world_camera[:3, 3], ROBOT))
    return {
        "questions": len(asked),
        "verdict_accuracy": _mean(right["all"]),
        "verdicts": {name: _mean(values) for name, values in sorted(right.items())},
        "counts": {name: len(values) for name, values in sorted(right.items())},
        "last_seen_error_s": float(np.percentile(seen_error, 95)) if seen_error else math.nan,
        "key_frame_interval_s": STEP,
        "moved_found": _mean(moved),
        "moved_asked": len(moved),
        "moved_missed": missed,
        "false_gone": _mean(false_gone),
        "goal_reachable": _mean(goals),
        "goal_given": _mean(given),
    }


def reachable(room: FurnishedRoom, goal: NDArray[np.float64], camera: NDArray[np.float64], radius: float) -> bool:
    """Whether a robot of this radius and 1 m height stands there without touching a thing or a wall, and gets there
    from below the camera over places where it does not either.

    Where it could not stand below the camera, which hangs over a thing, it comes from any place within `NEAR_CAMERA`.
    """
    boxes = [item.footprint for item in room.items if item.low[2] < 1.0 and item.high[2] > 0.05]
    edge = 0.1
    x, y = (np.arange(-side / 2 + radius, side / 2 - radius, edge) for side in room.size[:2])
    free = np.array([[all(box.distance(a, b) >= radius for box in boxes) for b in y] for a in x])
    fx, fy = goal[:2, 3]
    inside = abs(fx) <= room.size[0] / 2 - radius and abs(fy) <= room.size[1] / 2 - radius
    if not inside or not all(box.distance(fx, fy) >= radius for box in boxes):
        return False
    label = cv2.connectedComponents(free.astype(np.uint8))[1]
    cells = np.argwhere(free)
    places = np.stack([x[cells[:, 0]], y[cells[:, 1]]], axis=1)
    end = cells[int(np.linalg.norm(places - goal[:2, 3], axis=1).argmin())]
    away = np.linalg.norm(places - camera[:2], axis=1)
    starts = cells[away <= (away.min() if away.min() <= edge else NEAR_CAMERA)]
    return bool(label[tuple(end)] in label[tuple(starts.T)])


def _off(said: int, ends: tuple[int, ...]) -> float:
    """Seconds by which a time, nanoseconds, lies before the first or after the second of two."""
    return max(0, ends[0] - said, said - ends[1]) / 1e9


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else math.nan
