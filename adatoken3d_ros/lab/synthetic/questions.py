# SPDX-License-Identifier: Apache-2.0
"""Questions about a furnished room with exact answers, worded several ways.

Nothing ambiguous is asked: things are named only where the name fits one thing of the whole room, close calls are left
out, and every thing a question is about must be seen well enough. Answers are balanced within each family, and as far
as that can be done within each class, so that neither the most frequent answer nor a class's habits ("tables exist,
refrigerators are tall") are of use without looking.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furnished import (
    FIRST_ITEM,
    FLOOR,
    SEEDS_PER_SPLIT,
    WALL,
    FurnishedRoom,
    Item,
    Split,
    draw_scale,
    make_room,
)
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS, models_of
from adatoken3d_ros.lab.synthetic.views import Sight

FAMILIES = (
    "existence",
    "count",
    "colour",
    "class",
    "nearest",
    "on",
    "direction",
    "closer",
    "taller",
    "larger",
    "distance",
    "box",
)
DIRECTIONS = ("front", "left", "behind", "right")  # counter-clockwise from where one faces
MIN_PIXELS = 120  # of 320 x 240, in the view that shows most of it
_MAX_COUNT = 6
_MAX_DISTANCE = 6.0  # metres
_PLURALS = {"bookshelf": "bookshelves", "box": "boxes", "bench": "benches", "person": "people", "radio": "radios"}

WORDINGS: dict[str, tuple[str, ...]] = {
    "existence": (
        "Is there {a} in the room?",
        "Can you see {a}?",
        "Does this room have {a}?",
        "Is {a} anywhere in this room?",
        "Do you see {a} here?",
    ),
    "existence on": (
        "Is there {a} on {x}?",
        "Does {a} stand on {x}?",
        "Can you see {a} on top of {x}?",
        "Is {a} placed on {x}?",
    ),
    "count": (
        "How many {a} are there?",
        "How many {a} are in the room?",
        "Count the {a}.",
        "What is the number of {a} in this room?",
        "How many {a} can you see?",
    ),
    "colour": (
        "What colour is {x}?",
        "What is the colour of {x}?",
        "Which colour does {x} have?",
        "Tell me the colour of {x}.",
        "What color is {x}?",
    ),
    "class": (
        "What is the object at {p}?",
        "What is located at {p}?",
        "Which object is at {p}?",
        "What kind of thing is at {p}?",
        "Name the object at {p}.",
    ),
    "nearest": (
        "What is closest to {x}?",
        "Which object is nearest to {x}?",
        "What is the nearest thing to {x}?",
        "Which object stands closest to {x}?",
        "What is right by {x}, nearer than anything else?",
    ),
    "on": (
        "What is on {x}?",
        "What is on top of {x}?",
        "Which object stands on {x}?",
        "What has been put on {x}?",
        "What can be found on {x}?",
    ),
    "on below": (
        "What is {x} standing on?",
        "What does {x} stand on?",
        "On what has {x} been put?",
        "What is under {x}?",
    ),
    "direction": (
        "{s} facing {a}. Where is {b}?",
        "{s} facing {a}. In which direction is {b}?",
        "{s} looking at {a}. On which side of me is {b}?",
        "{s} looking towards {a}. Is {b} to my left, to my right, in front of me or behind me?",
        "{s} facing {a}. Which way do I turn to see {b}: left, right, front or behind?",
    ),
    "closer": (
        "Which is closer to {x}, {a} or {b}?",
        "What is nearer to {x}: {a} or {b}?",
        "Is {a} or {b} closer to {x}?",
        "Of {a} and {b}, which is nearer to {x}?",
    ),
    "taller": (
        "Which is taller, {a} or {b}?",
        "What is taller: {a} or {b}?",
        "Is {a} or {b} the taller one?",
        "Of {a} and {b}, which is taller?",
    ),
    "larger": (
        "Which is larger, {a} or {b}?",
        "What is bigger: {a} or {b}?",
        "Is {a} or {b} the larger one?",
        "Of {a} and {b}, which is bigger?",
    ),
    "distance": (
        "How far apart are {a} and {b}, to the nearest half metre?",
        "What is the distance between {a} and {b} in metres, rounded to half metres?",
        "How many metres is {a} from {b}, to the nearest half metre?",
        "To the nearest half metre, how far is it from the middle of {a} to the middle of {b}?",
    ),
    "box": (
        "What is the 3D bounding box of the object at {p}?",
        "Give the 3D box of the object at {p}.",
        "Output the bounding box of what is at {p}.",
        "Which box encloses the object at {p}?",
    ),
}
STANDPOINTS: dict[str, tuple[str, ...]] = {
    "middle": ("I am standing in the middle of the room,", "Standing in the centre of the room, I am"),
    "point": ("I am standing at {p},", "From {p}, I am"),
    "beside": ("I am standing right by {s},", "Standing next to {s}, I am"),
}


@dataclass(frozen=True, eq=False)
class QA:
    """A question and its answer.

    Attributes:
        family: one of FAMILIES.
        question: plain text; points are written in it as [x, y, z], metres, world frame.
        answer: what has to be said, to the letter.
        clicks: (n, 3) float64: the points of the question, in order.
        box: (cx, cy, cz, dx, dy, dz) where the answer is a box, unrounded.
        about: instances of the items that decide the answer, for losses on the tokens that show them.
    """

    family: str
    question: str
    answer: str
    clicks: NDArray[np.float64]
    box: tuple[float, ...] | None = None
    about: tuple[int, ...] = ()


@dataclass
class _Text:
    """Fills a wording and collects the points that are written in it."""

    rng: np.random.Generator
    template: str
    words: dict[str, str | NDArray[np.float64]] = field(default_factory=dict)

    def qa(self, family: str, answer: str, about: Sequence[Item], box: tuple[float, ...] | None = None) -> QA:
        clicks: list[list[float]] = []
        text = ""
        for piece, name in _split(self.template):
            text += piece
            word = self.words.get(name, "")
            if isinstance(word, str):
                text += word
                continue
            point = [round(float(v), 2) + 0.0 for v in word]  # + 0.0 makes a -0.0 a 0.0
            clicks.append(point)
            text += f"[{point[0]:.2f}, {point[1]:.2f}, {point[2]:.2f}]"
        text = text[0].upper() + text[1:]
        return QA(
            family,
            text,
            answer,
            np.array(clicks, np.float64).reshape(-1, 3),
            box,
            tuple(dict.fromkeys(i.instance for i in about)),
        )


def _split(template: str) -> list[tuple[str, str]]:
    """[(text, name of the gap after it or ""), ...]."""
    found: list[tuple[str, str]] = []
    for piece in template.split("{"):
        if "}" in piece:
            name, rest = piece.split("}", 1)
            found[-1] = (found[-1][0], name)
            found.append((rest, ""))
        else:
            found.append((piece, ""))
    return found


def article(kind: str) -> str:
    """The class with its indefinite article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def plural(kind: str) -> str:
    """The class's plural."""
    return _PLURALS.get(kind, f"{kind}s")


