# SPDX-License-Identifier: Apache-2.0
"""What gates would take away from the answers, foreseen from what was mined: nothing pruned is run for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.information import FloatArray, Information, InformationError
from adatoken3d_ros.pruning.schedule import at_least_one


def expected_loss(
    information: Information,
    layers: Sequence[int],
    ratios: Sequence[float],
    order: NDArray[np.int64] | None = None,
) -> FloatArray:
    """(len(layers), len(ratios)) what a single gate there would lose, of one prompt with N spatial tokens.

    A gate before layer g keeps the tokens that the question reads most in layer g - 1; one before the first layer the
    first of `order` (N,). What the question reads of all others from layer g on is lost: their `norm` shares, where
    each layer counts by `residual_weight`. It is squared, as the divergence of a distribution that moves a little is.

    Raises:
        InformationError: for a gate before the first layer without an order.
    """
    weight = information.residual_weight / information.residual_weight.sum()
    found = np.empty((len(layers), len(ratios)))
    for row, g in enumerate(layers):
        if g:
            kept = np.argsort(-information.attention[g - 1], kind="stable")
        elif order is not None:
            kept = order
        else:
            raise InformationError("what a gate before the first layer keeps is not known: no order was given")
        read = weight[g:] @ information.norm[g:]
        lost = np.append(np.cumsum(read[kept][::-1])[::-1], 0.0)  # lost[k]: where k tokens stay
        found[row] = [lost[at_least_one(ratio, len(read))] ** 2 for ratio in ratios]
    return found
