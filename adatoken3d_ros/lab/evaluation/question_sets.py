# SPDX-License-Identifier: Apache-2.0
"""Question sets in the files of ScanQA, SQA3D, Scan2Cap and OpenEQA, in those that LLaVA-3D made of them, and in ours.

What a file is, its keys tell. Files come from elsewhere: their sizes are bounded, and what does not fit is told with
the file, the entry, the key and the value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adatoken3d_ros.files import UnusableFile, parse_json, read_file
from adatoken3d_ros.lmm.text_places import MAX_QUESTION_CHARS
from adatoken3d_ros.text import quoted, shown

MAX_BYTES = 2**28  # of a file; the largest published one has some 30 MB
MAX_ITEMS = 2**20
MAX_ANSWERS, MAX_ANSWER_CHARS = 200, 4000  # right answers to a question
BRIEF = "{situation} {question} Answer the question using one word or one phrase."
PLAIN = "{situation} {question}"
DESCRIBE = "Describe the object in detail."  # follows the model's own sentence about where the object is
_TYPES = ("what", "is", "how", "can", "which")  # of SQA3D's questions, by their first word


class QuestionSetError(ValueError):
    """A file that is no question set, or an entry that cannot be used; names file, entry, key and value."""


@dataclass(frozen=True)
class Item:
    """A question about a scene, and what is right.

    Attributes:
        id: unique in its set. scene: the scene's name, as the set has it.
        question: in plain words. situation: where the asker stands and looks, in words; empty if that does not matter.
        answers: right ones. kind: category or type of question; empty if the set has none.
        clicks: points that the question is about, scene frame, metres.
        box: the thing's true box (centre and size, scene frame, metres); None if the answer is a text alone.
        given: the box of which a caption is asked, if it is another than the true one.
    """

    id: str
    scene: str
    question: str
    answers: tuple[str, ...]
    situation: str = ""
    kind: str = ""
    clicks: tuple[tuple[float, ...], ...] = ()
    box: tuple[float, ...] | None = None
    given: tuple[float, ...] | None = None


@dataclass(frozen=True)
class QuestionSet:
    """A whole set: `form` is what its files are, `prompt` the published wording around a question."""

    name: str
    form: str
    prompt: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class _Entry:
    """One entry of a file, with its place for what is said of it."""

    path: Path
    number: int
    values: Mapping[str, Any]

    def wrong(self, key: str, text: str) -> QuestionSetError:
        return QuestionSetError(f"{self.path}, entry {self.number}, {key!r}: {text}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):  # ids are numbers in some files
            value = str(value)
        if not isinstance(value, str):
            raise self.wrong(key, f"must be a text, got {quoted(value)}" if key in self.values else "is missing")
        if len(value) > MAX_QUESTION_CHARS:
            raise self.wrong(key, f"has {len(value)} characters, more than {MAX_QUESTION_CHARS}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A text, or several."""
        value = self.values.get(key)
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
            raise self.wrong(key, f"must be texts, got {quoted(value)}" if key in self.values else "is missing")
        if not several or len(several) > MAX_ANSWERS or max(map(len, several)) > MAX_ANSWER_CHARS:
            raise self.wrong(key, f"must be 1 to {MAX_ANSWERS} texts of at most {MAX_ANSWER_CHARS} characters")
        return tuple(several)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        return _numbers(self.values.get(key), count, partial(self.wrong, key))


