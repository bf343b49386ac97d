# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that cannot get lost.

Python turns SIGINT into a KeyboardInterrupt wherever it happens to be. Where that is the callback of a weak reference,
as often while modules are imported, it is printed and forgotten; where an import tells its own story of what went
wrong, another exception arrives. So it is noted, too.
"""

from __future__ import annotations

import signal
from types import FrameType

_came: list[int] = []


def arm() -> None:
    """From now on SIGINT and SIGTERM are noted and interrupt; SIGINT not where the shell ignores it (`command &`)."""
    _came.clear()
    signal.signal(signal.SIGTERM, _note)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _note)


def came() -> bool:
    """Whether there was an interrupt since `arm`."""
    return bool(_came)


def check() -> None:
    """Raises the KeyboardInterrupt of an interrupt that was lost on its way; to be called where one waits."""
    if _came:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt
