# SPDX-License-Identifier: Apache-2.0
"""Places of the scene that users have named, and questions in which they are named."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from adatoken3d_ros.scene.frames import MAX_POSITION
from adatoken3d_ros.text import quoted

MOST = 200  # marks of a scene
LONGEST = 64  # characters of a name
MOST_EXTENT = 1000.0  # metres
Triple = tuple[float, float, float]

_ARTICLE = re.compile(r"(?:the|an?|my|our)\s+", re.IGNORECASE)
# "Is there a table?" is not about the mark "table", "What is on the table?" is.
_DEFINITE, _INDEFINITE = r"(?:the|my|our)\s+", r"(?:an?|another|any|each|every|how many|no|other|some|what|which)\s+"
_FORBIDDEN = re.compile(r"[\[\]<>{}]")  # what stands for points and the model's own marks in a question
_COMMON = re.compile(
    r"a|an|and|any|are|at|be|by|can|colou?r|did|do|does|for|from|has|have|here|how|i|in|is|it|last|many|me|my|near|not|of"
    r"|on|or|that|the|there|they|this|to|under|was|we|were|what|when|where|which|who|why|with|you|your"
)


class MarkError(ValueError):
    """A mark that cannot be, or is not there; the message names it."""


@dataclass(frozen=True)
class Mark:
    """A place with a name.

    Attributes:
        name: what questions call it.
        place: the place, or the middle of the box, scene frame, metres.
        extent: edge lengths of the axis-aligned box, metres; zeros: a point.
        added_ns: when it was added, nanoseconds.

    Raises:
        MarkError: for a name or numbers that no mark can have.
    """

    name: str
    place: Triple
    extent: Triple = (0.0, 0.0, 0.0)
    added_ns: int = 0

    def __post_init__(self) -> None:
        name = self.name
        if not name or len(name) > LONGEST or name != " ".join(name.split()) or not name.isprintable():
            raise MarkError(
                f"the name of a mark is 1 to {LONGEST} printable characters with single spaces, got {quoted(name)}"
            )
        if _COMMON.fullmatch(spoken(name)):
            raise MarkError(f"{quoted(name)} stands in questions that mean no mark: give it a name of its own")
        if not any(map(str.isalnum, spoken(name))) or _FORBIDDEN.search(name):
            raise MarkError(f"the name of a mark has a letter or digit and none of []<>{{}}, got {quoted(name)}")
        if not all(abs(value) <= MAX_POSITION for value in self.place):  # NaN is not
            raise MarkError(f"the mark {quoted(name)} is at {list(self.place)} m, not within {MAX_POSITION:g} m")
        if not all(0 <= value <= MOST_EXTENT for value in self.extent):
            raise MarkError(f"the mark {quoted(name)} has edges of {list(self.extent)} m, not 0 to {MOST_EXTENT:g}")


def spoken(name: str) -> str:
    """A name as it is compared: without an article before it, small, its letters composed."""
    return unicodedata.normalize("NFC", _bare(name).casefold())


def _bare(name: str) -> str:
    return name[match.end() :] if (match := _ARTICLE.match(name)) else name


class Marks:
    """The marks of a scene; no two are called alike, whatever their case and article."""

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self._marks: dict[str, Mark] = {}
        for mark in marks:
            self.add(mark)

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, mark: Mark) -> None:
        """Raises MarkError for a name that another mark has, and for one mark too many."""
        key = spoken(mark.name)
        if (other := self._marks.get(key)) is not None:
            raise MarkError(f"there is a mark {quoted(other.name)} already, at {_rounded(other.place)} m")
        if len(self._marks) >= MOST:
            raise MarkError(f"the scene has {MOST} marks already, no more are kept")
        self._marks[key] = mark

    def remove(self, name: str) -> Mark:
        """Takes a mark away and returns it. Raises MarkError if there is none of that name."""
        found = self._marks.pop(spoken(" ".join(name.split())), None)
        if found is None:
            known = ", ".join(mark.name for mark in self.all()[:10]) or "none"
            raise MarkError(f"there is no mark {quoted(name)}; there are: {known}")
        return found

    def all(self) -> tuple[Mark, ...]:
        """In the order of their names."""
        return tuple(self._marks[key] for key in sorted(self._marks))

    def clear(self) -> None:
        self._marks.clear()

    def add_missing(self, others: Iterable[Mark]) -> None:
        """Takes in those of other names, as many as there is room for."""
        for mark in others:
            if spoken(mark.name) not in self._marks and len(self._marks) < MOST:
                self.add(mark)

    # --- in questions ---

    def resolved(self, text: str) -> str:
        """The text with the place, "[x, y, z]" in metres, instead of each mark that it names, its article included.

        Of names that one could take for each other the longest counts. What a name stands for in general ("a table",
        "which table") is left, and so are points that are written out.
        """
        if not self._marks:
            return text
        text = unicodedata.normalize("NFC", text)
        bare = [unicodedata.normalize("NFC", _bare(mark.name)) for mark in self.all()]
        # A letter that grows when it is made small may be written either way.
        names = sorted({form for name in bare for form in (name, name.casefold())}, key=lambda name: (-len(name), name))
        words = "|".join(_word(name) for name in names)
        pattern = rf"\[[^\]]*\]|(?:(?<!\w){_DEFINITE}|((?<!\w){_INDEFINITE}))?({words})"

        def place(match: re.Match[str]) -> str:
            general, name = match.groups()
            mark = None if general or not name else self._marks.get(spoken(" ".join(name.split())))
            return match[0] if mark is None else "[{:.3f}, {:.3f}, {:.3f}]".format(*mark.place)

        return re.sub(pattern, place, text, flags=re.IGNORECASE)

    # --- in a file ---

    def plain(self) -> list[dict[str, Any]]:
        """As JSON takes them."""
        return [asdict(mark) for mark in self.all()]

    @classmethod
    def read(cls, value: Any) -> Marks:
        """What `plain` made. Raises MarkError for anything else."""
        try:
            found = [
                Mark(str(one["name"]), _triple(one["place"]), _triple(one["extent"]), int(one["added_ns"]))
                for one in value
            ]
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise error if isinstance(error, MarkError) else MarkError(f"no marks: {quoted(value)}") from error
        return cls(found)


def _word(name: str) -> str:
    """What matches a name between others, any space between its words; in scripts without spaces nothing parts them."""
    before = "" if _wide(name[0]) else r"(?<!\w)(?<!\d[.,])"
    return before + r"\s+".join(map(re.escape, name.split())) + ("" if _wide(name[-1]) else r"(?!\w|[.,]\d)")


def _wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in "WF"


def _triple(value: Any) -> Triple:
    x, y, z = (float(number) for number in value)
    if not all(map(math.isfinite, (x, y, z))):
        raise ValueError(f"not finite: {value}")
    return x, y, z


def _rounded(place: Triple) -> list[float]:
    return [round(value, 3) for value in place]
