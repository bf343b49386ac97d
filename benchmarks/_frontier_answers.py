# SPDX-License-Identifier: Apache-2.0
"""What the frontier asks of a strategy: the answers to a room's questions, and what they took."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.lab.synthetic.wordings import QA
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import PolicyError, Watching
from benchmarks._budgets import operations
from benchmarks._kept import strategy_key
from benchmarks._reuse import decode_along, remembering
from benchmarks._scenes import Reader, Room
from benchmarks.accuracy import MAX_ANSWER, score


@dataclass(frozen=True, eq=False)
class Ask:
    """A room, and who answers its questions."""

    room: Room
    strategy: Strategy

    def kept_as(self) -> list[Any]:
        """For `Kept`."""
        return [self.room.key(), strategy_key(self.strategy)]


def answer(reader: Reader, task: Ask) -> list[list[float]]:
    """Of each question its score and the exact prefill operations of its prompt: two lists."""
    room = task.room
    if reader.memory.get("room") != (room.split, room.seed, room.questions):
        reader.memory["samples"] = reader.samples(room.scene(), room.questions)
        reader.memory["guesses"] = [[] for _ in room.questions]  # the boxes that the last strategy gave
        reader.memory["room"] = room.split, room.seed, room.questions
    samples: list[Sample] = reader.memory["samples"]
    guesses: list[list[int]] = reader.memory["guesses"]
    policy = make_rival(task.strategy.policy, **task.strategy.options)
    scores, spent = [], []
    # What watches layers has to see all rows in them.
    shortened = nullcontext() if isinstance(policy, Watching) else remembering(reader.decoder)
    with shortened, torch.inference_mode():
        for sample, qa, guess in zip(samples, room.questions, guesses, strict=True):
            filled = read(reader, sample, task.strategy, policy)
            scores.append(judge(reader, filled, qa, guess))
            sizes = sample.n_spatial, sample.n_text, sample.layout.n_question, filled.trace.rows_per_layer
            spent.append(operations(reader.decoder.size, policy, filled.trace.spatial_per_layer, *sizes))
    return [scores, spent]


def unfit(reader: Reader, room: Room, names: Sequence[str]) -> dict[str, str]:
    """Which of these policies this model offers too little for, and what each of them says."""
    (sample,) = reader.samples(room.scene(), room.questions[:1])
    found = {}
    for name in names:
        policy = make_rival("ours" if name == "ours_default" else name)
        schedule = policy.default_schedule(reader.n_layers).not_before(reader.decoder.first_gate)
        try:
            prefill(reader.decoder, sample.embeds, sample.layout, schedule, policy, scene=sample.scene)
        except PolicyError as error:
            found[name] = str(error)
    return found


def read(reader: Reader, sample: Sample, strategy: Strategy, policy: Any) -> Prefill:
    """One prompt through the gate."""
    return prefill(
        reader.decoder,
        sample.embeds,
        sample.layout,
        strategy.schedule,
        policy,
        scene=sample.scene,
        max_new_tokens=MAX_ANSWER,
    )


def judge(reader: Reader, filled: Prefill, qa: QA, guess: list[int]) -> float:
    """1 where greedy decoding gives the answer to the letter, else 0; of a box, the overlap of the decoded one.

    `guess`: tokens that a box may be, replaced by what it is.
    """
    if qa.box is None:  # only a guess as well: a tokenizer may begin an answer with a space
        guess = reader.tokenizer.encode(qa.answer, add_special_tokens=False)

    def right_so_far(ids: list[int]) -> bool:
        return qa.box is not None or qa.answer.startswith(reader.text(ids))

    guess[:] = decode_along(
        reader.decoder, filled, guess, max_new_tokens=MAX_ANSWER, eos=reader.eos, worth=right_so_far
    )
    return score(qa, reader.text(guess))
