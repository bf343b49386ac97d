# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids in the conversation of Qwen3-VL, with a placeholder where the views go."""

from __future__ import annotations

from typing import Any

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.prompts import checked, encode
from adatoken3d_ros.lmm.text_places import CLICK_MARK, MAX_WRITTEN_CHARS, PromptError

START, END = "<|im_start|>", "<|im_end|>"
# What stands between the views and the question; the publisher's own conversation has nothing there.
TEMPLATES = {
    "qwen3_vl": "{question}",
    "qwen3_vl_scene": "These images show one room from several places. {question}",
}
DEFAULT_TEMPLATE = "qwen3_vl"

# Words that are commands to this model or to its relatives; as plain text they could only be meant as such.
CONTROL_WORDS = (
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    START,
    END,
)


def build_prompt(tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = DEFAULT_TEMPLATE) -> PromptIds:
    """Tokenises `user (views)question assistant`, as the publisher's conversation template does.

    Args:
        tokenizer: from `checkpoint.load`.
        question: plain words, in which points stand as the model writes them already.
        n_clicks: must be 0; points are words to this model (`Qwen3VL.write_clicks`).
        template: one of TEMPLATES.

    Raises:
        PromptError: for an empty or too long question, control words or characters in it, an unknown template, or
            points that are not written out.
    """
    question = checked(tokenizer, question, template, TEMPLATES, CONTROL_WORDS, MAX_WRITTEN_CHARS)
    if n_clicks or CLICK_MARK in question:
        raise PromptError("points are told to this model in words, as pixels of a view")
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    line, user, assistant = (encode(tokenizer, text) for text in ("\n", "user", "assistant"))
    asked = encode(tokenizer, TEMPLATES[template].format(question=question))
    after = (*asked, end, *line, start, *assistant, *line)
    return PromptIds(((start, *user, *line), Placeholder("image"), after))


def before_views(tokenizer: Any, prompt: PromptIds, words: str) -> PromptIds:
    """A prompt with some words right before its views, where they belong to what questions about a scene share."""
    at = prompt.pieces.index(Placeholder("image"))
    return PromptIds((*prompt.pieces[:at], encode(tokenizer, words), *prompt.pieces[at:]))
