# SPDX-License-Identifier: Apache-2.0
"""How far a long command is and how long it still takes: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 10.0  # seconds between two lines of one step

# (step, done, total), total None where nobody knows it.
Report = Callable[[str, int, int | None], None]


@contextmanager
def step_progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """A function that is told how far each step is and shows it.

    Steps come one after the other. Where the console is no terminal a step has a line when it ends, and one every ten
    seconds until then; a line more says how long the rest of the step takes at the pace so far.
    """
    if not console.is_terminal:
        yield _lines(console, clock)
        return
    from rich import progress as shown

    columns = (shown.TextColumn("{task.description:<12}"), shown.BarColumn(), shown.MofNCompleteColumn())
    tasks: dict[str, Any] = {}
    with shown.Progress(
        *columns, shown.TimeElapsedColumn(), shown.TextColumn("left"), shown.TimeRemainingColumn(), console=console
    ) as bars:

        def report(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


def _lines(console: Console, clock: Callable[[], float]) -> Report:
    began: dict[str, float] = {}
    said: dict[str, float] = {}
    last = clock()

    def report(step: str, done: int, total: int | None) -> None:
        nonlocal last
        now = clock()
        if step not in began:  # what came before the first report of a step belongs to it
            began[step] = said[step] = last
        last = now
        finished = total is not None and done >= total
        if not finished and now < said[step] + _EVERY:
            return
        said[step] = now
        passed = now - began[step]
        text = f"{step}: {done}{'' if total is None else f' of {total}'}, {passed:.0f} s"
        if total is not None and 0 < done < total:
            text += f", about {passed * (total - done) / done:.0f} s left"
        console.print(text, highlight=False, soft_wrap=True)

    return report
