# SPDX-License-Identifier: Apache-2.0
"""Questions about a furnished room with exact answers.

Nothing ambiguous is asked: things are named only where the name fits one thing of the whole room, close calls are left
out, and every thing a question is about must be seen well enough. Answers are balanced within each family, and as far
as that can be done within each class, so that neither the most frequent answer nor a class's habits ("tables exist,
refrigerators are tall") are of use without looking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.facts import DIRECTIONS, MEASURES, Facts, confusable, prior, side_of, touching
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.items import FLOOR, WALL, Item
from adatoken3d_ros.lab.synthetic.views import Sight
from adatoken3d_ros.lab.synthetic.wordings import QA, STANDPOINTS, article, box_text, plural, worded, wordings

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
# How often something is asked for that is there once, twice, ...: in usual rooms, and in crowded ones.
_COUNTS = (0.08, 0.13, 0.2, 0.23, 0.18, 0.18)
_CROWDED_COUNTS = (0.02, 0.03, 0.06, 0.07, 0.08, 0.12, 0.2, 0.42)
_MAX_DISTANCE = 6.0  # metres

T = TypeVar("T")


def generate(
    room: FurnishedRoom,
    rng: np.random.Generator,
    visible: Mapping[int, Sight] | None = None,
    *,
    per_family: int = 2,
    families: Sequence[str] = FAMILIES,
    told: bool = False,
) -> list[QA]:
    """Up to `per_family` questions of each family, fewer where the room has no more that are clear.

    Args:
        visible: from `views.sights`, for the views that the answerer is given; None: everything is seen from all sides.
        told: of most distances, from where to where they are.

    Raises:
        ValueError: for an unknown family.
    """
    unknown = [f for f in families if f not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown families {unknown}, known: {', '.join(FAMILIES)}")
    asker = _Asker(Facts(room, visible), rng, wordings(told))
    found: list[QA] = []
    for family in families:
        ask: Callable[[], QA | None] = getattr(asker, f"ask_{family}")
        seen: set[tuple[str, tuple[int, ...]]] = set()
        for _ in range(2 * per_family):
            if len(seen) >= per_family:
                break
            qa = ask()
            if qa is None or qa.about and (qa.answer, qa.about) in seen:
                continue
            seen.add((qa.answer, qa.about or (-len(seen),)))
            found.append(qa)
    return found


class _Asker:
    """Draws questions about one room. `ask_<family>` gives one, or None where chance or the room has none."""

    def __init__(self, facts: Facts, rng: np.random.Generator, wordings: Mapping[str, Sequence[str]]) -> None:
        self.facts = facts
        self.rng = rng
        self.wordings = wordings

    # --- drawing -----------------------------------------------------------------------------------------------------

    def any(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        weight = np.array(weights)
        return options[int(self.rng.choice(len(options), p=weight / weight.sum()))]

    def rare(self, items: Sequence[Item]) -> Item:
        """One of the items, all classes as often over many rooms."""
        return self.weighted(items, [self.facts.rarity(i) for i in items])

    def answer(self, options: Mapping[str, list], weights: Mapping[str, float]) -> str | None:
        """An answer among those that this room offers, each as likely where nothing else is said by `weights`."""
        answers = list(options)
        return self.weighted(answers, [weights.get(a, 1.0) for a in answers]) if answers else None

    def name(self, item: Item) -> str:
        return self.any(self.facts.names[item.instance])

    def say(
        self,
        wording: str,
        answer: str,
        about: Sequence[Item],
        words: Mapping[str, str | NDArray[np.float64]],
        box: tuple[float, ...] | None = None,
    ) -> QA:
        """One of the wordings, whose first word is the family, with its gaps filled."""
        return worded(wording.split()[0], self.any(self.wordings[wording]), words, answer, about, box)

    # --- the families ------------------------------------------------------------------------------------------------

    def ask_existence(self) -> QA | None:
        facts = self.facts
        yes = bool(self.rng.random() < 0.5)
        draw = self.rng.random()
        if draw < 0.3:
            return self.existence_on(yes)
        if draw < 0.55:
            return self.existence_coloured(yes)
        if yes:
            if not facts.seen:
                return None
            item = self.rare(facts.seen)
            return self.say("existence", "yes", [item], {"k": article(item.kind)})
        absent = [k for k in facts.known if not any(confusable(k, there) for there in facts.kinds)]
        if not absent:
            return None
        kind = self.weighted(absent, [1 / (1 - facts.known[k]) for k in absent])
        return self.say("existence", "no", [], {"k": article(kind)})

    def existence_coloured(self, yes: bool) -> QA | None:
        """ "Is there a red chair?" in a room with chairs."""
        coloured = [i for i in self.facts.seen if i.colour is not None]
        if not coloured:
            return None
        item = self.rare(coloured)
        colour = item.colour
        if not yes:
            free = [c for c in COLOURS if not any(c in i.looks for i in self.facts.alike(item))]
            if not free:
                return None
            colour = self.any(free)
        return self.say("existence", "yes" if yes else "no", [item], {"k": article(f"{colour} {item.kind}")})

    def existence_on(self, yes: bool) -> QA | None:
        """ "Is there a mug on the table?" in a room with a mug and a table with something on it."""
        facts = self.facts
        above = [i for i in facts.seen if i.supported_by > FLOOR and i.supported_by in facts.names]
        carriers = [c for c in facts.named if any(i.supported_by == c.instance for i in above)]
        pairs = []
        for item, carrier in itertools.product(above, carriers):
            alike = any(confusable(i.kind, item.kind) for i in facts.on(carrier))
            if (item.supported_by == carrier.instance) if yes else not alike:
                pairs.append((item, carrier))
        if not pairs:
            return None
        item, carrier = self.any(pairs)
        words = {"k": article(item.kind), "x": self.name(carrier)}
        return self.say("existence on", "yes" if yes else "no", [item, carrier], words)

    def ask_count(self) -> QA | None:
        # Classes that come alone or in numbers; and every one of them must be seen.
        shares = _CROWDED_COUNTS if self.facts.room.split == "crowded" else _COUNTS
        options: dict[str, list[str]] = {}
        for kind, number in self.facts.kinds.items():
            if KINDS[kind].place not in ("free", "top", "window") and kind != "nightstand":
                continue
            if number > len(shares) or not self.facts.is_clear(kind):
                continue
            if sum(i.kind == kind for i in self.facts.seen) == number:
                options.setdefault(str(number), []).append(kind)
        answer = str(1 + int(self.rng.choice(len(shares), p=shares)))
        if answer not in options:
            return None
        kind = self.any(options[answer])
        return self.say("count", answer, [i for i in self.facts.items if i.kind == kind], {"k": plural(kind)})

    def ask_colour(self) -> QA | None:
        coloured = [i for i in self.facts.seen if i.colour is not None]
        if not coloured:
            return None
        item = self.rare(coloured)
        assert item.colour is not None
        plain = [n for n in self.facts.names[item.instance] if item.colour not in n.split()]
        if plain and self.rng.random() < 0.6:
            return self.say("colour", item.colour, [item], {"x": plain[0]})
        point = self.facts.point_on(item, self.rng)
        template = self.any(self.wordings["colour"]).replace("{x}", "the object at {p}")
        return worded("colour", template, {"p": point}, item.colour, [item])

    def ask_class(self) -> QA | None:
        if not self.facts.seen:
            return None
        item = self.rare(self.facts.seen)
        return self.say("class", item.kind, [item], {"p": self.facts.point_on(item, self.rng)})

    def ask_nearest(self) -> QA | None:
        facts = self.facts
        options: dict[str, list[tuple[Item, Item]]] = {}
        for item in facts.named:
            # What stands on something, or carries something, has its nearest neighbour above or below: not asked.
            if item.supported_by > FLOOR + 2 or facts.on(item):
                continue
            others = [i for i in facts.items if i is not item]
            near = min(others, key=lambda i: facts.gap(item, i))
            closest = min(others, key=lambda i: facts.middle(item, i))
            if closest.kind != near.kind or near not in facts.seen or near.kind == item.kind:
                continue
            rivals = [i for i in others if i.kind != near.kind]
            if min((facts.gap(item, i) for i in rivals), default=math.inf) < facts.gap(item, near) + 0.15:
                continue
            if min((facts.middle(item, i) for i in rivals), default=math.inf) < 1.2 * facts.middle(item, closest):
                continue
            if any(confusable(i.kind, near.kind) for i in rivals if facts.gap(item, i) < 1.0):
                continue
            options.setdefault(near.kind, []).append((item, near))
        answer = self.answer(options, {k: 1 / facts.known.get(k, 1.0) for k in options})
        if answer is None:
            return None
        # A class that is often the nearest (doors, chairs) is asked for less often than it could be.
        if self.rng.random() < min(0.8, max(0.0, facts.known.get(answer, 0.0) - 0.2)):
            return None
        item, near = self.any(options[answer])
        return self.say("nearest", answer, [item, near], {"x": self.name(item)})

    def ask_on(self) -> QA | None:
        facts = self.facts
        if self.rng.random() < 0.4:
            return self.on_below()
        options: dict[str, list[tuple[Item, list[Item]]]] = {}
        for carrier in facts.named:
            on_it = facts.on(carrier)
            if len({i.kind for i in on_it}) == 1 and all(facts.is_seen(i) for i in on_it):
                options.setdefault(on_it[0].kind, []).append((carrier, on_it))
        answer = self.answer(options, {k: 1 / facts.known.get(k, 1.0) for k in options})
        if answer is None:
            return None
        carrier, on_it = self.any(options[answer])
        return self.say("on", answer, [carrier, *on_it], {"x": self.name(carrier)})

    def on_below(self) -> QA | None:
        """What something stands on: furniture, or the floor for what could have stood on furniture."""
        options: dict[str, list[list[Item]]] = {}
        for item in self.facts.named:
            if KINDS[item.kind].place != "top":
                continue
            if item.supported_by == FLOOR:
                options.setdefault("floor", []).append([item])
            elif item.supported_by in self.facts.names:
                carrier = self.facts.room.item(item.supported_by)
                options.setdefault(carrier.kind, []).append([item, carrier])
        answer = self.answer(options, {"floor": 0.5, "table": 0.6, "desk": 0.6})
        if answer is None:
            return None
        about = self.any(options[answer])
        return self.say("on below", answer, about, {"x": self.name(about[0])})

    def ask_direction(self) -> QA | None:
        facts = self.facts
        if len(facts.named) < 2:
            return None
        kind, wanted = self.standpoint_kind(), self.any(DIRECTIONS)
        for _ in range(40):
            place, spots, beside = self.standpoint(kind)
            if any(i.footprint.distance(*spots[0]) < 0.2 for i in facts.items if kind == "point"):
                continue
            others = [i for i in facts.named if i is not beside]
            if len(others) < 2:
                continue
            faced = self.any(others)
            # What is close to the thing that one faces is in front: nobody needs to look.
            apart = [i for i in others if np.hypot(*(i.centre - faced.centre)[:2]) > 0.8]
            matching = [i for i in apart if all(side_of(spot, faced, i) == wanted for spot in spots)]
            if not matching:
                continue
            target = self.any(matching)
            words: dict[str, str | NDArray[np.float64]] = {"a": self.name(faced), "b": self.name(target)}
            template = self.any(self.wordings["direction"])
            stand = self.any(STANDPOINTS[kind])
            if isinstance(place, str):
                stand = stand.replace("{s}", place)
            else:
                words["p"] = place
            about = [faced, target] + ([beside] if beside else [])
            return worded("direction", template.replace("{s}", stand), words, wanted, about)
        return None

    def standpoint_kind(self) -> str:
        """One of STANDPOINTS, before anything else is drawn: how somebody stands must not tell the answer."""
        kinds = ["middle", "point", "beside"] if self.facts.low_pieces() else ["middle", "point"]
        return self.weighted(kinds, [0.3, 0.35, 0.35][: len(kinds)])

    def standpoint(self, kind: str) -> tuple[str | NDArray[np.float64], list[tuple[float, float]], Item | None]:
        """(words or point, places that this may mean, the item stood by)."""
        size = self.facts.room.size
        if kind == "middle":
            return "", [(0.0, 0.0)], None
        if kind == "point":
            x, y = (float(round(self.rng.uniform(-0.45, 0.45) * s, 2)) for s in size[:2])
            return np.array([x, y, 0.0]), [(x, y)], None
        item = self.any(self.facts.low_pieces())
        # "By" something may be on any side of it: the answer has to be the same from all of them.
        centre, reach = item.centre, float(np.hypot(*item.size[:2]) / 2 + 0.3)
        around = [
            (centre[0] + reach * math.cos(a), centre[1] + reach * math.sin(a)) for a in np.arange(8) * math.pi / 4
        ]
        inside = [(x, y) for x, y in around if abs(x) < size[0] / 2 and abs(y) < size[1] / 2]
        return self.name(item), [(float(centre[0]), float(centre[1])), *inside], item

    def ask_closer(self) -> QA | None:
        facts = self.facts
        options = []
        for goal in facts.named:
            for a, b in itertools.combinations([i for i in facts.named if i is not goal], 2):
                if touching(a, b) or goal.instance in (a.supported_by, b.supported_by):
                    continue
                if goal.supported_by in (a.instance, b.instance):
                    continue
                near, far = (a, b) if facts.middle(goal, a) < facts.middle(goal, b) else (b, a)
                clear = facts.middle(goal, far) > 1.25 * facts.middle(goal, near) + 0.2
                if clear and facts.gap(goal, far) > facts.gap(goal, near) + 0.3:
                    options.append((goal, near, far))
        if not options:
            return None
        goal, near, far = self.any(options)
        return self.comparison("closer", near, far, goal)

    def ask_taller(self) -> QA | None:
        return self.measured("taller", [i for i in self.facts.named if i.supported_by == FLOOR])

    def ask_larger(self) -> QA | None:
        return self.measured("larger", [i for i in self.facts.named if i.supported_by != WALL])

    def measured(self, measure: str, items: Sequence[Item]) -> QA | None:
        """A comparison whose outcome the two classes alone do not tell."""
        if len(items) < 2:
            return None
        for _ in range(8):
            first, second = (items[int(k)] for k in self.rng.choice(len(items), 2, replace=False))
            for winner, loser in ((first, second), (second, first)):
                a, b = (np.array(i.model.size) * i.scale for i in (winner, loser))
                # The boxes along the world's axes, which is what one may think of instead, must agree.
                if MEASURES[measure](a, b) and winner.size.prod() > 1.2 * loser.size.prod() * (measure == "larger"):
                    break
            else:
                continue
            expected = prior(measure, winner.kind, loser.kind) if winner.kind != loser.kind else 0.5
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
        about = [winner, loser] + ([goal] if goal else [])
        return self.say(family, names[winner.instance].removeprefix("the "), about, words)

    def ask_distance(self) -> QA | None:
        options: dict[str, list[tuple[Item, Item]]] = {}
        for a, b in itertools.combinations(self.facts.named, 2):
            distance = self.facts.middle(a, b)
            rounded = round(2 * distance) / 2
            if 0.5 <= rounded <= _MAX_DISTANCE and abs(distance - rounded) < 0.19 and not touching(a, b):
                options.setdefault(f"{rounded:.1f}", []).append((a, b))
        answer = self.answer(options, {"1.5": 0.7, "2.0": 0.7, "2.5": 0.8})
        if answer is None:
            return None
        a, b = self.any(options[answer])
        if self.rng.random() < 0.5:
            a, b = b, a
        return self.say("distance", answer, [a, b], {"a": self.name(a), "b": self.name(b)})

    def ask_box(self) -> QA | None:
        whole = [i for i in self.facts.seen if self.facts.is_seen_whole(i)]
        if not whole:
            return None
        item = self.rare(whole)
        box = tuple(float(v) for v in (*item.centre, *item.size))
        return self.say("box", box_text(item), [item], {"p": self.facts.point_on(item, self.rng)}, box)
