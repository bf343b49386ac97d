# SPDX-License-Identifier: Apache-2.0
"""Question sets in the published formats, made small: what is read, and what is said of those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.lab.evaluation.question_sets import BRIEF, DESCRIBE, PLAIN, QuestionSetError, read_question_set

SCANQA = [
    {
        "scene_id": "scene0011_00", "question_id": "val-scene0011-0", "question": "What is by the door?",
        "answers": ["brown chair", "chair"], "object_ids": [3], "object_names": ["chair"],
    }
]  # fmt: skip
SQA3D = {
    "questions": [
        {
            "scene_id": "scene0050_00", "question_id": 220602000000, "situation": "I am facing the table.",
            "alternative_situation": ["I look at the table."], "question": "Is the door behind me?",
        }
    ]
}  # fmt: skip
SQA3D_ANSWERS = {
    "annotations": [
        {
            "scene_id": "scene0050_00", "question_id": 220602000000, "question_type": "N/A", "answer_type": "other",
            "answers": [{"answer": "no", "answer_confidence": "yes", "answer_id": 1}],
            "position": {"x": 0, "y": 0, "z": 0}, "rotation": {"_x": 0, "_y": 0, "_z": 0, "_w": 1},
        }
    ]
}  # fmt: skip
SCANREFER = [
    {"scene_id": "scene0011_00", "object_id": "3", "object_name": "chair", "ann_id": "0", "description": text}
    for text in ("a brown chair.", "the chair at the door.")
]
OPENEQA = [
    {
        "question": "Where is the chair?", "answer": "By the door.", "category": "object localization",
        "question_id": "f2e82760", "episode_history": "scannet-v0/002-scannet-scene0709_00", "extra_answers": ["door"],
    }
]  # fmt: skip
OURS = '{"scene": "kitchen", "question": "Where is it?", "box": [1, 0, 1, 1, 1, 2], "clicks": [[1, 0, 1]]}\n'
OURS += '{"scene": "kitchen", "question": "How many?", "answer": "two", "id": "q2", "type": "count"}\n'


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_scanqa(tmp_path: Path) -> None:
    found = read_question_set(write(tmp_path, "ScanQA_v1.0_val.json", SCANQA))
    assert (found.name, found.form, found.prompt) == ("ScanQA_v1.0_val", "ScanQA", BRIEF)
    (item,) = found.items
    assert (item.id, item.scene, item.answers) == ("val-scene0011-0", "scene0011_00", ("brown chair", "chair"))


def test_sqa3d_has_its_situation_and_the_type_of_its_question(tmp_path: Path) -> None:
    found = read_question_set(write(tmp_path, "q.json", SQA3D), write(tmp_path, "a.json", SQA3D_ANSWERS))
    (item,) = found.items
    assert (item.situation, item.kind, item.answers) == ("I am facing the table.", "is", ("no",))
    assert found.prompt.format(question=item.question, situation=item.situation) == (
        "I am facing the table. Is the door behind me? Answer the question using one word or one phrase."
    )


def test_converted_files_of_both_sets(tmp_path: Path) -> None:
    questions = [{"question_id": 7, "video": "scannet/scene0011_00", "text": "I am here. What is it?"}]
    answers = '{"question_id": 7, "text": "chair", "type": 0}\n'
    (item,) = read_question_set(write(tmp_path, "q.json", questions), write(tmp_path, "a.jsonl", answers)).items
    assert (item.id, item.scene, item.answers, item.kind) == ("7", "scannet/scene0011_00", ("chair",), "what")


def test_scan2cap_asks_once_of_each_box(tmp_path: Path) -> None:
    true, given = [1, 2, 0.5, 1, 1, 1], [1.2, 2, 0.5, 1, 1, 1]
    boxes = write(tmp_path, "boxes.json", {"scene0011_00": {"3": {"true": true, "given": given}}})
    (item,) = read_question_set(write(tmp_path, "ScanRefer.json", SCANREFER), boxes=boxes).items
    assert (item.question, item.clicks, item.box) == (DESCRIBE, ((1.2, 2.0, 0.5),), tuple(map(float, true)))
    assert item.given == tuple(given) and item.answers == ("a brown chair.", "the chair at the door.")


def test_openeqa_takes_its_other_answers_too(tmp_path: Path) -> None:
    found = read_question_set(write(tmp_path, "open-eqa-v0.json", OPENEQA))
    assert found.prompt == PLAIN
    assert (found.items[0].answers, found.items[0].kind) == (("By the door.", "door"), "object localization")


def test_our_own_a_line_each(tmp_path: Path) -> None:
    first, second = read_question_set(write(tmp_path, "own.jsonl", OURS)).items
    assert (first.id, first.box, first.clicks, first.answers) == ("0", (1, 0, 1, 1, 1, 2), ((1, 0, 1),), ())
    assert (second.id, second.kind, second.answers) == ("q2", "count", ("two",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1", "wrong.json is no JSON"),
        ([], "is no list of questions"),
        ([3], "entry 0: must be an object, got 3"),
        ([{"scene_id": "s", "question_id": "0", "question": "q?"}], "a test split"),
        ([{"scene": "s"}], r"its entries have \['scene'\]"),
        ([{**SCANQA[0], "answers": [3]}], r"entry 0, 'answers': must be texts, got \[3\]"),
        ([{**SCANQA[0], "answers": []}], "must be 1 to 200 texts"),
        ([{**SCANQA[0], "question": "q" * 2001}], "'question': has 2001 characters"),
        (SCANQA * 2, "the id 'val-scene0011-0' is there twice"),
        ([{"scene": "s", "question": "q?", "box": [1, 2]}], "'box': must be 6 numbers in metres"),
        ([{"scene": "s", "question": "q?"}], "'answers': is missing"),
        (SQA3D, "give the right answers, too"),
        (SCANREFER, "captions are asked of boxes"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(QuestionSetError, match=said):
        read_question_set(write(tmp_path, "wrong.json", content))


def test_a_question_without_an_annotation_and_a_thing_without_a_box(tmp_path: Path) -> None:
    other = {"annotations": [{**SQA3D_ANSWERS["annotations"][0], "question_id": 1}]}
    with pytest.raises(QuestionSetError, match="'220602000000' has no annotation"):
        read_question_set(write(tmp_path, "q.json", SQA3D), write(tmp_path, "a.json", other))
    with pytest.raises(QuestionSetError, match=r"the box of scene0011_00\|3 must be 6 numbers"):
        read_question_set(write(tmp_path, "r.json", SCANREFER), boxes=write(tmp_path, "b.json", {}))
