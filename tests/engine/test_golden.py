# SPDX-License-Identifier: Apache-2.0
"""What the model that comes with the package says about one furnished room, to the letter, unpruned and pruned.

A change of these answers is a change of what users get: of the weights, the rendered room, or anything between a frame
and a word. Where that was meant, `python -m tests.engine.test_golden` writes them anew; read the difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.loading import fitted_strategies, make_strategy
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.weights import embedded_path
from tests.engine.scenes import ask, new_scene

GOLDEN = Path(__file__).parent / "golden.json"
RENEW = "python -m tests.engine.test_golden"
SEED = 2  # of the room, split `test`
STRATEGIES = ("none", "ours")


def fingerprint(model: Path) -> str:
    """Of the weights, the words and the sizes."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        found.update((model / name).read_bytes())
    return found.hexdigest()[:16]


def answers(path: Path) -> dict[str, Any]:
    """One question of each family about the room, and what the model says with each strategy."""
    model, tokenizer, _ = registry.load(path, dtype=torch.float32)
    model_hash = model.identity
    fitted = fitted_strategies(path, model_hash)
    room = make_room(SEED, "test")
    views = render_views(room, seed=SEED, count=model.sizes.num_views)
    asked = generate(room, np.random.default_rng(SEED), sights(views, np.random.default_rng(SEED)), per_family=1)
    said: dict[str, list[str]] = {}
    for name in STRATEGIES:
        strategy = make_strategy(name, len(model.decoder), model_hash, fitted)
        config = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0))
        session = new_scene(model, tokenizer, config, strategy=strategy)
        for view in views:
            session.observe(view.frame)
        found = [ask(session, Question(qa.question)) for qa in asked]
        assert all(answer.status in (Status.OK, Status.TRUNCATED) for answer in found)
        said[name] = [answer.text for answer in found]
    questions = [
        {"question": qa.question, "room": qa.answer, **{name: said[name][k] for name in STRATEGIES}}
        for k, qa in enumerate(asked)
    ]
    return {"model": fingerprint(path), "questions": questions}


def test_answers_are_those_that_were_stored() -> None:
    path = embedded_path()
    assert GOLDEN.is_file(), f"no answers of this model are stored: {RENEW}"
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert stored["model"] == fingerprint(path), f"these are other weights than those that answered: {RENEW}"
    assert answers(path) == stored, f"if that was meant: {RENEW}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the answers anew.")
    parser.add_argument("--model", type=Path, help="checkpoint (the embedded model)")
    parser.add_argument("--out", type=Path, default=GOLDEN, help="file to write (%(default)s)")
    arguments = parser.parse_args()
    found = answers(arguments.model or embedded_path())
    lines = ",\n  ".join(json.dumps(entry) for entry in found["questions"])
    text = f'{{\n "model": "{found["model"]}",\n "questions": [\n  {lines}\n ]\n}}\n'
    arguments.out.write_text(text, encoding="utf-8")
    right = {name: sum(entry[name] == entry["room"] for entry in found["questions"]) for name in STRATEGIES}
    print(f"{arguments.out}: {len(found['questions'])} questions, right to the letter: {right}")


if __name__ == "__main__":
    main()
