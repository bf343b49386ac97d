# SPDX-License-Identifier: Apache-2.0
"""The messages between a robot and the engine that it shares: JSON that says what is asked, and bodies behind it.

A request is a JSON text and some bodies, each with its length before it. An answer is a stream of lines of JSON, the
last of which is followed by as many bytes of safetensors as it says. Everything is bounded before it is read; nothing
is unpickled or evaluated. A robot says which scene it means by a manifest: which views, in which bodies (`bodies.py`),
where from. Whoever lacks some of them says which, and these are sent: there is no other way to renew a scene.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.files import parse_json
from adatoken3d_ros.scene.frames import FrameError, check_position, check_rigid
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import quoted, shown

VERSION = 2
MOST_REQUEST = 256 * 2**20  # bytes, bodies included
MOST_TEXT = 4 * 2**20  # of a request's JSON
MOST_LINE = 2**20  # of an event
MOST_REPORT = 64 * 2**20
MOST_BODIES = 1001  # of a request: a scene's views and what has gone
MOST_ROWS = 2**16
MOST_SHIFT = 2**20  # voxels
HELLO, ASK, VIEWS = "/v1/hello", "/v1/ask", "/v1/views"
RULES = (  # settings of a robot by which its questions are answered elsewhere
    "scene.question_views",
    "max_new_tokens",
    "model.template",
    "model.tell_poses",
    "unsure_below",
    "seed",
    "budget.infeasible",
    "budget.reuse",
)
_MAGIC = b"ad3d"
_NAME = re.compile(r"[0-9a-f]{32}")


def heartbeat(budget_ms: float | None) -> float:
    """Seconds between two lines while a question with this budget (None or 0: without one) waits for its answer.

    A robot gives up a connection of which it hears nothing for a part of what is left of its budget: never before two
    lines were due (`remote_engine.patience_of`)."""
    return min(0.1, max(0.02, budget_ms / 20e3)) if budget_ms else 0.1


class WireError(ValueError):
    """A message that cannot be used; the text names what is wrong."""


# --- a request: JSON and bodies ---------------------------------------------------------------------------------------


def framed(content: Mapping[str, Any], bodies: Sequence[bytes] = ()) -> bytes:
    """The bytes of a request."""
    text = json.dumps({"version": VERSION, **content}, separators=(",", ":")).encode()
    return b"".join([_MAGIC, *(part for data in (text, *bodies) for part in (struct.pack("<I", len(data)), data))])


def unframed(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What a request says, and its bodies. Raises WireError for another version, and for what is no request."""
    if len(data) > MOST_REQUEST:
        raise WireError(f"a request of {len(data)} bytes, more than {MOST_REQUEST}")
    if data[:4] != _MAGIC:
        raise WireError(f"no request: it begins with {data[:4]!r}")
    parts, at = [], 4
    while at < len(data):
        if at + 4 > len(data):
            raise WireError("a request that ends within a length")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise WireError(f"a part of {length} bytes, {len(data) - at} are left")
        parts.append(data[at : at + length])
        at += length
        if len(parts) > MOST_BODIES + 1:
            raise WireError(f"more than {MOST_BODIES} bodies")
    if not parts or len(parts[0]) > MOST_TEXT:
        raise WireError(f"a text of {len(parts[0]) if parts else 0} bytes, not 1 to {MOST_TEXT}")
    content = read_json(parts[0])
    if (version := content.get("version")) != VERSION:
        raise WireError(f"version {quoted(version)}, this program speaks {VERSION}")
    return content, parts[1:]


