# SPDX-License-Identifier: Apache-2.0
"""Every kind of attack that needs no ROS graph, what it attacks, and the errors that are documented there."""

from __future__ import annotations

from adatoken3d_ros.engine.budget.latency import LatencyError, LatencyModel
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.pruning.strategy import Strategy, StrategyError
from adatoken3d_ros.ros.bag import BagError, read_bag
from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.ros.inputs.pictures import LazyFrame
from adatoken3d_ros.ros.inputs.poses import PoseError, PoseSource
from adatoken3d_ros.scene.frames import FrameError
from adatoken3d_ros.scene.storage import SceneFileError, load_scene
from benchmarks import _hostile_door as door
from benchmarks import _hostile_files as files
from benchmarks._hostile import Attack

MESSAGES = (ConversionError, FrameError)
CHECKPOINT = (CheckpointError,)

ATTACKS: dict[str, Attack] = {
    "images": Attack(LazyFrame.frames, MESSAGES, door.image_attack),
    "compressed": Attack(LazyFrame.frames, MESSAGES, door.compressed_attack),
    "clouds": Attack(LazyFrame.frames, MESSAGES, door.cloud_attack),
    "poses": Attack(PoseSource.lookup, (PoseError, door.Refused), door.pose_attack),
    "questions": Attack(SceneQueue.submit, (door.Refused,), door.question_attack),
    "scenes": Attack(load_scene, (SceneFileError, OSError), files.scene_attack),
    "config": Attack(load, CHECKPOINT, files.checkpoint_attack("config.json")),
    "tokenizer": Attack(load, CHECKPOINT, files.checkpoint_attack("tokenizer.json")),
    "weights": Attack(load, CHECKPOINT, files.checkpoint_attack("model.safetensors")),
    "strategies": Attack(Strategy.load, (StrategyError, OSError), files.strategy_attack),
    "latency_cache": Attack(LatencyModel.load, (LatencyError, OSError), files.cache_attack),
    "bag_mcap": Attack(read_bag, (BagError,), files.bag_attack("mcap")),
    "bag_sqlite3": Attack(read_bag, (BagError,), files.bag_attack("sqlite3")),
}
