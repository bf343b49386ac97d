# SPDX-License-Identifier: Apache-2.0
"""What the service counts, by robot: Ray exports it in Prometheus' text form, and `adatoken3d serve --status` reads it.

adatoken3d_questions_total        robot, status: questions that were answered or refused
adatoken3d_late_total             robot: that missed their budget
adatoken3d_refused_total          robot: that were not begun, because they would have come too late or too many waited
adatoken3d_resident_hits_total    robot: whose scene was here as it was
adatoken3d_tokens_kept_total      robot: spatial tokens at the last gate, over the answered ones
adatoken3d_stage_seconds_total    robot, stage: time of the answered ones
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from adatoken3d_ros.text import shown

PREFIX = "adatoken3d_"
REFUSED = ("BUSY", "BUDGET_INFEASIBLE", "INVALID_REQUEST")
ANSWERED = ("OK", "TRUNCATED", "UNSURE")
STAGES = ("queue", "encode", "tokens", "prefill", "decode", "total")
_LINE = re.compile(r"(?:ray_)?" + PREFIX + r"(\w+?)(?:_total)?\{(.*)\} (\S+)$")
_TAG = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TAGS = {
    "questions": ("robot", "status"),
    "late": ("robot",),
    "refused": ("robot",),
    "resident_hits": ("robot",),
    "tokens_kept": ("robot",),
    "stage_seconds": ("robot", "stage"),
}


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(f"{PREFIX}{name}", description=f"adatoken3d: {name.replace('_', ' ')}", tag_keys=_TAGS[name])


def record(
    robot: str, status: str, hit: bool, late: bool, tokens_kept: int, stages_ms: Mapping[str, float | None]
) -> None:
    """Counts one question. Outside of Ray nothing is exported."""
    _counter("questions").inc(1, {"robot": robot, "status": status})
    for name, counts in (("late", late), ("refused", status in REFUSED), ("resident_hits", hit)):
        if counts:
            _counter(name).inc(1, {"robot": robot})
    if status not in ANSWERED:
        return
    if tokens_kept > 0:
        _counter("tokens_kept").inc(tokens_kept, {"robot": robot})
    for stage in STAGES:
        if ms := stages_ms.get(stage):
            _counter("stage_seconds").inc(ms / 1e3, {"robot": robot, "stage": stage})


@dataclass
class Counts:
    """What was counted of one robot; stage_seconds: sums over `answered` questions."""

    questions: int = 0
    answered: int = 0
    late: int = 0
    refused: int = 0
    resident_hits: int = 0
    tokens_kept: int = 0
    stage_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def read(text: str) -> dict[str, Counts]:
    """{robot: counts} of what Ray exports, added up over replicas."""
    found: dict[str, Counts] = defaultdict(Counts)
    for name, tags, value in samples(text):
        robot = found[tags.get("robot", "")]
        if name == "stage_seconds":
            robot.stage_seconds[tags.get("stage", "")] += value
        elif name in _TAGS:
            setattr(robot, name, getattr(robot, name) + round(value))
            if name == "questions" and tags.get("status") in ANSWERED:
                robot.answered += round(value)
    return dict(found)


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name without prefix and _total, tags, value) of this package's lines in Prometheus' text form."""
    for line in text.splitlines():
        if found := _LINE.match(line):
            yield found[1], {name: value for name, value in _TAG.findall(found[2])}, float(found[3])


def fetch(address: str, seconds: float = 5.0) -> str:
    """What is exported at http://HOST:PORT/metrics. Raises OSError that names the address."""
    try:
        with urllib.request.urlopen(address, timeout=seconds) as answer:
            return str(answer.read(2**26).decode("utf-8", "replace"))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise OSError(
            f"nothing is told at {address}: {shown(error, 200)}; is 'adatoken3d serve' running there?"
        ) from error


def table(counts: Mapping[str, Counts]) -> Any:
    """As people read it: a row a robot, and one of all."""
    from rich.table import Table

    shown_as = Table(title="Robots", title_justify="left")
    heads = ("robot", "questions", "late", "refused", "resident", "tokens kept", "queue ms", "prefill ms", "total ms")
    for number, head in enumerate(heads):
        shown_as.add_column(head, justify="right" if number else "left")
    for name, one in [*sorted(counts.items()), *([("all", summed(counts))] if len(counts) > 1 else [])]:
        cells = [name, str(one.questions), _share(one.late, one.questions), _share(one.refused, one.questions)]
        cells += [_share(one.resident_hits, one.questions), _mean(one.tokens_kept, one.answered, 1)]
        cells += [
            _mean(one.stage_seconds.get(stage, 0.0), one.answered, 1e3) for stage in ("queue", "prefill", "total")
        ]
        shown_as.add_row(*cells)
    return shown_as


def summed(counts: Mapping[str, Counts]) -> Counts:
    """Of all robots together."""
    whole = Counts()
    for one in counts.values():
        for name in ("questions", "answered", "late", "refused", "resident_hits", "tokens_kept"):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
        for stage, seconds in one.stage_seconds.items():
            whole.stage_seconds[stage] += seconds
    return whole


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "0"


def _mean(total: float, count: int, factor: float) -> str:
    return f"{total / count * factor:.0f}" if count else ""