def read_question_set(questions: Path, answers: Path | None = None, boxes: Path | None = None) -> QuestionSet:
    """A set from its files.

    Args:
        questions: the questions; for ScanQA, OpenEQA and ours with their answers.
        answers: the right answers, where they are in another file (SQA3D's annotations, LLaVA-3D's answer files).
        boxes: for captions: {scene: {object's id: [cx, cy, cz, dx, dy, dz]}}, the true boxes, scene frame,
            metres; {"true": [...], "given": [...]} where captions are asked of boxes that something found.

    Raises:
        QuestionSetError: see there.
        OSError: for a file that cannot be read.
    """
    content = _content(questions)
    entries = _entries(questions, content)
    form = _form(questions, content, entries[0])
    other = _entries(answers, _content(answers)) if answers is not None else []
    if form in _ANSWERED_ELSEWHERE and answers is None:
        raise QuestionSetError(f"{questions} holds questions alone: give the right answers, too (--answers FILE)")
    if form not in _ANSWERED_ELSEWHERE and answers is not None:
        raise QuestionSetError(f"{questions} holds its answers itself: leave {answers} out")
    found = _captions(entries, _boxes(boxes)) if form == "Scan2Cap" else _READERS[form](entries, other)
    items = tuple(found)
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise QuestionSetError(f"{questions}: the id {quoted(item.id)} is there twice")
        seen.add(item.id)
    prompt = BRIEF if form in ("ScanQA", "SQA3D", "converted") else PLAIN
    return QuestionSet(questions.stem, form, prompt, items)


def _content(path: Path) -> Any:
    try:
        content = bytes(read_file(path, MAX_BYTES))
        try:
            return parse_json(content)
        except ValueError:
            if b"\n" not in content.strip():
                raise
            # A value a line, as LLaVA's scripts write it; what is wrong with a line is told below.
            return [parse_json(line) for line in content.decode().splitlines() if line.strip()]
    except UnusableFile as error:
        raise QuestionSetError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise QuestionSetError(f"{path} is no JSON: {shown(error, 300)}") from error


def _entries(path: Path, content: Any) -> list[_Entry]:
    if isinstance(content, dict):
        lists = [value for key, value in content.items() if key in ("questions", "annotations", "data")]
        content = lists[0] if lists else [content]
    if not isinstance(content, list) or not content:
        raise QuestionSetError(f"{path} is no list of questions")
    if len(content) > MAX_ITEMS:
        raise QuestionSetError(f"{path} has {len(content)} entries, more than {MAX_ITEMS}")
    for number, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise QuestionSetError(f"{path}, entry {number}: must be an object, got {quoted(entry)}")
    return [_Entry(path, number, entry) for number, entry in enumerate(content)]


def _form(path: Path, content: Any, entry: _Entry) -> str:
    keys = set(entry.values)
    for form, needed in _KEYS.items():
        if needed <= keys:
            return form
    if {"scene_id", "question"} <= keys:
        raise QuestionSetError(f"{path} holds questions without answers: a test split, nothing can be compared with it")
    known = "; ".join(f"{form}: {', '.join(sorted(needed))}" for form, needed in _KEYS.items())
    raise QuestionSetError(f"{path}: its entries have {quoted(sorted(keys), 300)}; known are {known}")


def _scanqa(entries: list[_Entry], _: list[_Entry]) -> Iterator[Item]:
    for entry in entries:
        yield Item(entry.text("question_id"), entry.text("scene_id"), entry.text("question"), entry.texts("answers"))


def _sqa3d(entries: list[_Entry], annotations: list[_Entry]) -> Iterator[Item]:
    right: dict[str, tuple[str, ...]] = {}
    for entry in annotations:
        given = entry.values.get("answers")
        if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
            raise entry.wrong("answers", f"must be a list of objects with 'answer', got {quoted(given)}")
        several = tuple(_Entry(entry.path, entry.number, one).text("answer") for one in given[:MAX_ANSWERS])
        right[entry.text("question_id")] = several
    for entry in entries:
        name, question = entry.text("question_id"), entry.text("question")
        if name not in right:
            raise entry.wrong("question_id", f"{quoted(name)} has no annotation")
        yield Item(
            name, entry.text("scene_id"), question, right[name], situation=entry.text("situation"), kind=_type(question)
        )


def _converted(entries: list[_Entry], answers: list[_Entry]) -> Iterator[Item]:
    right = {entry.text("question_id"): entry for entry in answers}
    for entry in entries:
        name, question = entry.text("question_id"), entry.text("text")
        if name not in right:
            raise entry.wrong("question_id", f"{quoted(name)} has no answer in the other file")
        found = right[name]
        kind = _type(question.rpartition(". ")[2]) if "type" in found.values else ""
        yield Item(name, entry.text("video"), question, found.texts("text"), kind=kind)


