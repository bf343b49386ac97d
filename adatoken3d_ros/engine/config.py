# SPDX-License-Identifier: Apache-2.0
"""What a scene may be told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from adatoken3d_ros.engine.budget.controller import BudgetConfig, Infeasible, Reuse
from adatoken3d_ros.scene.carving import CarvingConfig
from adatoken3d_ros.scene.goal import GoalConfig
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.window import OriginMode
from adatoken3d_ros.settings import OF_CHOSEN_FRAMES, Settings


@dataclass(frozen=True)
class SessionConfig:
    """What a scene may be told: `settings.py` says what each field means.

    Attributes:
        template: name of one of the model's prompt templates; empty: its own choice.
        unsure_below: confidence below which an answer counts as unsure.
        tell_poses: whether the prompt says where each view was taken from.
    """

    key_frames: KeyFrameConfig = field(default_factory=KeyFrameConfig)
    max_depth: float = OF_CHOSEN_FRAMES["scene.max_depth"]
    origin: tuple[float, float, float] = OF_CHOSEN_FRAMES["scene.origin"]
    origin_mode: OriginMode = OriginMode(OF_CHOSEN_FRAMES["scene.origin_mode"])
    map_id: str = OF_CHOSEN_FRAMES["scene.map_id"]
    question_views: int = OF_CHOSEN_FRAMES["scene.question_views"]
    max_new_tokens: int = OF_CHOSEN_FRAMES["max_new_tokens"]
    template: str = ""
    tell_poses: bool = OF_CHOSEN_FRAMES["model.tell_poses"]
    unsure_below: float = OF_CHOSEN_FRAMES["unsure_below"]
    seed: int = OF_CHOSEN_FRAMES["seed"]
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    memory_limit_mb: float = OF_CHOSEN_FRAMES["memory.limit_mb"]
    tombstones: int = OF_CHOSEN_FRAMES["memory.tombstones"]
    tombstone_age: float = OF_CHOSEN_FRAMES["memory.tombstone_age"]
    moved_within: float = OF_CHOSEN_FRAMES["memory.moved_within"]
    goal: GoalConfig = field(default_factory=GoalConfig)


def session_config(settings: Settings) -> SessionConfig:
    """What the settings say of a scene; the fields of key frames are called as their settings are."""
    frames = {field.name: settings[f"scene.{field.name}"] for field in fields(KeyFrameConfig)}
    frames["carving"] = CarvingConfig() if frames["carving"] else None
    return SessionConfig(
        key_frames=KeyFrameConfig(**frames),
        max_depth=settings["scene.max_depth"],
        origin=settings["scene.origin"],
        origin_mode=OriginMode(settings["scene.origin_mode"]),
        map_id=settings["scene.map_id"],
        question_views=settings["scene.question_views"],
        max_new_tokens=settings["max_new_tokens"],
        template=settings["model.template"],
        tell_poses=settings["model.tell_poses"],
        unsure_below=settings["unsure_below"],
        seed=settings["seed"],
        budget=BudgetConfig(Infeasible(settings["budget.infeasible"]), Reuse(settings["budget.reuse"])),
        memory_limit_mb=settings["memory.limit_mb"],
        tombstones=settings["memory.tombstones"],
        tombstone_age=settings["memory.tombstone_age"],
        moved_within=settings["memory.moved_within"],
        goal=GoalConfig(settings["goal.distance"], settings["goal.clearance"], settings["goal.height"]),
    )
