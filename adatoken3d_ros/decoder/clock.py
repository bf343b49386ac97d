# SPDX-License-Identifier: Apache-2.0
"""How long a device was busy with parts of a prefill, without waiting for it in between."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Sums the device time spent inside `with`; CUDA is asked only at the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def _mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *error: object) -> None:
        self._mark()

    def seconds(self) -> float:
        if self._cuda and self._marks:
            self._marks[-1].synchronize()
        spans = zip(self._marks[::2], self._marks[1::2], strict=True)
        return sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans)
