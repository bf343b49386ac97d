# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids, with placeholders where the scene and clicked points go."""

from __future__ import annotations

from typing import Any

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.prompts import checked, encode, pieces, with_clicks

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


def build_prompt(
    tokenizer: Any,
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
    question = checked(tokenizer, question, template, TEMPLATES, CONTROL_WORDS)
    question, clicks = with_clicks(question, n_clicks, _lead)
    before, after = TEMPLATES[template]
    start = (tokenizer.bos_token_id, *encode(tokenizer, before))
    return PromptIds((start, Placeholder("image"), *pieces(tokenizer, after.format(question=question), clicks)))


def _lead(number: int, marks: str) -> str:
    return f"The related {'object is' if number == 1 else 'objects are'} located at {marks}. "
