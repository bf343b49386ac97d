# SPDX-License-Identifier: Apache-2.0
"""What a shared engine lacks of a scene is brought to it while nobody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from adatoken3d_ros.fleet.link import LinkError


class Sender:
    """Brings an engine what it lacks of a scene while nobody asks: the newest offer counts, in a thread that ends when
    it is there. While the engine cannot be reached it tries again, for some time.

    Args:
        send: sends an offer; raises LinkError.
        again: seconds between two attempts. attempts: how many, of each offer.
    """

    def __init__(self, send: Callable[[Any], None], again: float = 1.0, attempts: int = 120) -> None:
        self._send, self._again, self._attempts = send, again, attempts
        self._changed = threading.Condition()
        self._offer: Any = None
        self._running = self._closed = False

    def offer(self, what: Any) -> None:
        """Has this sent, and nothing older."""
        with self._changed:
            self._offer = what
            self._changed.notify()
            if not self._running and not self._closed:
                self._running = True
                threading.Thread(target=self._run, name="adatoken3d-sender", daemon=True).start()

    def close(self) -> None:
        """Sends nothing more."""
        with self._changed:
            self._closed, self._offer = True, None
            self._changed.notify()

    def _run(self) -> None:
        failed, last = 0, None
        while True:
            with self._changed:
                offer = self._offer
                if offer is not last:
                    failed, last = 0, offer
                if offer is None or failed >= self._attempts:
                    self._running = False
                    return
            try:
                self._send(offer)
                failed = 0
            except LinkError:  # a question will say what is wrong
                failed += 1
                with self._changed:
                    self._changed.wait_for(lambda offer=offer: self._offer is not offer, self._again)  # type: ignore[misc]
                continue
            with self._changed:
                if self._offer is offer:
                    self._offer = None
