# SPDX-License-Identifier: Apache-2.0
"""Answers, token reports and scenes as messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.msg import Box3D, KeyFrame, KeyFrames, LayerTokens
from adatoken3d.msg import Evidence as EvidenceMsg
from adatoken3d.msg import TokenReport as TokenReportMsg
from numpy.typing import NDArray
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

from adatoken3d_ros.engine.answer import Answer, TokenReport
from adatoken3d_ros.engine.events import KeyFramesShown, SceneView
from adatoken3d_ros.engine.requests import LONGEST_TEXT
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.ros.outputs.fill import fill_pose, ns_to_stamp
from adatoken3d_ros.scene.evidence import Evidence
from adatoken3d_ros.text import shown

NAME = 200  # characters of a strategy or model: both come from files and directories


def header(stamp_ns: int, frame_id: str) -> Header:
    """A header with a sensor's stamp."""
    message = Header(frame_id=frame_id)
    ns_to_stamp(message.stamp, stamp_ns)
    return message


def pack_rgb(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 3) uint8 to the (N,) float32 that carries 0x00RRGGBB in its bits, as PCL and RViz read it."""
    wide = rgb.astype(np.uint32)
    return ((wide[:, 0] << 16) | (wide[:, 1] << 8) | wide[:, 2]).view(np.float32)


def cloud(head: Header, columns: Mapping[str, NDArray[Any]]) -> PointCloud2:
    """An unorganised cloud whose fields are all FLOAT32, little endian, in the order of `columns` (each (N,))."""
    names = list(columns)
    points = np.stack([np.asarray(columns[name], dtype="<f4") for name in names], axis=1)
    message = PointCloud2(header=head, height=1, width=len(points), is_bigendian=False, is_dense=True)
    message.fields = [
        PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1) for i, name in enumerate(names)
    ]
    message.point_step = 4 * len(names)
    message.row_step = message.point_step * len(points)
    message.data.frombytes(points.tobytes())
    return message


def scene_cloud(scene: SceneView) -> PointCloud2:
    """The token map: x y z rgb count."""
    x, y, z = scene.xyz.T
    columns = {"x": x, "y": y, "z": z, "rgb": pack_rgb(scene.rgb), "count": scene.count}
    return cloud(header(scene.stamp_ns, scene.frame_id), columns)


def key_frames_message(shown: KeyFramesShown) -> KeyFrames:
    """The pictures of the key frames, with where their patches are."""
    message = KeyFrames(header=header(shown.stamp_ns, shown.frame_id))
    if shown.voxels is not None:
        origin = message.voxel_origin
        (origin.x, origin.y, origin.z), message.voxel_size = shown.voxels.origin, shown.voxels.size
    for picture in shown.pictures:
        rows, columns = picture.grid
        frame = KeyFrame(fov=picture.fov, rows=rows, columns=columns, area=np.array(picture.area, np.float32))
        ns_to_stamp(frame.stamp, picture.stamp_ns)
        fill_pose(frame.pose, picture.pose)
        frame.places.frombytes(np.ascontiguousarray(picture.places, dtype=np.float32).tobytes())
        frame.jpeg.frombytes(picture.jpeg)
        message.frames.append(frame)
    return message


RETAINED_FIELDS = ("x", "y", "z", "rgb", "contribution", "last_layer", "retained")


def retained_cloud(report: TokenReport, stamp_ns: int, frame_id: str) -> PointCloud2:
    """One point for each spatial token of a question: x y z rgb contribution last_layer retained."""
    columns = (*report.xyz.T, pack_rgb(report.rgb), report.contribution, report.last_layer, report.retained)
    return cloud(header(stamp_ns, frame_id), dict(zip(RETAINED_FIELDS, columns, strict=True)))


def answer_message(answer: Answer, frame_id: str, now_ns: int) -> AnswerMsg:
    """An Answer as its message.

    Args:
        frame_id: of the scene.
        now_ns: the node's time, for the ages of the data; 0 if simulated time has not begun.
    """
    message = AnswerMsg(
        header=header(answer.stamp_ns, frame_id),
        # Longer ones were refused, and need not be carried to everybody.
        question=answer.question.text[:LONGEST_TEXT],
        text=answer.text,
        status=int(answer.status),
        status_message=shown(answer.status_message),
        data_age=_age(answer.stamp_ns, now_ns),
        **{f"{stage}_ms": getattr(answer.times, stage) for stage in (*STAGES, "total")},
        latency_budget_ms=float(answer.question.latency_budget_ms or 0.0),
        budget_met=answer.budget_met,
        spatial_tokens=answer.spatial_tokens,
        retained_tokens=answer.retained_tokens,
        prefill_flops=float(answer.prefill_flops),
        prefill_flops_unpruned=float(answer.prefill_flops_unpruned),
        strategy=shown(answer.strategy, NAME),
        model_id=shown(answer.model_id, NAME),
        seed=answer.seed,
        plan=answer.plan,
        predicted_ms=math.nan if answer.predicted is None else answer.predicted.total,
        confidence=answer.confidence,
        confirmed_age=_age(answer.confirmed_ns, now_ns),
        verdict=int(answer.verdict),
        verdict_reason=shown(answer.verdict_reason),
        evidence=[evidence_message(item) for item in answer.evidence],
        coverage=answer.coverage,
        goal_reason=shown(answer.goal_reason),
        probability=answer.probability,
        candidate_probabilities=answer.candidate_probabilities,
    )
    ns_to_stamp(message.as_of, answer.as_of_ns)
    if answer.goal is not None:
        message.goal_near.header = header(answer.stamp_ns, frame_id)
        fill_pose(message.goal_near.pose, answer.goal)
    for box in answer.boxes:
        item = Box3D()
        item.center.position.x, item.center.position.y, item.center.position.z = box.centre
        item.size.x, item.size.y, item.size.z = box.size
        message.boxes.append(item)
    return message


def evidence_message(evidence: Evidence) -> EvidenceMsg:
    """A piece of evidence as its message."""
    moved = evidence.moved_to is not None
    message = EvidenceMsg(
        views=evidence.views,
        contribution=evidence.contribution,
        moved=moved,
        moved_confidence=evidence.moved_confidence if moved else 0.0,
    )
    message.place.x, message.place.y, message.place.z = evidence.place
    message.extent.x, message.extent.y, message.extent.z = evidence.extent
    if evidence.moved_to is not None:
        message.moved_to.x, message.moved_to.y, message.moved_to.z = evidence.moved_to
    for stamp, time_ns in (
        (message.first_seen, evidence.first_ns),
        (message.last_seen, evidence.last_ns),
        (message.gone, evidence.gone_ns),
    ):
        ns_to_stamp(stamp, time_ns)
    return message


def _age(stamp_ns: int, now_ns: int) -> float:
    """Seconds; NaN where either is not known."""
    return (now_ns - stamp_ns) / 1e9 if stamp_ns and now_ns else math.nan


def report_message(answer: Answer, report: TokenReport, frame_id: str) -> TokenReportMsg:
    """Where the tokens of an answer went, layer by layer."""
    return TokenReportMsg(
        header=header(answer.stamp_ns, frame_id),
        question=answer.question.text,
        strategy=shown(answer.strategy, NAME),
        model_id=shown(answer.model_id, NAME),
        spatial_tokens=answer.spatial_tokens,
        retained_tokens=answer.retained_tokens,
        layers=[
            LayerTokens(layer=layer, spatial_tokens=int(tokens), flops=float(flops))
            for layer, (tokens, flops) in enumerate(zip(report.spatial_per_layer, report.flops_per_layer, strict=True))
        ],
        prefill_flops=float(answer.prefill_flops),
        prefill_flops_unpruned=float(answer.prefill_flops_unpruned),
        lorenz_share_60=float(report.lorenz_share_60),
    )
