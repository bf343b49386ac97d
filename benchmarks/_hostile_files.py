# SPDX-License-Identifier: Apache-2.0
"""Hostile files: scenes, checkpoints, strategies, latency caches and bags that are valid but for what is spoilt."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.budget.latency import TERMS, LatencyModel
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm.registry import load
from adatoken3d_ros.pruning.policies import POLICY_NAMES
from adatoken3d_ros.pruning.strategy import Strategy, default_strategy
from adatoken3d_ros.ros.bag import read_bag
from adatoken3d_ros.scene.frames import PosedFrame
from benchmarks._bags import write_bag
from benchmarks._hostile import Loss
from benchmarks._hostile_door import ANSWERED, good_frame, tiny

UNSPOILT = 0.05  # share of the files that are as they should be
DEEP = 20_000  # levels of a nested document
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, -1e308, 1e-308, math.nan, math.inf,
    "", "x", "9" * 5000, "\0", "a\n[FATAL] b", "x" * 100_000, [], {}, [[]], [1.0] * 3, ["a"] * 3, {"a": 1}, [None],
    [0] * 5000, [1e300] * 3,
]  # fmt: skip
TEXTS = [
    '!!int ""', '!!float ""', '!!timestamp "abc"', '!!bool "x"', "!!python/object/apply:os.system [ls]", "&a [*a]",
    "*a", "!!binary '='", "!!set {a, b}", "!!omap [a: 1]", "? [a]", "<<: {a: 1}", ".inf", "-.nan", "0x" + "f" * 6000,
    "9" * 6000, "1e999", "2001-99-99", "1:99:99", "'", '"\\ud800"', "\0", "\ufeff", "{", "[", "- " * 3000, "yes",
]  # fmt: skip


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, stretched, repeated or replaced in places."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(len(data), int(rng.expovariate(1 / 200)))
        how = rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif how == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif how == 4:
            data[at : at + 8] = struct.pack("<q", rng.choice([0, -1, 2**31, 2**62, 1]))
        else:
            data[at : at + rng.randrange(1, 9)] = bytes([rng.choice([0, 255, 127, 128, 34, 92])])
    return bytes(data)


def spoil_json(value: Any, rng: random.Random) -> Any:
    """The document with one of its values replaced, left out, added or repeated, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        if how < 0.15:
            return {**value, rng.choice(["", "x" * 1000, "__proto__", key + "x"]): rng.choice(VALUES)}
        return {**value, key: spoil_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        how = rng.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return value[:at] + value[at : at + 1] * rng.choice([2, 3, 1000]) + value[at:]
        return [*value[:at], spoil_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return value * rng.choice([-1, 2, 1000, 0.5, 10**9]) + rng.choice([0, 1])
    return rng.choice(VALUES)


def json_text(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace(":", ":" + "[" * DEEP + "]" * DEEP + ', "x":', 1)
    if rng.random() < 0.05:
        text = re.sub(r"\d+", "9" * 5000, text, count=1)
    return text.encode()


def spoil_document(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with spoilt values, or spoilt bytes."""
    if rng.random() < 0.3:
        return spoil_bytes(content, rng)
    return json_text(spoil_json(json.loads(content), rng), rng)


def spoil_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a spoilt header that still has its length, or spoilt bytes."""
    if rng.random() < 0.5:
        return spoil_bytes(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    inner = header.get("__metadata__", {})
    nested = next((name for name, text in inner.items() if text.startswith("{")), None)
    if nested is not None and rng.random() < 0.5:  # JSON inside of the metadata
        header["__metadata__"] = {**inner, nested: json_text(spoil_json(json.loads(inner[nested]), rng), rng).decode()}
    else:
        header = spoil_json(header, rng)
    text = json_text(header, rng)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def spoil_yaml(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return spoil_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {rng.choice(TEXTS)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def special(path: Path, rng: random.Random) -> bool:
    """Sometimes puts something in the file's place that is no file; whether it did."""
    if rng.random() > 0.02:
        return False
    path.unlink(missing_ok=True)
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to("/dev/zero")
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.symlink_to(path)
    elif how == 4:
        path.write_bytes(b"")
    else:
        with path.open("wb") as file:
            file.truncate(40 * 2**30)
    return True


def put(path: Path, content: bytes) -> None:
    """A new file in the place of whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _served(path: Path, spoil: Callable[[bytes, random.Random], bytes], rng: random.Random, original: bytes) -> None:
    put(path, original)
    if rng.random() > UNSPOILT and not special(path, rng):
        put(path, spoil(original, rng))


# --- attacks ----------------------------------------------------------------------------------------------------------


def scene_attack(folder: Path) -> Callable[[random.Random], object]:
    """A scene that was accepted can be asked about, and a good one loads afterwards; bytes that were changed on the way
    are not accepted."""
    engine = Engine(*load(tiny(folder))[:2])
    scene = engine.open(SessionConfig(max_new_tokens=2))
    for index in range(3):
        scene.observe(good_frame(index))
    scene.encode_pending()
    path, whole = folder / "spoilt.safetensors", folder / "whole.safetensors"
    scene.save(whole)
    original = whole.read_bytes()
    assert len(scene.poses) == 3
    tokens = scene.tokens()
    assert tokens is not None
    before = tokens.features.clone()

    def attempt(rng: random.Random) -> None:
        in_place = rng.random() < 0.5
        _served(path, spoil_bytes if in_place else spoil_tensors, rng, original)
        regular = path.is_file() and path.stat().st_size < 10**8
        changed = regular and path.read_bytes() != original
        try:
            scene.load(path)
            asked = engine.ask(scene, Question("What is there?"))
            assert asked.status in ANSWERED, f"of a scene that was accepted: {asked.status.name} {asked.status_message}"
            found = scene.tokens()
            same = found is not None and torch.equal(found.features, before)
            assert not (in_place and changed and not same), "damage was accepted"
        finally:
            _good_scene(engine, scene, whole)

    return attempt


def _good_scene(engine: Engine, scene: Scene, whole: Path) -> None:
    try:
        scene.load(whole)
    except (ValueError, OSError) as error:
        raise Loss(f"the good scene afterwards: {error}") from error
    answer = engine.ask(scene, Question("What is there?"))
    if answer.status not in ANSWERED:
        raise Loss(f"the good scene afterwards: {answer.status.name} {answer.status_message}")


def checkpoint_attack(name: str) -> Callable[[Path], Callable[[random.Random], object]]:
    """One file of a checkpoint."""

    def prepare(folder: Path) -> Callable[[random.Random], object]:
        model = tiny(folder)
        path = model / name
        original = path.read_bytes()
        spoil = spoil_tensors if name.endswith(".safetensors") else spoil_document

        def attempt(rng: random.Random) -> None:
            _served(path, spoil, rng, original)
            load(model)

        return attempt

    return prepare


def strategy_attack(folder: Path) -> Callable[[random.Random], object]:
    path = folder / "strategy.yaml"
    originals = []
    for name in POLICY_NAMES:
        default_strategy(name, 4).save(path)
        originals.append(path.read_bytes())

    def attempt(rng: random.Random) -> None:
        _served(path, spoil_yaml, rng, rng.choice(originals))
        Strategy.load(path)

    return attempt


def cache_attack(folder: Path) -> Callable[[random.Random], object]:
    """A latency model that was accepted can plan with budgets."""
    model, tokenizer, _ = load(tiny(folder))
    path, key = folder / "latency.json", {"model": "m", "policy": "ours"}
    coefficients = {name: [1e-6] * len(terms) for name, terms in TERMS.items()}
    LatencyModel(coefficients, key, {name: [1.0, 1.1, 0.9] for name in TERMS}).save(path)
    original = path.read_bytes()

    def attempt(rng: random.Random) -> None:
        _served(path, spoil_document, rng, original)
        latency = LatencyModel.load(path, key)
        engine = Engine(model, tokenizer)
        scene = engine.open(SessionConfig(max_new_tokens=2))
        scene.observe(good_frame(0))
        scene.encode_pending()
        scene.controller.latency = latency
        for budget in (50.0, 5000.0):
            answer = engine.ask(scene, Question("What is there?", latency_budget_ms=budget))
            assert answer.status.name != "ERROR", answer.status_message

    return attempt


def bag_attack(kind: str) -> Callable[[Path], Callable[[random.Random], object]]:
    """A bag of a format, `mcap` or `sqlite3`: its data, its description, or what the data says about types."""

    def prepare(folder: Path) -> Callable[[random.Random], object]:
        whole = write_bag(folder / "whole", two_frames(), kind)
        (data,) = (file for file in whole.iterdir() if file.suffix != ".yaml")
        described, recorded = (whole / "metadata.yaml").read_bytes(), data.read_bytes()
        names = [f'"{name}"'.encode() for name in ("sensor_msgs/msg/Image",)] + [b"sensor_msgs/msg/Image", b"cdr"]
        bag = folder / "spoilt"
        shutil.copytree(whole, bag)
        target = bag / data.name

        def attempt(rng: random.Random) -> None:
            put(bag / "metadata.yaml", described)
            put(target, recorded)
            how = rng.random()
            if how < 0.2:
                _served(bag / "metadata.yaml", spoil_yaml, rng, described)
            elif how < 0.4:
                old = rng.choice(names)
                new = rng.choice(
                    [b"sensor_msgs/msg/Imag3", b"x/msg/__import__('os')", b"", b"\0" * len(old), b"a" * 99]
                )
                put(target, recorded.replace(old, new.ljust(len(old))[: len(old)], rng.choice([1, -1])))
            elif how < 0.6 and kind == "sqlite3":
                spoil_rows(target, rng)
            else:
                _served(target, spoil_bytes, rng, recorded)
            path = target if rng.random() < 0.3 else bag
            for _ in read_bag(path, on_drop=lambda *_: None):
                pass

        return attempt

    return prepare


def spoil_rows(path: Path, rng: random.Random) -> None:
    """Values in the tables of a database."""
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), connection:
        table = rng.choice([row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")])
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        value = rng.choice([None, 0, -1, 2**62, 1.5, "x", "", "a\n[FATAL] b", rng.randbytes(30), b"\0" * 8, "x/msg/Y"])
        with contextlib.suppress(sqlite3.Error):  # a key twice
            connection.execute(f"UPDATE {table} SET {rng.choice(columns)} = ?", (value,))


def two_frames() -> list[PosedFrame]:
    """Of 8 x 6 pixels."""
    rng, K = np.random.default_rng(0), np.array([[50.0, 0, 3.5], [0, 50.0, 2.5], [0, 0, 1]])
    frames = []
    for second in (1, 2):
        T = np.eye(4)
        T[0, 3] = second
        depth = rng.uniform(0.9, 1.1, (6, 8)).astype(np.float32)
        frames.append(PosedFrame(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), depth, K, T, second * 10**9))
    return frames
