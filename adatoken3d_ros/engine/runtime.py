# SPDX-License-Identifier: Apache-2.0
"""A loaded model on this machine: weights, tokenizer, clock, and how fast it runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adatoken3d_ros.decoder.graphs import prepare
from adatoken3d_ros.engine.budget.latency import LatencyModel
from adatoken3d_ros.engine.budget.warmup import latency_model, synchronised
from adatoken3d_ros.engine.understanding import Understanding
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.pruning.strategy import Strategy

logger = logging.getLogger(__name__)


class Runtime:
    """What all scenes of a process share; it holds none of them.

    Args:
        model, tokenizer: as loaded.
        model_id: what answers call the model.
        fitted: strategies with measured losses, by name, for the planner to choose from.
        understanding: what the model says of the questions that it knows; without one, all are taken for understood.
        clock: seconds, monotonic.

    Attributes:
        clock: as given; on a GPU it waits for what was launched.
        latency: predicts how long stages take; None until `warm_up`. What one scene's questions teach of the machine
            holds for all; a policy's gates have a ratio of their own (`LatencyModel.for_policy`).
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self,
        model: SpatialLMM,
        tokenizer: Any,
        *,
        model_id: str = "",
        fitted: Mapping[str, Strategy] | None = None,
        understanding: Understanding | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.model_id = model_id
        self.fitted = dict(fitted or {})
        self.understanding = understanding or Understanding()
        self.clock = synchronised(clock, model.device)
        self.latency: LatencyModel | None = None
        eos = tokenizer.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])

    @property
    def n_layers(self) -> int:
        """Layers of the language model."""
        return len(self.model.decoder)

    def warm_up(
        self, strategy: Strategy, cache: Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> bool:
        """Measures how fast this machine is, with the gates of `strategy`; see `engine.budget.warmup.latency_model`.

        To be called before scenes are made. Returns whether it was known already.
        """
        self.latency, known = latency_model(self.model, self.tokenizer, strategy, cache, progress)
        return known

    def prepare_decoding(self, cache: Path | None = None) -> str:
        """Makes decode steps run in one piece, before `warm_up`; why they stay eager, else an empty text.

        Args:
            cache: directory where a compiler's work is kept for the next start; None for torch's own.
        """
        if cache is not None and (folder := Path(cache).expanduser()).is_dir():
            # What is compiled is for a number of threads, which torch's own key does not name.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{torch.get_num_threads()}")
        why = prepare(self.model.decoder)
        if why:
            logger.warning("decoding is eager: %s", why)
        return why

    def decode(self, ids: list[int]) -> str:
        """The text of an answer's token ids, without special tokens and without an unfinished last character."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        # A character may be spread over several byte tokens: hold an unfinished one back.
        return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
