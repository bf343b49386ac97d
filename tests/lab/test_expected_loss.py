# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.expected_loss import expected_loss
from adatoken3d_ros.lab.information import Information, InformationError

# Two layers, four tokens. Attention writes three times as much in the second layer.
ATTENTION = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1]])
NORM = np.array([[0.1, 0.1, 0.1, 0.1], [0.0, 0.2, 0.4, 0.0]])
ONE = Information(1, 1, np.ones(2), np.ones(2), np.array([0.1, 0.3]), ATTENTION, NORM, NORM)


def test_by_hand() -> None:
    # Before layer 1 the first two tokens stay, by the attention of layer 0; 0.4 of the norm is lost, 3/4 of it counts.
    # Before layer 0 tokens 2 and 1 stay: of 0 and 3 a quarter of 0.1 each is lost. A single token: the first of each.
    found = expected_loss(ONE, [0, 1], [0.5, 0.25], np.array([2, 1, 0, 3]))
    assert found == pytest.approx(np.array([[0.05, 0.05 + 0.175], [0.3, 0.45]]) ** 2)


def test_more_tokens_never_lose_more() -> None:
    found = expected_loss(ONE, [1], [1.0, 0.75, 0.5, 0.25])
    assert found[0, 0] == 0 and (np.diff(found[0]) >= 0).all()


def test_a_gate_before_the_first_layer_needs_an_order() -> None:
    with pytest.raises(InformationError, match="no order"):
        expected_loss(ONE, [0], [0.5])
