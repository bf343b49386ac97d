# SPDX-License-Identifier: Apache-2.0
"""The frames of a robot and how they moved: what /tf and /tf_static tell, kept and asked as tf2 does it; no ROS import.

Interpolated between two samples (linear in position, spherical in rotation), never extended beyond them. A frame's
parent may change; static transforms count at any time; the newest 10 s are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.inputs.conversions import ConversionError, quaternion_to_rotation, stamp_to_ns

# A stamp that is this much older than the newest one is a clock that was set back (a bag that starts again).
JUMP_BACK_NS = 1_000_000_000
CACHE_NS = 10_000_000_000  # history of a moving frame, as long as tf2's
MAX_FRAMES = 10_000  # names that are remembered; a robot has some hundred
MAX_REFUSED = 100  # frames of which it is remembered why
MAX_SAMPLES = 20_000  # of one frame; 10 s at 2 kHz
MAX_NAME = 256  # characters
SQUARED_LENGTH_TOLERANCE = 0.01  # of a quaternion, tf2's

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]  # x y z w


class PoseError(ValueError):
    """There is no pose and there will be none; the message says for which stamp or frame."""


class PoseUnavailable(PoseError):
    """There is no pose yet, but one may still come."""


class Sample(NamedTuple):
    """Where a frame is in its parent."""

    parent: str
    position: Vector
    rotation: Quaternion


class History:
    """Samples of one frame, in the order of their stamps.

    Args:
        cache_ns: age at which a sample goes, counted from the newest one, nanoseconds; None: never.
    """

    def __init__(self, cache_ns: int | None) -> None:
        self._cache_ns = cache_ns
        self.stamps: list[int] = []
        self._samples: list[Sample] = []

    def insert(self, stamp_ns: int, sample: Sample) -> bool:
        """False if the sample is older than what is kept."""
        stamps, samples = self.stamps, self._samples
        if self._cache_ns is not None and stamps:
            oldest = stamps[-1] - self._cache_ns
            kept = max(bisect_left(stamps, oldest), len(stamps) - MAX_SAMPLES)
            if kept > 0:
                del stamps[:kept], samples[:kept]
            if stamp_ns < oldest:
                return False
        at = bisect_right(stamps, stamp_ns)
        if sample not in samples[bisect_left(stamps, stamp_ns, hi=at) : at]:
            stamps.insert(at, stamp_ns)
            samples.insert(at, sample)
        return True

    def at(self, stamp_ns: int) -> Sample | str:
        """The sample at a stamp, 0 asking for the newest; or why there is none."""
        stamps, samples = self.stamps, self._samples
        if not stamps:
            return "nothing has come since stamps jumped back"
        if stamp_ns in (0, stamps[-1]):
            return samples[-1]
        if stamp_ns == stamps[0]:
            return samples[0]
        if stamp_ns > stamps[-1]:
            return f"that would require extrapolation beyond the newest one, at {stamps[-1] / 1e9:.6f} s"
        if stamp_ns < stamps[0]:
            return f"that would require extrapolation before the oldest one, at {stamps[0] / 1e9:.6f} s"
        after = bisect_right(stamps, stamp_ns)
        a, b = samples[after - 1], samples[after]
        if a.parent != b.parent:
            return a
        share = (stamp_ns - stamps[after - 1]) / (stamps[after] - stamps[after - 1])
        return Sample(a.parent, _between(a.position, b.position, share), slerp(a.rotation, b.rotation, share))

    def newest(self) -> Sample | None:
        """None after stamps have jumped back, until one comes."""
        return self._samples[-1] if self._samples else None


class _Moving:
    """A frame that moves; its clock may be set back."""

    def __init__(self, cache_ns: int | None) -> None:
        self._cache_ns = cache_ns
        self.history = History(cache_ns)
        self._last: int | None = None  # stamp of what came last
        self._since: History | None = None  # what has come since stamps stepped back, if they did

    def add(self, stamp_ns: int, sample: Sample) -> None:
        newest = self.history.stamps[-1] if self.history.stamps else stamp_ns
        taken = self.history.insert(stamp_ns, sample)
        if self._cache_ns is None:
            return
        if self._last is not None and stamp_ns < self._last - JUMP_BACK_NS:
            self._since = History(self._cache_ns)
        elif stamp_ns >= newest:
            self._since = None  # one was late, nothing else
        self._last = stamp_ns
        if self._since is not None:
            self._since.insert(stamp_ns, sample)
            # tf2 ignores what is too old. One may be late; two in a row are a clock that was set back.
            if not taken and len(self._since.stamps) > 1:
                self.history, self._since = self._since, None

    def reset(self, stamp_ns: int) -> None:
        """Keeps what is of the new time, whether the transforms jumped back before the images or will do so."""
        since, self._since, self._last = self._since, None, None
        of_new_time = since is not None and since.stamps[-1] <= stamp_ns + JUMP_BACK_NS
        self.history = since if since is not None and of_new_time else History(self._cache_ns)


class TransformTree:
    """The transforms of /tf and /tf_static.

    Args:
        cache_ns: how long the samples of a moving frame are kept, counted from its newest; None: for ever (a bag).
    """

    def __init__(self, cache_ns: int | None = CACHE_NS) -> None:
        self._cache_ns = cache_ns
        self._edges: dict[str, _Moving | Sample] = {}
        self._names: set[str] = set()
        self._refused: dict[str, str] = {}

    def add(self, transform: Any, *, static: bool = False) -> None:
        """Takes a geometry_msgs/TransformStamped.

        Raises:
            PoseError: for names that are empty, equal or too long, and for more frames than are kept.
            ConversionError: for a transform that is not finite or not rigid. Until a better one comes, `transform`
                says so where it misses this one.
        """
        child, parent = _name(transform.child_frame_id), _name(transform.header.frame_id)
        new = {child, parent} - self._names
        if child == parent:
            raise PoseError(f"a transform leads from {child!r} to itself")
        if len(self._names) + len(new) > MAX_FRAMES:
            raise PoseError(f"the transform from {child!r} to {parent!r} is of a new frame, and {MAX_FRAMES} are known")
        try:
            sample = _sample(parent, transform.transform)
        except ConversionError as error:
            text = f"the transform from {child!r} to {parent!r} cannot be used: {error}"
            if child in self._refused or len(self._refused) < MAX_REFUSED:
                self._refused[child] = text
            raise ConversionError(text) from error
        self._names |= new
        self._refused.pop(child, None)
        if static:
            self._edges[child] = sample
            return
        edge = self._edges.get(child)
        if not isinstance(edge, _Moving):
            edge = self._edges[child] = _Moving(self._cache_ns)
        edge.add(stamp_to_ns(transform.header.stamp), sample)

    def frames(self) -> list[str]:
        """Names of all frames, sorted."""
        return sorted(self._names)

    def root(self, frame: str) -> str:
        """The top of the tree that a frame is in, by the newest samples."""
        return list(self._ancestors(frame)[0])[-1]

    def connected(self, target: str, source: str) -> bool:
        """Whether a way leads from one frame to the other, whatever the time."""
        return not self._ancestors(target)[0].keys().isdisjoint(self._ancestors(source)[0])

    def transform(self, target: str, source: str, stamp_ns: int) -> NDArray[np.float64]:
        """From the frame `source` to the frame `target`, (4, 4) float64; stamp 0 asks for the newest.

        Raises:
            PoseUnavailable: there is none (yet); the message has both frames and the reason.
            PoseError: for transforms that run in a circle.
        """
        target, source = target.lstrip("/"), source.lstrip("/")
        if source == target:
            return np.eye(4)
        failed = f"no transform from {source!r} to {target!r} at {stamp_ns / 1e9:.6f} s: "
        unknown = [repr(name) for name in (source, target) if name not in self._names]
        if unknown:
            known = f"only of {', '.join(self.frames()[:20])}" if self._names else "nothing has come on TF"
            why = "".join(f"; {self._refused[name]}" for name in (source, target) if name in self._refused)
            raise PoseUnavailable(f"{failed}nobody has told of {' and '.join(unknown)}, {known}{why}")
        at_ns = self._latest_common(target, source) if stamp_ns == 0 else stamp_ns
        if at_ns is None:
            raise PoseUnavailable(f"{failed}they are in two trees that nothing connects")
        up, missing = self._climb(source, at_ns, {target})
        down, missing_below = self._climb(target, at_ns, up.keys())
        meeting = next((name for name in down if name in up), None)
        if meeting is None:
            raise PoseUnavailable(failed + (missing or missing_below or "they are in two trees that nothing connects"))
        position, rotation = up[meeting]
        back = _conjugate(down[meeting][1])
        T = np.eye(4)
        T[:3, :3] = quaternion_to_rotation(*_unit(_multiply(back, rotation)))
        T[:3, 3] = _rotate(back, _minus(position, down[meeting][0]))
        return T

    def reset(self, stamp_ns: int) -> None:
        """Forgets how frames moved before time jumped back to about `stamp_ns`; of a whole bag nothing is forgotten."""
        if self._cache_ns is not None:
            for edge in self._edges.values():
                if isinstance(edge, _Moving):
                    edge.reset(stamp_ns)

    def _climb(self, frame: str, stamp_ns: int, goals: Any) -> tuple[dict[str, tuple[Vector, Quaternion]], str]:
        """({ancestor: where `frame` is in it}, itself included, until one of `goals`, and what is missing above)."""
        position: Vector = (0.0, 0.0, 0.0)
        rotation: Quaternion = (0.0, 0.0, 0.0, 1.0)
        chain = {frame: (position, rotation)}
        while frame not in goals and (edge := self._edges.get(frame)) is not None:
            sample = edge if isinstance(edge, Sample) else edge.history.at(stamp_ns)
            if isinstance(sample, str):
                refused = f"; {self._refused[frame]}" if frame in self._refused else ""
                return chain, f"of {frame!r}, {sample}{refused}"
            if sample.parent in chain:
                raise PoseError(f"the transforms run in a circle through {sample.parent!r}")
            position = _plus(_rotate(sample.rotation, position), sample.position)
            rotation = _multiply(sample.rotation, rotation)
            frame = sample.parent
            chain[frame] = (position, rotation)
        return chain, self._refused.get(frame, "") if frame not in goals else ""

    def _ancestors(self, frame: str, goal: str = "") -> tuple[dict[str, int], str]:
        """The frame and those above it by the newest samples, up to `goal`, each with the stamp of the way to its
        parent (0: at any time); and the frame in which they run in a circle, or nothing."""
        chain: dict[str, int] = {}
        name = frame.lstrip("/")
        while name not in chain:
            edge = self._edges.get(name)
            newest = edge.history.newest() if isinstance(edge, _Moving) else edge
            chain[name] = edge.history.stamps[-1] if isinstance(edge, _Moving) and newest is not None else 0
            if newest is None or name == goal:
                return chain, ""
            name = newest.parent
        return chain, name

    def _latest_common(self, target: str, source: str) -> int | None:
        """The newest stamp at which all that moves between two frames is known, 0 if nothing moves; None if nothing
        connects them. Raises PoseError."""
        up, circle = self._ancestors(source, target)
        down, circle_below = self._ancestors(target, source)
        if circle or (circle_below and target not in up):
            raise PoseError(f"the transforms run in a circle through {circle or circle_below!r}")
        meeting = next((name for name in down if name in up), None)
        if meeting is None:
            return None
        stamps = []
        for chain in (up, down):
            for name, stamp_ns in chain.items():
                if name == meeting:
                    break
                stamps.append(stamp_ns)
        return min((stamp_ns for stamp_ns in stamps if stamp_ns), default=0)


def slerp(a: Quaternion, b: Quaternion, share: float) -> Quaternion:
    """Between two unit quaternions, the shorter way round; share 0 gives a, 1 gives b."""
    dot = a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
    sign = -1.0 if dot < 0 else 1.0
    angle = math.acos(min(1.0, abs(dot)))
    sine = math.sin(angle)
    if sine < 1e-9:
        return a
    first, second = math.sin((1.0 - share) * angle) / sine, sign * math.sin(share * angle) / sine
    return (
        first * a[0] + second * b[0],
        first * a[1] + second * b[1],
        first * a[2] + second * b[2],
        first * a[3] + second * b[3],
    )


def _sample(parent: str, transform: Any) -> Sample:
    """Raises ConversionError for a transform that is not finite or not rigid."""
    p, q = transform.translation, transform.rotation
    position, rotation = (float(p.x), float(p.y), float(p.z)), (float(q.x), float(q.y), float(q.z), float(q.w))
    if not all(map(math.isfinite, position)):
        raise ConversionError(f"position {position} is not finite")
    squared = sum(value * value for value in rotation)
    if not abs(squared - 1.0) < SQUARED_LENGTH_TOLERANCE:
        raise ConversionError(f"quaternion {rotation} has length {math.sqrt(squared):.4g}, not 1")
    return Sample(parent, position, _unit(rotation))


def _name(frame: str) -> str:
    """Without the slash in front that old drivers write. Raises PoseError."""
    name = frame.removeprefix("/")
    if not 0 < len(name) <= MAX_NAME:
        raise PoseError(f"a frame's name has 1 to {MAX_NAME} characters, not {len(name)}: {name[:40]!r}")
    return name


def _plus(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _between(a: Vector, b: Vector, share: float) -> Vector:
    rest = 1.0 - share
    return rest * a[0] + share * b[0], rest * a[1] + share * b[1], rest * a[2] + share * b[2]


def _conjugate(q: Quaternion) -> Quaternion:
    return -q[0], -q[1], -q[2], q[3]


def _unit(q: Quaternion) -> Quaternion:
    length = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    return q[0] / length, q[1] / length, q[2] / length, q[3] / length


def _multiply(a: Quaternion, b: Quaternion) -> Quaternion:
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by + ay * bw + az * bx - ax * bz,
        aw * bz + az * bw + ax * by - ay * bx,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def _rotate(q: Quaternion, v: Vector) -> Vector:
    x, y, z, w = q
    # t = 2 q x v, v' = v + w t + q x t
    tx, ty, tz = 2 * (y * v[2] - z * v[1]), 2 * (z * v[0] - x * v[2]), 2 * (x * v[1] - y * v[0])
    return (
        v[0] + w * tx + y * tz - z * ty,
        v[1] + w * ty + z * tx - x * tz,
        v[2] + w * tz + x * ty - y * tx,
    )
