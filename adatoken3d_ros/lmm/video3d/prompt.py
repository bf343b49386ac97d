# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids in the ChatML conversation, with placeholders where the scene and clicked points go."""

from __future__ import annotations

from typing import Any

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.text_places import CLICK_MARK, MAX_CLICKS, PromptError, check_text
from adatoken3d_ros.text import quoted

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
    if template not in TEMPLATES:
        raise PromptError(f"template {quoted(template)} is unknown, known: {', '.join(TEMPLATES)}")
    question = question.strip()
    check_text(question, control_words=(*CONTROL_WORDS, *tokenizer.all_special_tokens))
    written = question.count(CLICK_MARK)
    if n_clicks < written:
        raise PromptError(f"the question mentions {written} points, but only {n_clicks} clicks were given")
    if n_clicks > MAX_CLICKS:
        raise PromptError(f"{n_clicks} clicks are more than {MAX_CLICKS}")
    added = n_clicks - written
    if added:
        noun = "an object" if added == 1 else "objects"
        question = f"Given {noun} located at {', '.join([CLICK_MARK] * added)} , {question}"

    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))

    def encode(text: str) -> tuple[int, ...]:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if special := set(ids) & set(tokenizer.all_special_ids):
            raise PromptError(f"the text {quoted(text)} contains the special token {min(special)}")
        return ids

    line = encode("\n")
    system = (start, *encode("system"), *line, *encode(SYSTEM), end, *line)
    order = iter([*range(written, n_clicks), *range(written)])  # the added sentence stands before the question
    pieces: list[tuple[int, ...] | Placeholder] = [(*system, start, *encode("user"), *line), Placeholder("image"), line]
    for k, text in enumerate(TEMPLATES[template].format(question=question).split(CLICK_MARK)):
        if k:
            pieces.append(Placeholder("click", next(order)))
        if text:
            pieces.append(encode(text))
    pieces.append((end, *line, start, *encode("assistant"), *line))
    return PromptIds(tuple(pieces))