def read_json(text: bytes) -> dict[str, Any]:
    """An object; raises WireError."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise WireError(f"no JSON: {shown(error, 200)}") from error
    if not isinstance(content, dict):
        raise WireError(f"a {type(content).__name__}, not an object")
    return content


# --- a scene ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewEntry:
    """One view of a scene.

    Attributes:
        stamp: nanoseconds. body: what its body is called. pose: T_world_camera, sixteen numbers, row by row.
        gone: rows of the body that have gone from it, rising.
    """

    stamp: int
    body: str
    pose: tuple[float, ...]
    gone: tuple[int, ...] = ()

    @property
    def T(self) -> NDArray[np.float64]:
        """T_world_camera (4, 4)."""
        return np.array(self.pose, np.float64).reshape(4, 4)


@dataclass(frozen=True)
class Manifest:
    """A scene as it is.

    Attributes:
        views: oldest first. origin: of its voxels, scene frame, metres. shift: voxels from there to the model's origin.
        things: the body of what has gone from it; empty for nothing.
    """

    views: tuple[ViewEntry, ...] = ()
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shift: tuple[int, int, int] = (0, 0, 0)
    things: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        views = [[view.stamp, view.body, list(view.pose), list(view.gone)] for view in self.views]
        return {"views": views, "origin": list(self.origin), "shift": list(self.shift), "things": self.things}

    @property
    def bodies(self) -> tuple[str, ...]:
        """All that it needs."""
        return (*dict.fromkeys(view.body for view in self.views), *((self.things,) if self.things else ()))

    @classmethod
    def read(cls, content: Any) -> Manifest:
        """Of a message; raises WireError naming the value."""
        try:
            views = tuple(_entry(*one) for one in content["views"])
            origin, shift, things = content["origin"], content["shift"], content["things"]
            check_position(np.array(origin, np.float64).reshape(3))
            if not (len(shift) == 3 and all(type(n) is int and abs(n) <= MOST_SHIFT for n in shift)):
                raise WireError(f"shift {quoted(shift)}, three whole numbers up to {MOST_SHIFT} are expected")
            if not (things == "" or _is_name(things)):
                raise WireError(f"things {quoted(things)} are no body's name")
        except (LookupError, TypeError, ValueError) as error:  # FrameError and WireError are ValueErrors
            raise WireError(f"no manifest: {shown(error, 200)}") from error
        if len(views) >= MOST_BODIES:
            raise WireError(f"a scene of {len(views)} views, at most {MOST_BODIES - 1} are allowed")
        if (stamps := len({view.stamp for view in views})) < len(views):
            raise WireError(f"a scene of {len(views)} views, {stamps} stamps")
        x, y, z = map(float, origin)
        return cls(views, (x, y, z), (shift[0], shift[1], shift[2]), things)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _entry(stamp: Any, body: Any, pose: Any, gone: Any) -> ViewEntry:
    if type(stamp) is not int or not 0 <= stamp < 2**62 or not _is_name(body):
        raise WireError(f"a view at {quoted(stamp)} ns in the body {quoted(body)}")
    numbers = np.array(pose, np.float64)
    if numbers.shape != (16,):
        raise FrameError(f"a pose of {numbers.shape} numbers")
    check_rigid(numbers.reshape(4, 4))
    check_position(numbers.reshape(4, 4)[:3, 3])
    rows = tuple(gone)
    rising = all(type(row) is int for row in rows) and all(a < b for a, b in zip((-1, *rows), rows, strict=False))
    if len(rows) > MOST_ROWS:
        raise WireError(f"{len(rows)} rows have gone of a view, at most {MOST_ROWS} may")
    if not rising:
        raise WireError(f"rows {quoted(gone)} do not rise")
    return ViewEntry(stamp, body, tuple(numbers.tolist()), rows)


# --- a question -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """A question on its way to an engine.

    Attributes:
        scene: what it is about. question: without names of marks. strategy: as YAML (`Strategy.text`).
        elapsed_ms: since it arrived at the robot, the way here included as far as that is known.
        rules: settings of the robot, those of RULES.
        model: identity of the model that the robot believes to ask.
    """

    scene: Manifest
    question: Question
    strategy: str
    elapsed_ms: float
    rules: Mapping[str, Any]
    model: str

    def content(self) -> tuple[dict[str, Any], bytes]:
        """The message, and a body with places that the question is not, or only, about."""
        question = self.question
        said = {
            "text": question.text,
            "clicks": question.clicks.tolist(),
            "latency_budget_ms": question.latency_budget_ms,
            "max_new_tokens": question.max_new_tokens,
            "candidates": list(question.candidates),
        }
        places = save({name: np.asarray(getattr(question, name), np.float64) for name in ("without", "only")})
        return {
            "model": self.model,
            "scene": self.scene.plain(),
            "question": said,
            "strategy": self.strategy,
            "elapsed_ms": self.elapsed_ms,
            "rules": dict(self.rules),
        }, bytes(places)

    @classmethod
    def read(cls, content: Mapping[str, Any], places: bytes) -> Asked:
        """Of a message; raises WireError naming the value. What `check_question` refuses is left to it."""
        try:
            said, elapsed = content["question"], float(content["elapsed_ms"])
            budget, longest = said["latency_budget_ms"], said["max_new_tokens"]
            narrowed = read_arrays(places, {"without": (np.float64, 3), "only": (np.float64, 3)})
            question = Question(
                _text(said["text"]),
                clicks=np.array(said["clicks"], np.float64).reshape(-1, 3),
                latency_budget_ms=None if budget is None else float(budget),
                max_new_tokens=None if longest is None else int(longest),
                candidates=tuple(map(_text, said["candidates"])),
                **narrowed,
            )
            strategy, rules, model = _text(content["strategy"]), read_rules(content["rules"]), _text(content["model"])
            if not 0 <= elapsed < math.inf:
                raise WireError(f"elapsed_ms {quoted(elapsed)}")
        except WireError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise WireError(f"no question: {shown(error, 200)}") from error
        return cls(Manifest.read(content.get("scene")), question, strategy, elapsed, rules, model)


def read_rules(rules: Any) -> Mapping[str, Any]:
    """A robot's settings of a message; raises WireError naming the value."""
    if not isinstance(rules, dict) or rules.keys() != set(RULES):
        raise WireError(f"rules {quoted(rules)}")
    try:
        Settings(rules)
    except ValueError as error:
        raise WireError(f"rules: {error}") from error
    return rules


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WireError(f"{quoted(value)} is no text")
    return value


def read_arrays(data: bytes, wanted: Mapping[str, tuple[Any, int]]) -> dict[str, Any]:
    """Arrays (n,) or (n, columns) of safetensors, of these kinds; columns 0: (n,)."""
    try:
        found = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WireError(f"no arrays: {shown(error, 200)}") from error
    if found.keys() != wanted.keys():
        raise WireError(f"arrays {shown(', '.join(sorted(found)), 200)}")
    for name, (kind, columns) in wanted.items():
        shape = found[name].shape
        if found[name].dtype != kind or shape[1:] != ((columns,) if columns else ()) or not shape:
            raise WireError(f"{name} is {found[name].dtype} {shape}")
    return dict(found)
