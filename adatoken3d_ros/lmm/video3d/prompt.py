# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids in the ChatML conversation, with placeholders where the scene and clicked points go."""

from __future__ import annotations

from typing import Any

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.prompts import checked, encode, pieces, with_clicks

START, END, END_OF_TEXT, COORD = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<coord>"
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

# Words that are commands to this model or to its relatives; as plain text they could only be meant as such.
CONTROL_WORDS = ("<image>", "<video>", COORD, "<ground>", START, END, END_OF_TEXT)


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
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    line, system, user, assistant = (encode(tokenizer, text) for text in ("\n", "system", "user", "assistant"))
    before = (start, *system, *line, *encode(tokenizer, SYSTEM), end, *line, start, *user, *line)
    asked = pieces(tokenizer, TEMPLATES[template].format(question=question), clicks)
    return PromptIds((before, Placeholder("image"), line, *asked, (end, *line, start, *assistant, *line)))


def _lead(number: int, marks: str) -> str:
    return f"Given {'an object' if number == 1 else 'objects'} located at {marks} , "
