# SPDX-License-Identifier: Apache-2.0
"""What has come in, what became of it and what is wrong with it: the books behind /diagnostics and NO_SCENE."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rclpy.node import Node

from adatoken3d_ros.ros.inputs.pairing import Assembler
from adatoken3d_ros.ros.inputs.subscriptions import node_of
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.text import quoted

NOT_YET = "n/a"
RATE_SECONDS = 10.0  # rates, gaps and warnings are those of the last seconds
AGES = 2000  # frames whose age at acceptance is remembered; a minute at 30 Hz
QUIET = ("duplicate_stamp", "out_of_order", "time_jump")  # dropped for a reason that need not alarm anybody


class Arrivals:
    """When the messages of one input came, in the last RATE_SECONDS; times in seconds on any steady clock."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        """A message has come."""
        self._times.append(now)
        while now - self._times[0] > RATE_SECONDS:
            self._times.popleft()

    def clear(self) -> None:
        """As if none had come."""
        self._times.clear()

    def silent(self, now: float) -> float | None:
        """Since the last message; None if there was none."""
        return now - self._times[-1] if self._times else None

    def rate(self, now: float) -> float | None:
        """Messages a second, with the time since the last one counted where it is longer; None for less than two."""
        recent = [then for then in self._times if now - then <= RATE_SECONDS]
        if len(recent) < 2:
            return None
        usual = (recent[-1] - recent[0]) / (len(recent) - 1)
        span = recent[-1] - recent[0] + max(0.0, now - recent[-1] - usual)
        return (len(recent) - 1) / span if span > 0 else None

    def gap(self, now: float) -> float | None:
        """The longest time without a message, until now; None before the first."""
        if not self._times:
            return None
        times = [*self._times, now]
        return max(b - a for a, b in zip(times, times[1:], strict=False))


@dataclass(frozen=True)
class InputState:
    """The inputs as they are now; times in seconds.

    Attributes:
        active: whether inputs are subscribed to.
        silent: {input: seconds since its last message, None if there was none}; only the inputs that are needed.
        rate: {input: messages a second, None before there are two}; only images and clouds.
        gap: {input: longest silence of the last seconds, None before the first message}.
        since_start: since the inputs were started.
        since_pair: since colour and depth last matched, None if they never did.
        apart: difference of the newest colour and depth stamps, None before both have come.
        waiting: why the newest pair waits for its pose; empty if none waits.
        problem: the last frame or message that could not be used, and why; empty if the last one was good.
        warnings: what is wrong with topics whose frames are used all the same.
        values: counters.
        names: {input: its topic on the graph}, after remapping.
        unheard: inputs that nobody publishes.
        mismatches: publishers that cannot reach the inputs, in words.
    """

    active: bool
    silent: Mapping[str, float | None] = field(default_factory=dict)
    rate: Mapping[str, float | None] = field(default_factory=dict)
    gap: Mapping[str, float | None] = field(default_factory=dict)
    since_start: float = 0.0
    since_pair: float | None = None
    apart: float | None = None
    waiting: str = ""
    problem: str = ""
    warnings: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    unheard: Container[str] = ()
    mismatches: Sequence[str] = ()

    def name(self, topic: str) -> str:
        """A topic as it is on the graph; says so if nobody publishes it."""
        return self.names.get(topic, topic) + (" (nobody publishes it)" if topic in self.unheard else "")

    def explain(self) -> str:
        """Why there is no scene yet, in words."""
        if not self.active:
            return "the inputs are not active"
        found = list(self.mismatches)
        missing = [self.name(topic) for topic, silent in self.silent.items() if silent is None]
        if missing:
            found += [f"nothing has come on {', '.join(missing)}", *filter(None, [self.problem])]
        return "; ".join(found) or self.problem or self.waiting or "no frame has been matched, or none was encoded yet"


class InputRecord:
    """Counts messages and frames over all that the inputs go through, and remembers the newest problem.

    Args:
        clock: seconds, monotonic.

    Attributes:
        lock: reentrant; held by whoever changes what the executor's and the frames' threads share.
        problem: the last frame or message that could not be used, and why; empty if the last one was good.
        refused: pose messages and transforms that were refused.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.lock = threading.RLock()
        self.problem = ""
        self.refused: Counter[str] = Counter({"poses.refused": 0, "transforms.refused": 0})
        self._hidden = False  # the problem is one that only a conversion finds
        self._checked = False  # the frame that is being taken has passed its checks
        self._arrivals: dict[str, Arrivals] = {}
        self._counts: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # what became of messages that came before the inputs' last start
        self._fates: Counter[str] = Counter()
        self._ages: deque[float] = deque(maxlen=AGES)
        self._happened: set[str] = set()  # since the inputs' last start
        self._needed: tuple[str, ...] = ()
        self._started = 0.0
        self._paired_at: float | None = None

    @property
    def fates(self) -> Counter[str]:
        """What became of the frames until now; a copy, because the thread that takes them counts on."""
        with self.lock:
            return self._fates.copy()

    # --- what happens, in this order ----------------------------------------------------------------------------------

    def begin(self, needed: tuple[str, ...]) -> None:
        """The inputs start; `needed` are the topics that must carry something."""
        self._arrivals.clear()
        self._ages.clear()
        self._happened.clear()
        self._needed = needed
        self.problem = ""
        self._paired_at = None
        self._started = self._clock()

    def first(self, event: str) -> bool:
        """Whether this is the first event of its kind since the inputs' last start. Any thread."""
        with self.lock:
            known = event in self._happened
            self._happened.add(event)
            return not known

    def received(self, topic: str) -> bool:
        """A message has come; returns whether it is the topic's first since the inputs' last start."""
        self.arrived(topic).add(self._clock())
        self._counts[topic] += 1
        return self.first(f"message on {topic}")

    def paired(self) -> None:
        """Colour and geometry have matched."""
        self._paired_at = self._clock()

    def accepted(self, age_ms: float) -> None:
        """A frame is handed over, so old by its stamp."""
        self._ages.append(age_ms)

    def dropped(self, reason: str, text: str) -> None:
        """A message or a pair gives no frame."""
        if reason not in QUIET:
            with self.lock:
                self.problem, self._hidden = text, False

    def frame_done(self, kind: str, problem: str) -> None:
        """Counts what became of a frame; `problem` is empty if nothing is wrong with it. Any thread."""
        with self.lock:
            self._fates[kind] += 1
            if kind in ("superseded", "stopped"):
                return
            if problem:
                self.problem, self._hidden = problem, self._checked
            self._checked = False

    def is_well(self, converted: bool) -> None:
        """A frame has passed its checks, and its conversion if `converted`; frames of a still camera are not."""
        with self.lock:
            self._checked = True
            if converted or not self._hidden:
                self.problem = ""

    def ended(self, counters: Mapping[str, int]) -> None:
        """The inputs have stopped; what became of their messages counts on."""
        self._before.update(counters)

    # --- what is known ------------------------------------------------------------------------------------------------

    def arrived(self, topic: str) -> Arrivals:
        """When messages of a topic came."""
        return self._arrivals.setdefault(topic, Arrivals())

    def state(self, assembler: Assembler | None, counts: Mapping[str, int]) -> InputState:
        """What diagnostics should know.

        Args:
            assembler: None while the inputs are stopped.
            counts: further counters.
        """
        values = {**self._values(assembler), **counts}
        if assembler is None:
            return InputState(active=False, values=values)
        now = self._clock()
        newest = assembler.pairer.newest
        return InputState(
            active=True,
            silent={name: self.arrived(name).silent(now) for name in self._needed},
            rate={name: self.arrived(name).rate(now) for name in assembler.pairer.streams},
            gap={name: self.arrived(name).gap(now) for name in assembler.pairer.streams},
            since_start=now - self._started,
            since_pair=None if self._paired_at is None else now - self._paired_at,
            apart=(max(newest.values()) - min(newest.values())) / 1e9 if all(newest.values()) else None,
            waiting=assembler.why_waiting(),
            problem=self.problem,
            values=values,
        )

    def _values(self, assembler: Assembler | None) -> dict[str, Any]:
        values: dict[str, Any] = {f"received.{name}": count for name, count in sorted(self._counts.items())}
        counters = self._before.copy()
        if assembler is not None:
            counters.update(assembler.counters())
            for name in assembler.pairer.streams:
                values[f"pending.{name}"] = assembler.pairer.pending(name)
            values["pairs.waiting"] = assembler.waiting
        values.update(sorted(counters.items()))
        for percent in (50, 95):
            age = f"{np.percentile(self._ages, percent):.2f}" if self._ages else NOT_YET
            values[f"accepted.age_ms.p{percent}"] = age
        values.update(self.refused)
        return values


