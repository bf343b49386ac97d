# SPDX-License-Identifier: Apache-2.0
"""Published ways to prune that no robot needs: they are there to be compared with, one file each.

They are policies as those of `pruning.policies` are (`pruning.view.Policy`). What a rival needs and a model does not
offer is said by a PolicyError when it is asked to select.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adatoken3d_ros.lab.rivals.bypass import Bypass
from adatoken3d_ros.lab.rivals.cdpruner import CDPruner
from adatoken3d_ros.lab.rivals.evs import EVS
from adatoken3d_ros.lab.rivals.framefusion import FrameFusion
from adatoken3d_ros.lab.rivals.holov import HoloV
from adatoken3d_ros.lab.rivals.sparsevlm import SparseVLM
from adatoken3d_ros.lab.rivals.transprune import TransPrune
from adatoken3d_ros.lab.rivals.visionzip import VisionZip
from adatoken3d_ros.pruning.policies import POLICIES, made
from adatoken3d_ros.pruning.view import Policy

_RIVALS: dict[str, Callable[..., Policy]] = {
    "cdpruner": CDPruner,
    "visionzip": VisionZip,
    "holov": HoloV,
    "sparsevlm": SparseVLM,
    "evs": EVS,
    "framefusion": FrameFusion,
    "transprune": TransPrune,
    "bypass": Bypass,
}
RIVAL_NAMES = tuple(_RIVALS)


def make_rival(name: str, **options: Any) -> Policy:
    """The policy called `name`, one of RIVAL_NAMES or of `pruning.policies.POLICY_NAMES`.

    Raises:
        PolicyError: no such policy, or an option it does not have.
    """
    return made({**POLICIES, **_RIVALS}, name, options)
