# SPDX-License-Identifier: Apache-2.0
"""How much memory a token map takes, and how it takes no more than it must."""

from __future__ import annotations

from adatoken3d_ros.scene.contributions import Contribution, Sums


class MapBytes:
    """What a `TokenMap` is beside its tokens: something that has a size.

    Its size is that of the tensors of its views, and of the table of their sums as it is allocated: with rows that are
    free, as the table grows by doubling and keeps what voxels leave behind.
    """

    _views: dict[int, Contribution]
    _sums: Sums | None

    def _added_up(self) -> Sums:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Of the views and the table of their sums."""
        return sum(view.nbytes for view in self._views.values()) + (self._sums.nbytes if self._sums else 0)

    def compact(self) -> None:
        """Makes the table of sums anew, as large as it must be: it never becomes smaller by itself."""
        if self._views:
            self._sums = None
            self._added_up()