def _openeqa(entries: list[_Entry], _: list[_Entry]) -> Iterator[Item]:
    for entry in entries:
        extra = entry.texts("extra_answers") if entry.values.get("extra_answers") else ()
        yield Item(
            entry.text("question_id", str(entry.number)), entry.text("episode_history"), entry.text("question"),
            (*entry.texts("answer"), *extra), kind=entry.text("category", ""),
        )  # fmt: skip


def _own(entries: list[_Entry], _: list[_Entry]) -> Iterator[Item]:
    for entry in entries:
        box = entry.numbers("box", 6) if "box" in entry.values else None
        if not {"answers", "answer", "box"} & set(entry.values):
            raise entry.wrong("answers", "is missing, and so are 'answer' and 'box'")
        key = "answers" if "answers" in entry.values else "answer"
        answers = entry.texts(key) if key in entry.values else ()
        clicks = entry.values.get("clicks", [])
        if not isinstance(clicks, list):
            raise entry.wrong("clicks", f"must be a list of points, got {quoted(clicks)}")
        points = tuple(_numbers(one, 3, partial(entry.wrong, "clicks")) for one in clicks)
        yield Item(
            entry.text("id", str(entry.number)), entry.text("scene"), entry.text("question"), answers,
            entry.text("situation", ""), entry.text("type", ""), points, box,
        )  # fmt: skip


def _captions(entries: list[_Entry], boxes: Mapping[str, Mapping[str, Any]]) -> Iterator[Item]:
    """Descriptions of one object are the right answers to one question about it."""
    several: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        key = entry.text("scene_id"), entry.text("object_id")
        several.setdefault(key, []).extend(entry.texts("description"))
    for (scene, number), descriptions in several.items():
        found, name = boxes.get(scene, {}).get(number), f"{scene}|{number}"
        pair = found if isinstance(found, dict) else {"true": found, "given": found}
        true, given = (_numbers(pair.get(which), 6, partial(_no_box, name)) for which in ("true", "given"))
        yield Item(name, scene, DESCRIBE, tuple(descriptions[:MAX_ANSWERS]), clicks=(given[:3],), box=true, given=given)


def _no_box(name: str, text: str) -> QuestionSetError:
    return QuestionSetError(f"the box of {name} {text}")


def _boxes(path: Path | None) -> Mapping[str, Mapping[str, Any]]:
    if path is None:
        raise QuestionSetError("captions are asked of boxes: give them (--boxes FILE, see docs/evaluate.md)")
    content = _content(path)
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise QuestionSetError(f"{path} must be an object {{scene: {{object's id: [6 numbers]}}}}")
    return content


def _numbers(value: Any, count: int, wrong: Callable[[str], Exception]) -> tuple[float, ...]:
    ok = isinstance(value, list) and len(value) == count
    if not ok or not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e6 for n in value):
        raise wrong(f"must be {count} numbers in metres, got {quoted(value)}")
    return tuple(float(number) for number in value)


def _type(question: str) -> str:
    word = question.strip().lower()
    return next((kind for kind in _TYPES if word.startswith(kind)), "other")


_KEYS = {
    "ours": {"scene", "question"},
    "ScanQA": {"scene_id", "question_id", "question", "answers"},
    "SQA3D": {"scene_id", "question_id", "question", "situation"},
    "converted": {"video", "question_id", "text"},
    "Scan2Cap": {"scene_id", "object_id", "description"},
    "OpenEQA": {"episode_history", "question", "answer"},
}
_READERS = {"ours": _own, "ScanQA": _scanqa, "SQA3D": _sqa3d, "converted": _converted, "OpenEQA": _openeqa}
_ANSWERED_ELSEWHERE = ("SQA3D", "converted")
