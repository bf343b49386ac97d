# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids in the ChatML conversation, with placeholders where the scene and clicked points go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.prompts import checked, encode, pieces, with_clicks
from adatoken3d_ros.lmm.text_places import located

START, END, END_OF_TEXT, COORD, GROUND = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<coord>", "<ground>"
SYSTEM = "You are a helpful assistant."

# What stands between the scene and the question. The authors ask without the sentence with which they trained.
TEMPLATES = {
    "qwen_1_5": " {question}",
    "qwen_1_5_spatial": (
        "The video captures 3D spatial information of a scene. Please focus on the spatial relationships in the video "
        "and answer the following questions.\n{question}"
    ),
}
DEFAULT_TEMPLATE = "qwen_1_5"
# What stands around the description of a thing that is to be pointed at.
LEAD = "Identify the object according to the following description.\n"
MAYBE = "\nThere may be no corresponding object, or there may be one or more objects."

# Words that are commands to this model or to its relatives; as plain text they could only be meant as such.
CONTROL_WORDS = ("<image>", "<video>", COORD, GROUND, START, END, END_OF_TEXT)


def build_prompt(tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = DEFAULT_TEMPLATE) -> PromptIds:
    """Tokenises `system ... user (scene)\\n {question} assistant`, each run of text by itself, as the original does.

    Args:
        tokenizer: from `checkpoint.load`.
        question: plain words. Points written in it must have been taken out by `parse_clicks`; click k of that call is
            placeholder k here.
        n_clicks: all clicks. Those beyond the ones that `question` mentions are put before it in the wording of the
            training data ("Given an object located at ...").
        template: one of TEMPLATES.

    Raises:
        PromptError: for an empty or too long question, control words or characters in it, an unknown template, or a
            number of clicks that is too high or lower than the question mentions.
    """
    question = checked(tokenizer, question, template, TEMPLATES, CONTROL_WORDS)
    question, clicks = with_clicks(question, n_clicks, _lead)
    return PromptIds(_conversation(tokenizer, TEMPLATES[template].format(question=question), clicks))


def described(question: str) -> str | None:
    """What a question asks to be pointed at, in the wording of the training data; None where it asks for words.

    The wording that allows for none or several is that of Multi3DRefer; a question that begins as ScanRefer's and
    Multi3DRefer's stays as it is.
    """
    question = question.strip()
    if question.startswith(LEAD.strip()):
        return question
    wanted = located(question)
    return None if wanted is None else f"{LEAD}{wanted.capitalize()}{MAYBE}"


def build_ground_prompt(tokenizer: Any, description: str, *, n_clicks: int = 0) -> PromptIds:
    """As `build_prompt`, of what `described` found, with the token for a place as its answer."""
    description = checked(tokenizer, description, DEFAULT_TEMPLATE, TEMPLATES, CONTROL_WORDS)
    description, clicks = with_clicks(description, n_clicks, _lead)
    answer = (tokenizer.convert_tokens_to_ids(GROUND),)
    return PromptIds(_conversation(tokenizer, description, clicks, answer), points=True)


def _conversation(
    tokenizer: Any, asked: str, clicks: Iterator[int], answer: tuple[int, ...] = ()
) -> tuple[tuple[int, ...] | Placeholder, ...]:
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    line, system, user, assistant = (encode(tokenizer, text) for text in ("\n", "system", "user", "assistant"))
    before = (start, *system, *line, *encode(tokenizer, SYSTEM), end, *line, start, *user, *line)
    after = (end, *line, start, *assistant, *line, *answer)
    return (before, Placeholder("image"), line, *pieces(tokenizer, asked, clicks), after)


def _lead(number: int, marks: str) -> str:
    return f"Given {'an object' if number == 1 else 'objects'} located at {marks} , "