class TopicWarnings:
    """One warning for each stream, the last one. `add` belongs to the executor's thread, `texts` to any.

    Args:
        node: knows the graph, and writes the log.
        clock: seconds, monotonic.
    """

    def __init__(self, node: Node, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._clock = clock
        self._found: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def _name(self, stream: str) -> str:
        """As it is on the graph, where it may be called so already."""
        return stream if stream.startswith("/") else str(self._node.resolve_topic_name(stream))

    def publishers(self, stream: str) -> list[str]:
        """The nodes that write to a stream, as far as the graph tells."""
        return sorted(map(node_of, self._node.get_publishers_info_by_topic(self._name(stream))))

    def add(self, stream: str, text: str) -> None:
        """Something is wrong now; an empty text: nothing is any more."""
        name = self._name(stream)
        if not text:
            with self._lock:
                self._found.pop(name, None)
            return
        writers = self.publishers(stream)
        who = f"; it has {len(writers)} publishers: {quoted(writers)}" if len(writers) > 1 else ""
        text = f"{name}: {text}{who}"
        with self._lock:
            self._found[name] = self._clock(), text
        self._node.get_logger().warning(text, throttle_duration_sec=WARN_SECONDS)

    def texts(self) -> tuple[str, ...]:
        """What was wrong in the last RATE_SECONDS."""
        now = self._clock()
        with self._lock:
            return tuple(text for _, (then, text) in sorted(self._found.items()) if now - then <= RATE_SECONDS)

    def clear(self) -> None:
        """The inputs start anew."""
        with self._lock:
            self._found.clear()
