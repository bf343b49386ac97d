# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay: our gate and its rivals behind one interface (`pruning.view.Policy`), one file each.

A policy sees one gate and returns the rows to keep; `decoder.prefill` removes the others. A new one is a file here and
a line in the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adatoken3d_ros.pruning.policies.adatoken import AdaToken
from adatoken3d_ros.pruning.policies.coarse_voxel import CoarseVoxel
from adatoken3d_ros.pruning.policies.controls import Random, Unpruned
from adatoken3d_ros.pruning.policies.divprune import DivPrune
from adatoken3d_ros.pruning.policies.fastv import FastV
from adatoken3d_ros.pruning.policies.ours import Ours
from adatoken3d_ros.pruning.policies.pyramiddrop import PyramidDrop, adatoken_release
from adatoken3d_ros.pruning.view import Policy, PolicyError

POLICIES: dict[str, Callable[..., Policy]] = {
    "none": Unpruned,
    "random": Random,
    "coarse_voxel": CoarseVoxel,
    "one_per_voxel": partial(CoarseVoxel, name="one_per_voxel", merge=False),
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "adatoken_release": adatoken_release,
    "adatoken_release_original": partial(adatoken_release, renumber=False),
    "adatoken": AdaToken,
    "divprune": DivPrune,
    "ours": Ours,
}
POLICY_NAMES = tuple(POLICIES)


def make_policy(name: str, **options: Any) -> Policy:
    """The policy called `name`, one of POLICY_NAMES.

    Raises:
        PolicyError: no such policy, or an option it does not have.
    """
    return made(POLICIES, name, options)


def made(table: Mapping[str, Callable[..., Policy]], name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of a table that is called `name`.

    Raises:
        PolicyError: no such policy, or an option it does not have.
    """
    if name not in table:
        raise PolicyError(f"no policy {name!r}; there are {', '.join(table)}")
    try:
        return table[name](**options)
    except TypeError as error:
        raise PolicyError(f"policy {name!r}: {error}") from error
