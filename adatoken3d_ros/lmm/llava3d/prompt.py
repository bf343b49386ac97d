# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids, with placeholders where the scene and clicked points go."""

from __future__ import annotations

from typing import Protocol

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.text_places import CLICK_MARK, MAX_CLICKS, PromptError, check_text
from adatoken3d_ros.text import quoted

# Conversation templates of Vicuna 1.5. LLaVA-3D was trained with vicuna_v1, its authors ask with llava_v1.
TEMPLATES = {
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ",
        "\n{question} ASSISTANT:",
    ),
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        "\n{question} ASSISTANT:",
    ),
}
DEFAULT_TEMPLATE = "llava_v1"

# Words that are commands to this model or to its relatives; as plain text they could only be meant as such.
CONTROL_WORDS = (
    "<image>",
    "<video>",
    "<boxes>",
    "<points>",
    "<loc_start>",
    "<loc_end>",
    "<vid_start>",
    "<vid_end>",
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
)


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int
    all_special_tokens: list[str]
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...


def build_prompt(
    tokenizer: Tokenizer,
    question: str,
    *,
    n_clicks: int = 0,
    template: str = DEFAULT_TEMPLATE,
) -> PromptIds:
    """Tokenises a question in its conversation template, `... USER: (scene)\\n{question} ASSISTANT:`.

    Each run of text between placeholders is tokenised by itself, so it begins with the tokenizer's word-start mark, as
    in training; the beginning-of-sequence token stands once, at the very start.

    Args:
        tokenizer: from `checkpoint.load`.
        question: plain words. Points written in it must have been taken out by `parse_clicks`; click k of that call is
            placeholder k here.
        n_clicks: all clicks. Those beyond the ones that `question` mentions are put before it in the wording of the
            training data ("The related object is located at ...").
        template: `llava_v1` or `vicuna_v1`.

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
        noun = "object is" if added == 1 else "objects are"
        question = f"The related {noun} located at {', '.join([CLICK_MARK] * added)}. {question}"

    before, after = TEMPLATES[template]
    order = iter([*range(written, n_clicks), *range(written)])  # the added sentence stands before the question
    pieces: list[tuple[int, ...] | Placeholder] = [
        (tokenizer.bos_token_id, *_encode(tokenizer, before)),
        Placeholder("image"),
    ]
    for k, text in enumerate(after.format(question=question).split(CLICK_MARK)):
        if k:
            pieces.append(Placeholder("click", next(order)))
        if text:
            pieces.append(_encode(tokenizer, text))
    return PromptIds(tuple(pieces))


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if special := set(ids) & set(tokenizer.all_special_ids):
        raise PromptError(f"the text {quoted(text)} contains the special token {sorted(special)[0]}")
    return ids
