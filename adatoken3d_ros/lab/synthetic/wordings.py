# SPDX-License-Identifier: Apache-2.0
"""How questions and answers are put into words: several wordings of each family, names, points, boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.items import Item

_PLURALS = {"bookshelf": "bookshelves", "box": "boxes", "bench": "benches", "person": "people", "radio": "radios"}

UNKNOWN = "I do not know"  # the answer where nothing was seen

WORDINGS: dict[str, tuple[str, ...]] = {
    "existence": (
        "Is there {k} in the room?",
        "Can you see {k}?",
        "Does this room have {k}?",
        "Is {k} anywhere in this room?",
        "Do you see {k} here?",
    ),
    "existence on": (
        "Is there {k} on {x}?",
        "Does {k} stand on {x}?",
        "Can you see {k} on top of {x}?",
        "Is {k} placed on {x}?",
    ),
    "count": (
        "How many {k} are there?",
        "How many {k} are in the room?",
        "Count the {k}.",
        "What is the number of {k} in this room?",
        "How many {k} can you see?",
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
# The distance is that of the middles, which most wordings leave open. Those that say so, in the same words.
MIDDLES = (
    "How far apart are the middle of {a} and the middle of {b}, to the nearest half metre?",
    "What is the distance between the middle of {a} and the middle of {b} in metres, rounded to half metres?",
    "How many metres is the middle of {a} from the middle of {b}, to the nearest half metre?",
    "To the nearest half metre, how far is it from the middle of {a} to the middle of {b}?",
)
STANDPOINTS: dict[str, tuple[str, ...]] = {
    "middle": ("I am standing in the middle of the room,", "Standing in the centre of the room, I am"),
    "point": ("I am standing at {p},", "From {p}, I am"),
    "beside": ("I am standing right by {s},", "Standing next to {s}, I am"),
}


def wordings(told: bool = False) -> dict[str, tuple[str, ...]]:
    """WORDINGS; told: most distances say from where to where, as whoever asks need not."""
    return {**WORDINGS, "distance": tuple(dict.fromkeys((*WORDINGS["distance"], *MIDDLES)))} if told else WORDINGS


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


def worded(
    family: str,
    template: str,
    words: Mapping[str, str | NDArray[np.float64]],
    answer: str,
    about: Sequence[Item],
    box: tuple[float, ...] | None = None,
) -> QA:
    """A question whose gaps {name} are filled with words, or with points (3,), which are written to two decimals."""
    clicks: list[list[float]] = []
    text = ""
    for piece in template.split("{"):
        name, closed, rest = piece.partition("}")
        word = words[name] if closed else ""
        if not isinstance(word, str):
            point = [round(float(v), 2) + 0.0 for v in word]  # + 0.0 makes a -0.0 a 0.0
            clicks.append(point)
            word = f"[{point[0]:.2f}, {point[1]:.2f}, {point[2]:.2f}]"
        text += word + (rest if closed else piece)
    points = np.array(clicks, np.float64).reshape(-1, 3)
    return QA(family, text[0].upper() + text[1:], answer, points, box, tuple(dict.fromkeys(i.instance for i in about)))


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
