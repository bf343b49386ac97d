# SPDX-License-Identifier: Apache-2.0
"""Questions about time, of a few forms: when it was seen, what has changed. What else is about time is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0}
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {word: float(value) for value, word in enumerate(_WORDS, 1)} | {"a": 1.0, "an": 1.0, "fifteen": 15.0}
_NUMBERS |= {"twenty": 20.0, "thirty": 30.0, "forty": 40.0, "sixty": 60.0, "half a": 0.5, "half an": 0.5}
LONGEST = 200  # characters of such a question

_SPAN = r"(?:(half an?|\d+(?:\.\d+)?|[a-z]+) )?(second|minute|hour|day|week)s?"
_WINDOW = re.compile(
    rf"(?:in|during|over|within|for) (?:the )?(?:last|past) {_SPAN}|since {_SPAN} ago|{_SPAN} ago", re.IGNORECASE
)
_SEE = r"(?:see|seen|notice|noticed|observe|observed|spot|spotted)"
_LAST = r"(?: (?P<which>last|first)| (?:for )?the (?P<other>last|first) time)"
_WHEN = (
    rf"when (?:did|have) (?:you|the robot) (?P<which>last|first) {_SEE} (?P<thing>.+)",
    rf"when (?:did|have) (?:you|the robot) {_SEE} (?P<thing>.+?){_LAST}?",
    rf"when (?:was|were) (?P<thing>.+?) (?P<which>last|first) {_SEE}",
    rf"when (?:was|were) (?P<thing>.+?) {_SEE}{_LAST}?",
    rf"when(?: was| is|['\u2019]s) the (?P<which>last|first) time (?:that )?(?:you|the robot) (?:saw|{_SEE}) "
    r"(?P<thing>.+)",
    rf"how long ago did (?:you|the robot) (?:(?P<which>last|first) )?{_SEE} (?P<thing>.+)",
)
_HAPPENED = r"(?:changed?|moved?|appear(?:ed)?|disappear(?:ed)?|gone|vanish(?:ed)?|new|different|missing)"
_CHANGED = re.compile(
    rf"(?:what(?: all)?(?: things?)?|which things?|(?:did|has|have) (?:any|some)thing|is anything|is there anything)"
    rf"(?: is| are| has| have| was| were)?(?: been| gone)? {_HAPPENED}(?: (?:here|in (?:the|this) room))?\b",
    re.IGNORECASE,
)
_CHANGE = re.compile(rf"\b{_HAPPENED}\b", re.IGNORECASE)
# What begins like this is about time, whether it goes on as above or not.
_ABOUT_TIME = re.compile(
    r"(?:since )?when (?:did|was|were|have|has|had)\b|when(?: is|['\u2019]s) the (?:last|first) time\b"
    r"|(?:at )?what time (?:did|was|were|have|has)\b|how long (?:ago|since|is it since|has it been|have you)\b",
    re.IGNORECASE,
)
# The same in other languages: 'when' at the beginning, 'changed' anywhere.
_FOREIGN = re.compile(
    r"[\W_]*(?:wann|quand|depuis quand|cu[aá]ndo|quando|wanneer|kiedy|kdy|когда)\b"
    r"|.*\b(?:ver[aä]ndert|ge[aä]ndert|changé(?:e|s|es)?|cambiado|cambiato|mudou|veranderd|изменилось)\b"
    r"|.*(?:什么时候|什麼時候|何时|何時|变化|變化|改变|改變|いつ|変わっ|変化|언제|바뀌|변했)",
    re.IGNORECASE,
)
_OF_TIME = re.compile(
    r"\b(?:(?:last|past) (?:\S+ ){0,3}(?:second|minute|hour|day|week|month|year)s?|since|ago|today|yesterday|recently)"
    r"\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class WhenSeen:
    """When a thing was seen: the last time, or the first."""

    thing: str
    first: bool = False


@dataclass(frozen=True)
class WhatChanged:
    """What has come, gone or moved within so many seconds before now; infinite: since the beginning."""

    seconds: float


@dataclass(frozen=True)
class NotUnderstood:
    """A question about time that has none of the forms; why, for people."""

    why: str


def parse(text: str) -> WhenSeen | WhatChanged | NotUnderstood | None:
    """What is asked about time; None for a question that is not about time."""
    if len(text) > LONGEST:
        return None
    plain = " ".join(text.split()).rstrip(" ?.!")
    for pattern in _WHEN:
        if match := re.fullmatch(pattern, plain, re.IGNORECASE):
            groups = match.groupdict()
            if _WINDOW.search(plain):
                return NotUnderstood(f"one time or a span, not both: {plain!r}")
            which = (groups.get("which") or groups.get("other") or "").lower()
            return WhenSeen(groups["thing"], which == "first")
    if match := _CHANGED.match(plain):
        rest = plain[match.end() :].strip(" ,")
        if not rest:
            return WhatChanged(math.inf)
        if not _OF_TIME.search(rest):
            return None  # what is missing from the table
        window = _WINDOW.fullmatch(rest)
        seconds = _seconds(window) if window else None
        if seconds is None:
            return NotUnderstood(f"no span of time: {rest!r}; say 'in the last 5 minutes'")
        return WhatChanged(seconds)
    if _FOREIGN.match(plain):
        return NotUnderstood(f"questions about time are understood in English alone, got {plain!r}")
    if _ABOUT_TIME.match(plain) or _WINDOW.search(plain) or (_CHANGE.search(plain) and _OF_TIME.search(plain)):
        forms = "'when did you last see ...' and 'what changed in the last ...'"
        return NotUnderstood(f"of questions about time only {forms} are understood, got {plain!r}")
    return None


def _seconds(window: re.Match[str]) -> float | None:
    groups = window.groups()
    number, unit = next((groups[i], groups[i + 1]) for i in range(0, len(groups), 2) if groups[i + 1])
    try:
        count = 1.0 if number is None else _NUMBERS.get(number.lower()) or float(number)
    except ValueError:
        return None
    seconds = count * _UNITS[unit.lower()]
    return seconds if 0 < seconds < math.inf else None


def span(seconds: float) -> str:
    """A span of time in plain words, of two figures at most."""
    for unit, length in reversed(_UNITS.items()):
        if seconds >= 1.5 * length or seconds == length or unit == "second":
            count = seconds / length
            figure = f"{count:.0f}" if count >= 9.95 or abs(count - round(count)) < 0.05 else f"{count:.1f}"
            return f"{figure} {unit}{'s' if figure != '1' else ''}"
    raise AssertionError