def box_text(item: Item) -> str:
    """An item's box as answers give it: "[cx, cy, cz, dx, dy, dz]" in metres with two decimals."""
    numbers = [round(float(v), 2) + 0.0 for v in (*item.centre, *item.size)]
    return "[" + ", ".join(f"{v:.2f}" for v in numbers) + "]"


def generate(
    room: FurnishedRoom,
    rng: np.random.Generator,
    visible: Mapping[int, Sight] | None = None,
    *,
    per_family: int = 2,
    families: Sequence[str] = FAMILIES,
    min_pixels: int = MIN_PIXELS,
) -> list[QA]:
    """Up to `per_family` questions of each family, fewer where the room has no more that are clear.

    Args:
        visible: from `views.sights`, for the views that the answerer is given; None: everything is seen from all sides.
        min_pixels: in the best view, for an item to be asked about.

    Raises:
        ValueError: for an unknown family.
    """
    unknown = [f for f in families if f not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown families {unknown}, known: {', '.join(FAMILIES)}")
    asker = _Asker(room, rng, visible, min_pixels)
    found: list[QA] = []
    for family in families:
        seen: set[tuple[str, tuple[int, ...]]] = set()
        for _ in range(2 * per_family):
            if len(seen) >= per_family:
                break
            qa = asker.ask(family)
            if qa is None or qa.about and (qa.answer, qa.about) in seen:
                continue
            seen.add((qa.answer, qa.about or (-len(seen),)))
            found.append(qa)
    return found


@functools.lru_cache(maxsize=2)
def presence(held_out: bool) -> Mapping[str, float]:
    """In which part of the rooms each class is, by a sample of rooms from the end of the seeds (once, a second)."""
    split: Split = "test_unseen" if held_out else "train"
    rooms = 240
    counts: Counter[str] = Counter()
    for k in range(rooms):
        counts.update({i.kind for i in make_room(SEEDS_PER_SPLIT - 1 - k, split).items})
    return {kind: min(max(counts[kind], 1) / rooms, 0.9) for kind in KINDS if models_of(kind, held_out=held_out)}


def taller(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether things of sizes a (..., 3) are clearly taller than things of sizes b (..., 3)."""
    return a[..., 2] > 1.15 * b[..., 2] + 0.03


def larger(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether things of sizes a (..., 3) are larger than those of sizes b, by volume and by the longest side."""
    return (a.prod(axis=-1) > 1.5 * b.prod(axis=-1)) & (a.max(axis=-1) > 1.1 * b.max(axis=-1))


_MEASURES = {"taller": taller, "larger": larger}


@functools.lru_cache(maxsize=200)
def _sizes(kind: str) -> NDArray[np.float64]:
    """(60, 3) sizes that things of the class have in training rooms."""
    rng = np.random.default_rng(0)
    models = models_of(kind, held_out=False)
    return np.array([np.array(models[k % len(models)].size) * draw_scale(kind, rng) for k in range(60)])


@functools.lru_cache(maxsize=20000)
def _prior(measure: str, first: str, second: str) -> float:
    """How often something of the first class is the taller or larger one, where that is clear, in training rooms."""
    a, b = _sizes(first)[:, None], _sizes(second)[None]
    wins, losses = (float(_MEASURES[measure](*pair).mean()) for pair in ((a, b), (b, a)))
    return wins / (wins + losses) if wins + losses > 0 else 0.5


class _Asker:
    """The questions of one room."""

    def __init__(
        self,
        room: FurnishedRoom,
        rng: np.random.Generator,
        visible: Mapping[int, Sight] | None,
        min_pixels: int,
    ) -> None:
        self.room = room
        self.rng = rng
        self.sights = visible
        self.min_pixels = min_pixels
        self.items = room.items
        self.seen = [i for i in room.items if self.is_seen(i)]
        self.held_out = room.split == "test_unseen"
        self.kinds = Counter(i.kind for i in room.items)
        self.groups = Counter(KINDS[i.kind].group for i in room.items if KINDS[i.kind].group)
        low = np.array([i.low for i in room.items]).reshape(-1, 3)
        high = np.array([i.high for i in room.items]).reshape(-1, 3)
        apart = np.maximum(np.maximum(low[:, None] - high[None], low[None] - high[:, None]), 0)
        self._gaps = np.linalg.norm(apart, axis=2).tolist()
        self._middles = np.linalg.norm((low + high)[:, None] / 2 - (low + high)[None] / 2, axis=2).tolist()
        self.names = {i.instance: self.references(i) for i in self.seen}

    # --- what can be said of an item ---------------------------------------------------------------------------------

    def is_seen(self, item: Item) -> bool:
        return self.sights is None or (
            item.instance in self.sights and self.sights[item.instance].pixels >= self.min_pixels
        )

    def is_seen_whole(self, item: Item) -> bool:
        """Whether the views show the item from end to end."""
        if self.sights is None:
            return True
        sight = self.sights[item.instance]
        return bool(((sight.high - sight.low) >= 0.75 * item.size - 0.02).all())

    def clear_kind(self, kind: str) -> bool:
        """Whether nothing else in the room can be taken for one of this class."""
        group = KINDS[kind].group
        return not group or self.groups[group] == self.kinds[kind]

    def references(self, item: Item) -> list[str]:
        """The names that fit this item alone, without and then with its colour."""
        names = []
        if self.kinds[item.kind] == 1 and self.clear_kind(item.kind):
            names.append(f"the {item.kind}")
        if item.colour is not None:
            group = KINDS[item.kind].group
            alike = [i for i in self.items if i.kind == item.kind or (group and KINDS[i.kind].group == group)]
            if sum(item.colour in i.looks for i in alike) == 1:
                names.append(f"the {item.colour} {item.kind}")
        return names

    def name(self, item: Item) -> str:
        names = self.names[item.instance]
        return names[int(self.rng.integers(len(names)))]

    def named(self) -> list[Item]:
        return [i for i in self.seen if self.names[i.instance]]

    def point_on(self, item: Item) -> NDArray[np.float64]:
        """A point of the item's visible surface, metres with two decimals, off where it meets what it stands on."""
        above = [i for i in self.items if i.supported_by == item.instance]
        for _ in range(20):
            point = self.any_point_on(item)
            if point[2] < item.low[2] + min(0.01, 0.2 * item.size[2]):
                continue
            if not any(
                (point > np.array(i.low) - 0.02).all() and (point < np.array(i.high) + 0.02).all() for i in above
            ):
                break
        return point

    def any_point_on(self, item: Item) -> NDArray[np.float64]:
        if self.sights is not None:
            points = self.sights[item.instance].points
            return np.round(points[int(self.rng.integers(len(points)))].astype(np.float64), 2)
        share = np.cumsum(item.model.areas)
        face = item.model.faces[int(np.searchsorted(share, self.rng.random() * share[-1], side="right"))]
        a, b = np.sort(self.rng.random(2))
        corners = item.vertices[face].astype(np.float64)
        return np.round(corners[0] * a + corners[1] * (b - a) + corners[2] * (1 - b), 2)

    def middle(self, a: Item, b: Item) -> float:
        """Between the middles of two items, metres."""
        return self._middles[a.instance - FIRST_ITEM][b.instance - FIRST_ITEM]

    def gap(self, a: Item, b: Item) -> float:
        """Between the boxes of two items, metres."""
        return self._gaps[a.instance - FIRST_ITEM][b.instance - FIRST_ITEM]

    # --- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, items: Sequence[Item], weight: Callable[[Item], float] | None = None) -> Item:
        weights = np.array([weight(i) if weight else 1.0 for i in items])
        return items[int(self.rng.choice(len(items), p=weights / weights.sum()))]

    def rarity(self, item: Item) -> float:
        """Weight that makes all classes as frequent over many rooms; several of a kind count once."""
        return 1 / presence(self.held_out).get(item.kind, 1.0) / self.kinds[item.kind]

    def pick_answer(self, options: Mapping[str, list], weights: Mapping[str, float] | None = None) -> str | None:
        """An answer among those that this room offers, each as likely (or by weight)."""
        answers = [a for a in options if options[a]]
        if not answers:
            return None
        weight = np.array([weights.get(a, 1.0) if weights else 1.0 for a in answers])
        return answers[int(self.rng.choice(len(answers), p=weight / weight.sum()))]

    def text(self, wording: str, **words: str | NDArray[np.float64]) -> _Text:
        templates = WORDINGS[wording]
        return _Text(self.rng, templates[int(self.rng.integers(len(templates)))], dict(words))

    def ask(self, family: str) -> QA | None:
        """One question of the family, or None where chance or the room has none."""
        method: Callable[[], QA | None] = getattr(self, f"ask_{family}")
        return method()

    # --- the families ------------------------------------------------------------------------------------------------

    def ask_existence(self) -> QA | None:
        yes = bool(self.rng.random() < 0.5)
        draw = self.rng.random()
        if draw < 0.3:
            return self.existence_on(yes)
        if draw < 0.55:
            return self.existence_coloured(yes)
        known = presence(self.held_out)
        if yes:
            if not self.seen:
                return None
            item = self.choose(self.seen, self.rarity)
            return self.text("existence", a=article(item.kind)).qa("existence", "yes", [item])
        groups = {KINDS[k].group for k in self.kinds} - {""}
        absent = [k for k in known if k not in self.kinds and KINDS[k].group not in groups]
        if not absent:
            return None
        weight = np.array([1 / (1 - known[k]) for k in absent])
        kind = absent[int(self.rng.choice(len(absent), p=weight / weight.sum()))]
        return self.text("existence", a=article(kind)).qa("existence", "no", [])

    def existence_coloured(self, yes: bool) -> QA | None:
        """ "Is there a red chair?" in a room with chairs."""
        coloured = [i for i in self.seen if i.colour is not None]
        if not coloured:
            return None
        item = self.choose(coloured, self.rarity)
        colour = item.colour
        assert colour is not None
        if not yes:
            group = KINDS[item.kind].group
            alike = [i for i in self.items if i.kind == item.kind or (group and KINDS[i.kind].group == group)]
            free = [c for c in COLOURS if not any(c in i.looks for i in alike)]
            if not free:
                return None
            colour = free[int(self.rng.integers(len(free)))]
        thing = f"{colour} {item.kind}"
        return self.text("existence", a=article(thing)).qa("existence", "yes" if yes else "no", [item])

    def existence_on(self, yes: bool) -> QA | None:
        """ "Is there a mug on the table?" in a room with a mug and a table with something on it."""
        above = [i for i in self.seen if i.supported_by > FLOOR and i.supported_by in self.names]
        pairs = []
        for item in above:
            for carrier in self.named():
                if carrier.instance not in {i.supported_by for i in above}:
                    continue
                on_it = [i.kind for i in self.items if i.supported_by == carrier.instance]
                group = KINDS[item.kind].group
                alike = any(k == item.kind or (group and KINDS[k].group == group) for k in on_it)
                if (item.supported_by == carrier.instance) if yes else not alike:
                    pairs.append((item, carrier))
        if not pairs:
            return None
        item, carrier = pairs[int(self.rng.integers(len(pairs)))]
        text = self.text("existence on", a=article(item.kind), x=self.name(carrier))
        return text.qa("existence", "yes" if yes else "no", [item, carrier])

    def ask_count(self) -> QA | None:
        # Classes that come alone or in numbers; and every one of them must be seen.
        options: dict[str, list[str]] = {}
        for kind, number in self.kinds.items():
            if KINDS[kind].place not in ("free", "top", "window") and kind not in ("nightstand",):
                continue
            if number > _MAX_COUNT or not self.clear_kind(kind):
                continue
            if sum(i.kind == kind for i in self.seen) == number:
                options.setdefault(str(number), []).append(kind)
        answer = str(int(self.rng.choice([1, 2, 3, 4, 5, 6], p=[0.08, 0.13, 0.2, 0.23, 0.18, 0.18])))
        kinds = options.get(answer)
        if not kinds:
            return None
        kind = kinds[int(self.rng.integers(len(kinds)))]
        return self.text("count", a=plural(kind)).qa("count", answer, [i for i in self.items if i.kind == kind])

    def ask_colour(self) -> QA | None:
        coloured = [i for i in self.seen if i.colour is not None]
        if not coloured:
            return None
        item = self.choose(coloured, self.rarity)
        assert item.colour is not None
        plain = [n for n in self.names[item.instance] if item.colour not in n.split()]
        if plain and self.rng.random() < 0.6:
            return self.text("colour", x=plain[0]).qa("colour", item.colour, [item])
        text = self.text("colour", p=self.point_on(item))
        text.template = text.template.replace("{x}", "the object at {p}")
        return text.qa("colour", item.colour, [item])

    def ask_class(self) -> QA | None:
        if not self.seen:
            return None
        item = self.choose(self.seen, self.rarity)
        return self.text("class", p=self.point_on(item)).qa("class", item.kind, [item])

    def ask_nearest(self) -> QA | None:
        options: dict[str, list[tuple[Item, Item]]] = {}
        for item in self.named():
            # What stands on something, or carries something, has its nearest neighbour above or below: not asked.
            if item.supported_by > FLOOR + 2 or any(i.supported_by == item.instance for i in self.items):
                continue
            others = [i for i in self.items if i is not item]
            gaps = sorted((self.gap(item, i), k) for k, i in enumerate(others))
            middles = sorted((self.middle(item, i), k) for k, i in enumerate(others))
            near = others[gaps[0][1]]
            if others[middles[0][1]].kind != near.kind or near not in self.seen or near.kind == item.kind:
                continue
            group = KINDS[near.kind].group
            rivals = [k for k, i in enumerate(others) if i.kind != near.kind]
            rival_gap = min((g for g, k in gaps if k in rivals), default=math.inf)
            rival_middle = min((d for d, k in middles if k in rivals), default=math.inf)
            if rival_gap < gaps[0][0] + 0.15 or rival_middle < 1.2 * middles[0][0]:
                continue
            if group and any(KINDS[others[k].kind].group == group for k in rivals if self.gap(item, others[k]) < 1.0):
                continue
            options.setdefault(near.kind, []).append((item, near))
        known = presence(self.held_out)
        answer = self.pick_answer(options, {k: 1 / known.get(k, 1.0) for k in options})
        if answer is None:
            return None
        # A class that is often the nearest (doors, chairs) is asked for less often than it could be.
        if self.rng.random() < min(0.8, max(0.0, known.get(answer, 0.0) - 0.2)):
            return None
        item, near = options[answer][int(self.rng.integers(len(options[answer])))]
        return self.text("nearest", x=self.name(item)).qa("nearest", answer, [item, near])

    def ask_on(self) -> QA | None:
        if self.rng.random() < 0.4:
            return self.on_below()
        options: dict[str, list[tuple[Item, list[Item]]]] = {}
        for carrier in self.named():
            on_it = [i for i in self.items if i.supported_by == carrier.instance]
            if on_it and len({i.kind for i in on_it}) == 1 and all(self.is_seen(i) for i in on_it):
                options.setdefault(on_it[0].kind, []).append((carrier, on_it))
        known = presence(self.held_out)
        answer = self.pick_answer(options, {k: 1 / known.get(k, 1.0) for k in options})
        if answer is None:
            return None
        carrier, on_it = options[answer][int(self.rng.integers(len(options[answer])))]
        return self.text("on", x=self.name(carrier)).qa("on", answer, [carrier, *on_it])

    def on_below(self) -> QA | None:
        """What something stands on: furniture, or the floor for what could have stood on furniture."""
        options: dict[str, list[tuple[Item, list[Item]]]] = {}
        for item in self.named():
            if KINDS[item.kind].place != "top":
                continue
            if item.supported_by == FLOOR:
                options.setdefault("floor", []).append((item, [item]))
            elif item.supported_by in self.names:
                carrier = self.room.item(item.supported_by)
                options.setdefault(carrier.kind, []).append((item, [item, carrier]))
        answer = self.pick_answer(options, {"floor": 0.5, "table": 0.6, "desk": 0.6})
        if answer is None:
            return None
        item, about = options[answer][int(self.rng.integers(len(options[answer])))]
        return self.text("on below", x=self.name(item)).qa("on", answer, about)

    def ask_direction(self) -> QA | None:
        named = self.named()
        if len(named) < 2:
            return None
        kind, wanted = self.standpoint_kind(named), DIRECTIONS[int(self.rng.integers(4))]
        for _ in range(40):
            place, spots, beside = self.standpoint(kind, named)
            if any(i.footprint.distance(*spots[0]) < 0.2 for i in self.items if kind == "point"):
                continue
            others = [i for i in named if i is not beside]
            if len(others) < 2:
                continue
            faced = others[int(self.rng.integers(len(others)))]
            # What is close to the thing that one faces is in front: nobody needs to look.
            apart = [i for i in others if np.hypot(*(i.centre - faced.centre)[:2]) > 0.8]
            matching = [i for i in apart if all(side_of(spot, faced, i) == wanted for spot in spots)]
            if not matching:
                continue
            target = matching[int(self.rng.integers(len(matching)))]
            text = self.text("direction", a=self.name(faced), b=self.name(target))
            stands = STANDPOINTS[kind]
            stand = stands[int(self.rng.integers(len(stands)))]
            if isinstance(place, str):
                stand = stand.replace("{s}", place)
            else:
                text.words["p"] = place
            text.template = text.template.replace("{s}", stand)
            about = [faced, target] + ([beside] if beside else [])
            return text.qa("direction", wanted, about)
        return None

    def standpoint_kind(self, named: Sequence[Item]) -> str:
        """One of STANDPOINTS, before anything else is drawn: how somebody stands must not tell the answer."""
        kinds = ["middle", "point", "beside"] if self.low_pieces(named) else ["middle", "point"]
        weight = np.array([0.3, 0.35, 0.35])[: len(kinds)]
        return kinds[int(self.rng.choice(len(kinds), p=weight / weight.sum()))]

    def low_pieces(self, named: Sequence[Item]) -> list[Item]:
        return [i for i in named if i.supported_by == FLOOR and max(i.size[:2]) < 1.6]

    def standpoint(
        self, kind: str, named: Sequence[Item]
    ) -> tuple[str | NDArray[np.float64], list[tuple[float, float]], Item | None]:
        """(words or point, places that this may mean, the item stood by)."""
        if kind == "middle":
            return "", [(0.0, 0.0)], None
        if kind == "point":
            x, y = (float(round(self.rng.uniform(-0.45, 0.45) * s, 2)) for s in self.room.size[:2])
            return np.array([x, y, 0.0]), [(x, y)], None
        floor = self.low_pieces(named)
        item = floor[int(self.rng.integers(len(floor)))]
        # "By" something may be on any side of it: the answer has to be the same from all of them.
        centre, reach = item.centre, float(np.hypot(*item.size[:2]) / 2 + 0.3)
        around = [
            (centre[0] + reach * math.cos(a), centre[1] + reach * math.sin(a)) for a in np.arange(8) * math.pi / 4
        ]
        inside = [(x, y) for x, y in around if abs(x) < self.room.size[0] / 2 and abs(y) < self.room.size[1] / 2]
        return self.name(item), [(float(centre[0]), float(centre[1])), *inside], item

    def ask_closer(self) -> QA | None:
        named = self.named()
        options = []
        for goal in named:
            for a, b in itertools.combinations([i for i in named if i is not goal], 2):
                if a.supported_by == goal.instance or b.supported_by == goal.instance or _touching(a, b):
                    continue
                if goal.supported_by in (a.instance, b.instance):
                    continue
                near, far = (a, b) if self.middle(goal, a) < self.middle(goal, b) else (b, a)
                clear = self.middle(goal, far) > 1.25 * self.middle(goal, near) + 0.2
                if clear and self.gap(goal, far) > self.gap(goal, near) + 0.3:
                    options.append((goal, near, far))
        if not options:
            return None
        goal, near, far = options[int(self.rng.integers(len(options)))]
        return self.comparison("closer", near, far, goal)

    def ask_taller(self) -> QA | None:
        return self.measured("taller", [i for i in self.named() if i.supported_by == FLOOR])

    def ask_larger(self) -> QA | None:
        return self.measured("larger", [i for i in self.named() if i.supported_by != WALL])

    def measured(self, measure: str, items: Sequence[Item]) -> QA | None:
        """A comparison whose outcome the two classes alone do not tell."""
        if len(items) < 2:
            return None
        for _ in range(8):
            first, second = (items[int(k)] for k in self.rng.choice(len(items), 2, replace=False))
            a, b = (np.array(i.model.size) * i.scale for i in (first, second))
            # The boxes along the world's axes, which is what one may think of instead, must agree.
            if _MEASURES[measure](a, b) and first.size.prod() > 1.2 * second.size.prod() * (measure == "larger"):
                winner, loser = first, second
            elif _MEASURES[measure](b, a) and second.size.prod() > 1.2 * first.size.prod() * (measure == "larger"):
                winner, loser = second, first
            else:
                continue
            expected = _prior(measure, winner.kind, loser.kind) if winner.kind != loser.kind else 0.5
            # What the classes make likely is asked more rarely, so that both outcomes are as frequent.
            if self.rng.random() < (1 - expected) / max(expected, 0.5):
                return self.comparison(measure, winner, loser)
        return None

    def comparison(self, family: str, winner: Item, loser: Item, goal: Item | None = None) -> QA:
        names = {i.instance: self.name(i) for i in (winner, loser)}
        first, second = (winner, loser) if self.rng.random() < 0.5 else (loser, winner)
        words: dict[str, str | NDArray[np.float64]] = {"a": names[first.instance], "b": names[second.instance]}
        if goal is not None:
            words["x"] = self.name(goal)
        answer = names[winner.instance].removeprefix("the ")
        return self.text(family, **words).qa(family, answer, [winner, loser] + ([goal] if goal else []))

    def ask_distance(self) -> QA | None:
        options: dict[str, list[tuple[Item, Item]]] = {}
        for a, b in itertools.combinations(self.named(), 2):
            distance = self.middle(a, b)
            rounded = round(2 * distance) / 2
            if 0.5 <= rounded <= _MAX_DISTANCE and abs(distance - rounded) < 0.19 and not _touching(a, b):
                options.setdefault(f"{rounded:.1f}", []).append((a, b))
        answer = self.pick_answer(options, {"1.5": 0.7, "2.0": 0.7, "2.5": 0.8})
        if answer is None:
            return None
        a, b = options[answer][int(self.rng.integers(len(options[answer])))]
        if self.rng.random() < 0.5:
            a, b = b, a
        return self.text("distance", a=self.name(a), b=self.name(b)).qa("distance", answer, [a, b])

    def ask_box(self) -> QA | None:
        whole = [i for i in self.seen if self.is_seen_whole(i)]
        if not whole:
            return None
        item = self.choose(whole, self.rarity)
        box = tuple(float(v) for v in (*item.centre, *item.size))
        return self.text("box", p=self.point_on(item)).qa("box", box_text(item), [item], box)


def side_of(spot: tuple[float, float], faced: Item, item: Item) -> str | None:
    """Where an item is for somebody at `spot` who faces another: one of DIRECTIONS, None where that is not clear."""
    x, y = spot
    facing = faced.centre[:2] - (x, y)
    if float(np.linalg.norm(facing)) < 0.6 or item.footprint.distance(x, y) < 0.25:
        return None
    heading = math.atan2(facing[1], facing[0])
    points = np.concatenate([item.footprint.corners(), item.centre[None, :2]]) - (x, y)
    angles = np.degrees(np.arctan2(points[:, 1], points[:, 0]) - heading)
    quarters = {round(float(a) / 90) % 4 for a in angles}
    if len(quarters) > 1:
        return None
    off = abs((float(angles[-1]) + 45) % 90 - 45)
    return DIRECTIONS[quarters.pop()] if off < 33 else None


def _touching(a: Item, b: Item) -> bool:
    return a.supported_by == b.instance or b.supported_by == a.instance
