# SPDX-License-Identifier: Apache-2.0
"""Which stamps are believed: wild ones, time that jumps back, and two clocks on one topic. Pure bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable

from adatoken3d_ros.ros.inputs.transforms import JUMP_BACK_NS

# How far ahead of the clock a stamp may be: clocks differ, wild stamps are refused.
FUTURE_NS = 10_000_000_000
# Messages of another clock in a row after which the one that was followed has fallen silent.
PATIENCE = 10
# Messages of the clock that is followed after which another one is forgotten.
MEMORY = 100

Refusal = tuple[str, str]  # reason, text with the stamp


def bad_stamp(stamp_ns: int, clock_ns: float) -> Refusal | None:
    """Why a stamp cannot be used, else None; `clock_ns` is now, or infinite."""
    text = f"the stamp {stamp_ns / 1e9:.6f} s"
    if stamp_ns <= 0:
        return "no_stamp", f"{text} is not set"
    ahead = stamp_ns - clock_ns - FUTURE_NS
    return ("future_stamp", f"{text} is {ahead / 1e9:.3f} s later than may be believed") if ahead > 0 else None


class Clocks:
    """Judges the stamps of one or two streams, in the order in which they come.

    A stamp more than FUTURE_NS ahead of the clock is refused as `future_stamp`, and so is one that leaps ahead of the
    clock and of its own stream by more than JUMP_BACK_NS, unless the one before it did so, too: one wild stamp would
    otherwise make all later ones look as if time had jumped back.

    Stamps that go back by more than JUMP_BACK_NS are a jump in time (a bag that starts again), unless two clocks are
    known to share the stream: because it has several publishers, or because the time before a jump went on after it.
    Then the clock that is followed stays, and what is stamped by another one is refused as `two_clocks`, before or
    behind. When PATIENCE of the other's messages have come without one in between, the followed clock has fallen
    silent and the other one counts.

    Args:
        streams: names of one or two streams.
        clock_ns: time now, infinite if nobody knows it.
        publishers: how many write to a stream; asked only for a stamp that does not go on from the last one.
        name: what people call a stream: its topic on the graph.

    Attributes:
        newest: greatest stamp of each stream since the last jump, 0 before there is one; the caller's to keep.
        jumped: whether the last stamp was a jump back.
    """

    def __init__(
        self,
        streams: tuple[str, ...],
        clock_ns: Callable[[], float] = lambda: math.inf,
        publishers: Callable[[str], int] = lambda stream: 1,
        name: Callable[[str], str] = str,
    ) -> None:
        self.streams = streams
        self.newest = dict.fromkeys(streams, 0)
        self.jumped = False
        self._clock_ns = clock_ns
        self._publishers = publishers
        self._name = name
        self._ahead = dict.fromkeys(streams, -math.inf)  # of the clock, by the last stamp that was believed
        self._leapt = dict.fromkeys(streams, False)
        self._old = dict.fromkeys(streams, 0)  # newest stamp of a stream that has not jumped back yet as the other has
        self._former = dict.fromkeys(streams, 0)  # newest stamp before the last jump, until time has caught up with it
        self._began = dict.fromkeys(streams, 0)  # the first stamp since the last jump
        self._shared = dict.fromkeys(streams, 0)  # messages for which two clocks are remembered
        self._others = dict.fromkeys(streams, 0)  # messages of another clock in a row

    def judge(self, stream: str, stamp_ns: int) -> Refusal | None:
        """Why a message is not used, else None; afterwards `jumped` says whether all before it is of another time."""
        self.jumped = False
        clock_ns = self._clock_ns()
        ahead = stamp_ns - clock_ns
        refusal = (
            bad_stamp(stamp_ns, clock_ns)
            or self._leap(stream, stamp_ns, ahead)
            or self._is_old(stream, stamp_ns)
            or self._of_another_clock(stream, stamp_ns, ahead)
        )
        if refusal is not None:
            return refusal
        self._ahead[stream], self._old[stream] = ahead, 0
        if stamp_ns < self.newest[stream] - JUMP_BACK_NS:
            self._jump(stream, stamp_ns)
        elif stamp_ns >= self._former[stream] - JUMP_BACK_NS:
            self._former[stream] = 0
        if not self.newest[stream]:
            self._began[stream] = stamp_ns
        return None

    def forget(self) -> None:
        """All that waited was dropped: the next stamp of each stream is the first."""
        self.newest = dict.fromkeys(self.streams, 0)

    def _other(self, stream: str) -> str:
        return self.streams[0] if stream == self.streams[-1] else self.streams[-1]

    def _jump(self, stream: str, stamp_ns: int) -> None:
        self.jumped = True
        other = self._other(stream)
        old = self.newest[other] or self._old[other]
        for name, newest in self.newest.items():
            self._former[name] = newest or self._former[name]
        self.forget()
        self._old[other] = old if other != stream and old > stamp_ns + JUMP_BACK_NS else 0

    def _leap(self, stream: str, stamp_ns: int, ahead: float) -> Refusal | None:
        """Of a stamp that is ahead of the clock as its stream was not; the second such one in a row is believed."""
        before, self._leapt[stream] = self._leapt[stream], False
        leap = ahead - max(0.0, self._ahead[stream])
        if not self.newest[stream] or stamp_ns <= self.newest[stream] + JUMP_BACK_NS or leap <= JUMP_BACK_NS or before:
            return None
        self._leapt[stream] = True
        why = f"is {ahead / 1e9:.3f} s ahead of the clock, and those before it were not"
        return "future_stamp", f"the stamp {stamp_ns / 1e9:.6f} s {why}"

    def _is_old(self, stream: str, stamp_ns: int) -> Refusal | None:
        """Of a message that was under way while the other stream jumped back."""
        old, other = self._old[stream], self._other(stream)
        if old and stamp_ns > self.newest[other] + JUMP_BACK_NS and stamp_ns >= old - JUMP_BACK_NS:
            return "time_jump", f"the stamp {stamp_ns / 1e9:.6f} s is of before {self._name(other)} has jumped back"
        return None

    def _of_another_clock(self, stream: str, stamp_ns: int, ahead: float) -> Refusal | None:
        newest, former = self.newest[stream], self._former[stream]
        gap = stamp_ns - newest if newest else 0
        if not gap < -JUMP_BACK_NS and not self._is_ahead(stream, gap, ahead):
            away = False
        elif gap > 0 and 0 < former <= stamp_ns + JUMP_BACK_NS:
            away = True
        else:
            away = bool(self._shared[stream]) or self._publishers(stream) > 1
        if not away:
            self._others[stream], self._shared[stream] = 0, max(0, self._shared[stream] - 1)
            return None
        self._others[stream] += 1
        if self._others[stream] > PATIENCE:
            self._others[stream] = self._shared[stream] = 0
            return None
        self._shared[stream] = MEMORY
        where = f"{abs(gap) / 1e9:.3f} s {'ahead of' if gap > 0 else 'behind'} those that are used"
        return "two_clocks", f"the stamp {stamp_ns / 1e9:.6f} s is {where}: two clocks on one topic"

    def _is_ahead(self, stream: str, gap: int, ahead: float) -> bool:
        """Whether a stamp `gap` after the last one is of a clock that is ahead of that one's; silence is none."""
        if gap <= JUMP_BACK_NS:
            return False
        if math.isfinite(ahead) and math.isfinite(self._ahead[stream]):
            return ahead - self._ahead[stream] > JUMP_BACK_NS
        # Without a clock of our own: it is where the time before the jump would be by now.
        since = self.newest[stream] - self._began[stream]
        return abs(self.newest[stream] + gap - self._former[stream] - since) <= JUMP_BACK_NS
