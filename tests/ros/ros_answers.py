# SPDX-License-Identifier: Apache-2.0
"""An answer with all that may belong to it, and the scene that it is about."""

from __future__ import annotations

import numpy as np
from ros_messages import at

from adatoken3d_ros.engine.answer import Answer, Box, Question, Status, TokenReport
from adatoken3d_ros.engine.events import SceneView
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.scene.evidence import Evidence, Observed

STAMP = 1_305_031_102_175_304_000

REPORT = TokenReport(
    xyz=np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32),
    rgb=np.array([[255, 128, 1], [0, 0, 2]], np.uint8),
    contribution=np.array([0.75, 0.25], np.float32),
    last_layer=np.array([7, 3]),
    retained=np.array([True, False]),
    spatial_per_layer=(2, 1),
    flops_per_layer=(10.0, 5.0),
    lorenz_share_60=0.2,
)
ANSWER = Answer(
    Question("Where?", latency_budget_ms=100.0),
    Status.TRUNCATED,
    text="there",
    status_message="cut",
    boxes=(Box((1.0, 2.0, 3.0), (0.1, 0.2, 0.3)),),
    stamp_ns=STAMP,
    times=StageTimes(1.0, 2.0, 3.0, 4.0, 5.0, 15.0),
    budget_met=False,
    spatial_tokens=2,
    retained_tokens=1,
    prefill_flops=15.0,
    prefill_flops_unpruned=20.0,
    strategy="ours",
    model_id="tiny@1",
    seed=3,
    report=REPORT,
    as_of_ns=STAMP,
    verdict=Observed.SEEN_THEN_GONE,
    verdict_reason="it was there",
    evidence=(
        Evidence((1.0, 2.0, 3.0), (0.1, 0.2, 0.3), STAMP - 5, STAMP, 2, 0.75),
        Evidence((4.0, 5.0, 6.0), (0.1, 0.2, 0.3), 1, 2, 1, 0.0, STAMP, (7.0, 8.0, 9.0), 0.5),
    ),
    coverage=0.25,
    goal=at(2.0),
)
SCENE = SceneView("map", REPORT.xyz, REPORT.rgb, np.array([4, 9]), {STAMP: at(1.0)}, STAMP)
